"""Written form -> words as they are spoken: "Dr. Lee paid $5 on May 5th" -> "doctor Lee paid five dollars on the
fifth of may".

Only what is spoken passes here; the text side of a document keeps its written form.
Trap: a span is spoken without the text around it. Where a span begins after the "$" of "$5 million", the "$" stays
unspoken.

The grammars are wetext's (English, Chinese, Japanese). Around them stand a few rules for what they leave or cannot
read.
"""

import functools
import html
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

LANGUAGES = ("en", "zh", "ja")  # what wetext's grammars know

# What a text must hold before the library is asked: anything but letters and the punctuation that is read over, a title or
# an ordinal in Roman numerals.
_WRITTEN = re.compile(
    r"[^\w\s.,;:!?\"'’‘“”„«»()\u2010-\u2015…。，、；：！？（）「」『』【】《》·-]|[\d_²³¹¼-¾\u2070-\u209f\u2150-\u218b]"
    r"|\b(?:Mr|Mrs|Ms|Dr|Jr|Mt|Hon|Maj|Gen|Rev|Ph\.D)\.|\b[A-Z]\.(?:[A-Z]\.)+|\b(?:II|III|IV|VI{0,3}|IX)\b"
)
# Abbreviations that wetext leaves as they are.
_ABBREVIATIONS = {
    "e.g.": "for example",
    "i.e.": "that is",
    "etc.": "et cetera",
    "vs.": "versus",
    "cf.": "compare",
    "approx.": "approximately",
    "Prof.": "professor",
    "Sr.": "senior",
    "Inc.": "Incorporated",
    "Ltd.": "Limited",
    "Corp.": "Corporation",
}
_ABBREVIATION = re.compile(rf"(?<![\w.])(?:{'|'.join(map(re.escape, _ABBREVIATIONS))})(?!\w)")
# Left by programs: escapes of a terminal, entities of HTML, places where a line might be broken.
_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\^_])")
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,30});")
_SOFT_HYPHEN = "\u00ad"
_CURRENCIES = {  # one and many of the whole, one and many of the hundredth
    "$": ("dollar", "dollars", "cent", "cents"),
    "€": ("euro", "euros", "cent", "cents"),
    "£": ("pound", "pounds", "penny", "pence"),
    "¥": ("yen", "yen", "", ""),
}
_UNITS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = ("", "", *["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"])
_THOUSANDS = ("", "thousand", "million", "billion", "trillion")
# Amounts with thousands or hundredths, where wetext drops the "one" of a thousand and reads hundredths as a fraction.
_MONEY = re.compile(
    r"(?<![\w$€£¥])(?P<sign>[$€£¥])(?:(?P<long>\d{1,3}(?:,\d{3}){1,4})(?:\.(?P<a>\d\d))?|(?P<short>\d{1,15})\.(?P<b>\d\d))"
    r"(?![\d%]|[.,]\d|\s?(?:hundred|thousand|million|billion|trillion|[kmb]n?\b)|-)",
    re.IGNORECASE,
)


def _amount(match: re.Match[str]) -> str:
    """Money in words: "one thousand two hundred thirty four dollars and fifty six cents"."""
    one, many, hundredth, hundredths = _CURRENCIES[match["sign"]]
    whole, part = int((match["long"] or match["short"]).replace(",", "")), int(match["a"] or match["b"] or 0)
    if part and not hundredth:
        return match[0]
    spoken = [f"{_cardinal(whole)} {one if whole == 1 else many}"] if whole or not part else []
    if part:
        spoken.append(f"{_cardinal(part)} {hundredth if part == 1 else hundredths}")
    return " and ".join(spoken)


def _cardinal(number: int) -> str:
    """A whole number below 10**15 in English words."""
    words: list[str] = []
    for power, group in enumerate(reversed(f"{number:,}".split(","))):
        if int(group):
            words = [*_below_thousand(int(group)), *([_THOUSANDS[power]] if power else []), *words]
    return " ".join(words) or _UNITS[0]


def _below_thousand(number: int) -> list[str]:
    hundreds, rest = divmod(number, 100)
    words = [_UNITS[hundreds], "hundred"] if hundreds else []
    if rest >= len(_UNITS):
        tens, rest = divmod(rest, 10)
        words.append(_TENS[tens])
    return [*words, _UNITS[rest]] if rest else words


# What wetext misreads or has no way for, put so that it reads it: (pattern, replacement), in order.
_REWRITES: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(r"\b(1\d|20)([1-9]0)['’]?s\b"), r"\1 \2s"),  # 1990s: a number of seconds otherwise
    (re.compile(r"\b(1\d)00['’]?s\b"), r"\1 hundreds"),
    (re.compile(r"\b(1\d{3}|20\d\d)[-–](1\d{3}|20\d\d)\b"), r"\1 to \2"),
    (re.compile(r"(?<=[$€£¥])\s+(?=\d)"), ""),
    (_MONEY, _amount),
    (re.compile(r"\b[Nn]o\.\s?(?=\d)|№\s?(?=\d)"), "number "),
    (re.compile(r"\b[Nn]os\.\s?(?=\d)"), "numbers "),
    (re.compile(r"(?<![\d.])(\d+)\.(\d+)\.(\d{1,3})(?!\.?\d)"), r"\1 point \2 point \3"),  # versions, unlike 29.06.2007
    (re.compile(r"#\s?(?=\d)"), "number "),
    (re.compile(r"~\s?(?=\d)"), "about "),
    (re.compile(r"(?<=\d)\s?×\s?(?=\d)"), " times "),
    (re.compile(r"²"), " squared"),
    (re.compile(r"³"), " cubed"),
    (re.compile(r"(?<=\d)(st|nd|rd|th)-(?=[a-z])"), r"\1 "),  # 21st-century
]
_SILENT = re.compile(
    r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\"\[\]{}<>*_|\\^`•·¶\u200b-\u200f\u2060\ufeff\U0001f000-\U0001faff\u2600-\u27bf\ufe0f]+"
)
_SPACED_POINT = re.compile(r"\s([.,;:!?)])(?!\w)")
_GLUED = re.compile(r"(?<=\d)(?=[^\w\s.,:])|(?<=[^\w\s.,:])(?=\d)|(?<=\d)(?=[^\W\d_])|(?<=[^\W\d_])(?=\d)")


def verbalise(text: str, language: str = "en") -> str:
    """`text` as it is spoken. Text that is written as it is spoken comes back unchanged, without the library.

    What programs put into texts for other programs (escapes of a terminal, HTML entities, soft hyphens) is taken out or read.
    A language without grammars comes back unchanged otherwise. What the grammar cannot read stays as written, never dropped.
    Raises ImportError, naming the extra, when the library is needed and missing.
    """
    text = _without_codes(text)
    if language not in LANGUAGES:
        return text
    if language == "en":
        text = _ABBREVIATION.sub(_full_form, text)
    if not _WRITTEN.search(text):
        return text
    text = _SPACED_POINT.sub(r"\1", " ".join(_SILENT.sub(" ", text).split()))
    if language == "en":
        for pattern, replacement in _REWRITES:
            text = pattern.sub(replacement, text)
    words = text.split()
    spoken = [_read_window(part, language) if written else part for part, written in _windows(words)]
    return " ".join(spoken)


def _without_codes(text: str) -> str:
    if "\x1b" in text:
        text = _ANSI.sub("", text)
    if "&" in text:
        text = _ENTITY.sub(lambda match: html.unescape(match[0]), text)
    return text.replace(_SOFT_HYPHEN, "")


def needs_verbalising(text: str) -> bool:
    """Whether `text` holds something that is not spoken as it is written."""
    return _ABBREVIATION.search(text) is not None or _WRITTEN.search(text) is not None


def _full_form(match: re.Match[str]) -> str:
    """The abbreviation's words; its point stays where the sentence ends with it."""
    full = _ABBREVIATIONS[match[0]]
    return full + "." if match.end() == len(match.string) else full


def _windows(words: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """The words in runs, and whether a run holds something written: with it the words that say how it is read, two before
    and one behind ("World War II", "in 1999", "5 kg"). The grammars are slow, so that they read no more than that."""
    near = [False] * len(words)
    for i, word in enumerate(words):
        if _WRITTEN.search(word):
            near[max(0, i - 2) : i + 2] = [True] * len(near[max(0, i - 2) : i + 2])
    for written, run in itertools.groupby(zip(words, near), key=lambda pair: pair[1]):
        yield " ".join(word for word, _ in run), written


@functools.lru_cache(maxsize=1 << 14)
def _read_window(text: str, language: str) -> str:
    """What the grammar makes of a run of words; word by word when it cannot read it, if need be in pieces, at worst as
    written."""
    return _read(text, language) or " ".join(
        _read(word, language) or _read(_GLUED.sub(" ", word), language) or word for word in text.split()
    )


def _read(text: str, language: str) -> str:
    """What the grammar makes of `text`, "" when it has no way through it."""
    try:
        return _normalizer(language).normalize(text).strip()
    except AssertionError:  # how wetext says that its tagger found no path
        return ""


@functools.cache
def _normalizer(language: str) -> Any:
    try:
        from wetext import Normalizer
    except ImportError:
        raise ImportError(
            "numbers, dates, units and symbols are put into words by wetext; install it with pip install 'speechquilt[speaking]'"
        ) from None
    return Normalizer(lang=language, operator="tn")
