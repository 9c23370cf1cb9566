"""Which words of a text nobody can read aloud, and why: code, tables, addresses, formulas, foreign scripts.

These words are never chosen to be spoken; they stay text and are still trained on.
Trap: the rules know nothing but the written form. They would rather leave a readable word as text than have a voice
make something up for `kwargs.setdefault(`.

Words are judged alone (cached, most words repeat), then as stretches (fences, tags, formulas), then by the company they
keep: a line, or an indented block, in which enough words cannot be read is not read at all.
"""

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from speechquilt.data.interleaving.verbalise import LANGUAGES, needs_verbalising

# Why a word is not spoken. "number": the language has no grammar that puts written forms into words.
REASONS = ("", "code", "table", "url", "e-mail", "path", "formula", "hash", "sign", "script", "markup", "number")
LONG_WORD = 200  # characters; longer ones are not looked at, since some rules cost the square of the length
LINE_START = 1000  # characters of a line that its own rules look at, for the same reason
_CODE_OF = {reason: i for i, reason in enumerate(REASONS)}

_LATIN = ("cs", "da", "de", "en", "es", "fi", "fr", "hu", "id", "it", "nl", "no", "pl", "pt", "ro", "sv", "tr", "vi")
_SCRIPTS = {
    **dict.fromkeys(_LATIN, ("LATIN",)),
    **dict.fromkeys(("ru", "uk", "bg"), ("CYRILLIC",)),
    "zh": ("CJK",),
    "ja": ("CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA"),
    "ko": ("HANGUL",),
    "el": ("GREEK",),
    "ar": ("ARABIC",),
    "he": ("HEBREW",),
    "hi": ("DEVANAGARI",),
    "th": ("THAI",),
}
# First words of the Unicode names of letters that belong to no script: µ, ª, º, Ω (ohm), full width forms, marks.
_NO_SCRIPT = frozenset(
    ("MICRO", "FEMININE", "MASCULINE", "OHM", "KELVIN", "ANGSTROM", "FULLWIDTH", "MODIFIER", "IDEOGRAPHIC")
)

_PLAIN = re.compile(r"[\"'(“‘«]*(?:[A-Za-z]?[a-z]+|[A-Z]+)(?:['’-](?:[A-Za-z]?[a-z]+|[A-Z]+))*[.,;:!?\"')”’»]*")
_RELATIONS = frozenset("=≈≠≤≥<>∈→⇒↔")
_OPERATOR = re.compile(r"(?!(?:-+|\*+|=+)$)[-=!<>+*/|&:{}()\[\]]{2,3}|==")
_AROUND = "\"'`“”‘’«»()[]{}<>,.;:!?*…"
_ENDINGS = "(?:py|c|h|cc|cpp|hpp|rs|go|js|ts|java|rb|sh|md|rst|txt|pdf|html?|xml|json|ya?ml|toml|cfg|ini|csv|gz|zip|tar|png|jpe?g|so|exe|log|conf|whl)"
# The first that is found in a word names its reason.
_WORD_RULES = {
    "url": r"https?:|ftp:|\bwww\.|^[\w-]+(?:\.[\w-]+)*\.(?:com|org|net|edu|gov|io|dev|ai)(?:[/:?#]|$)|^doi:|\]\(",
    "e-mail": r"[\w.+-]@[\w-]+\.\w|^[\w.+-]+@[\w-]+$",
    "markup": r"^<\S*>|</|/>$|^&#?\w+;|^:[\w:.-]+:|^\.\.$|\|\w+\|",
    "formula": r"\\[A-Za-z]+\b[{_^(]|\\(?:frac|sum|int|sqrt|alpha|beta|gamma|theta|mathbf|cdot|leq|geq)\b|\w\^|[∑∏∫√∂∞≈≠≤≥∈∉∀∃→⇒↔∪∩⊂⊆∝∇]"
    r"|^[\w.]{1,3}=[\w.-]{1,5}$|[^\W_]_\{",
    "path": rf"^(?:~|\.{{1,2}})?/[\w.-]|[\w.-]+/[\w.*-]*[^\W\d][\w.*-]*/|/$|^[A-Za-z]:\\|\w\\\w|^\.?[\w-]+(?:\.[\w-]+)*\.{_ENDINGS}$"
    rf"|/[\w.-]+\.\w{{1,4}}$|^\.[a-z]\w+$",
    "code": r"_|^[a-z]{2,}[A-Z]|[a-z]\.[a-z_]\w+\b|^(?:[A-Z][a-z0-9]+){3,}$|[^\W\d]\((?!(?:s|es|ies|ed|d|r|n)\)?\W*$)\w*|\(\)|[{}\\]|\w\["
    r"|[=!<>+*/|&-]=|->|=>|&&|\|\||::|:=|<<|>>|/\*|\*/|^//|^--[A-Za-z][\w-]*|^-[a-z][\w-]*|^-[A-Z]\w*[-=]|\w=|=\w|^[@#%$]\w*[A-Za-z]\w*|;\w|[<>]\d|^[-+]{2}\w",
    "hash": r"^(?=\w*\d)(?=\w*[a-f])[0-9a-f]{7,}$|^\d{16,}$|^(?=\S*\d)(?=\S*[A-Za-z])[\w+/=-]{24,}$|\S{45,}|(?:\d+[A-Za-z]+){3,}",
}
_WORD_PATTERNS = [(_CODE_OF[reason], re.compile(rule)) for reason, rule in _WORD_RULES.items()]
_ANY_WORD_RULE = re.compile("|".join(_WORD_RULES.values()))

# (a sign without which the pattern cannot match, reason, pattern); all bounded, so that a stray opener costs little.
_STRETCHES = [
    ("```", "code", re.compile(r"^[ \t]*```.*?(?:^[ \t]*```|\Z)", re.M | re.S)),
    ("~~~", "code", re.compile(r"^[ \t]*~~~.*?(?:^[ \t]*~~~|\Z)", re.M | re.S)),
    ("`", "code", re.compile(r"(`{1,2})[^`'\n]{1,100}\1")),
    ("$$", "formula", re.compile(r"\$\$.{1,2000}?\$\$", re.S)),
    ("$", "formula", re.compile(r"\$(?=[^$\n]*[\\^_={])[^$\n]{1,200}\$|\$[A-Za-z]\$")),
    ("\\[", "formula", re.compile(r"\\\[.{1,2000}?\\\]", re.S)),
    ("\\begin", "formula", re.compile(r"\\begin\{(\w+\*?)\}.{0,4000}?\\end\{\1\}", re.S)),
    ("</", "markup", re.compile(r"<(script|style|pre|code)\b.{0,4000}?</\1>", re.S | re.I)),
    ("<!--", "markup", re.compile(r"<!--.{0,2000}?-->", re.S)),
    ("<", "markup", re.compile(r"<[/!?]?[A-Za-z][^<>\n]{0,300}>")),
]
_LINE_RULE = re.compile(
    r"(?P<table>\s*\|.*\||[^|]*\s\|\s[^|]*\s\|\s|\s*\+[-=]{2,}[-=+]*\s*$|\s*[=-]{2,}(?:\s+[=-]{2,})+\s*$|.*\.{4,}\s*\w+\s*$|.*(?:\.\s){4,})"
    r"|(?P<markup>[A-Z][a-z]+(?:-[A-Z][A-Za-z]+)+:\s)"  # a header of a mail or a package
    r"|(?P<code>\s*(?:>>>|\.\.\.)(?:\s|$)|\s*\$\s[a-z]|#!|\s*#\s*(?:include|define|ifn?def|endif)\b|\s*(?:def|class)\s\w+.*:\s*$"
    r"|\s*(?:import\s[\w.]+\s*$|from\s[\w.]+\simport\s)|.*[{]\s*$|\s*\}|\s*(?:elif|else|try|except|finally)\b.*:\s*$"
    r"|\s*(?:if|for|while|with)\s.*\):\s*$|\s*return\s[\w.]+$|\s*\.\.\s[\w-]+::)"
)
_COLUMNS = re.compile(r"\s*\S.*?(?:\s{3,}|\t)\S.*?(?:\s{3,}|\t)\S")
_MARK = re.compile(r"[^\w\s]")


def unspeakable_words(words: Sequence[str], languages: Sequence[str] = ("en", "zh")) -> list[str]:
    """For each word of `interleave.split_words` why it cannot be spoken, one of `REASONS`; "" when it can.

    `languages`: what the text-to-token model speaks; letters of other scripts are unspeakable. Raises ValueError for a
    language whose script is not known here.
    """
    if not words:
        return []
    reason_W = np.array([_word_reason(word.strip(), tuple(languages)) for word in words], dtype=np.int8)
    text = "".join(words)
    if language_of(text, languages) not in LANGUAGES:
        written_W = np.array([needs_verbalising(word) for word in words])
        reason_W[written_W & (reason_W == 0)] = _CODE_OF["number"]
    end_W = np.cumsum([len(word) for word in words])
    start_W = end_W - [len(word.lstrip()) for word in words]
    _mark_stretches(text, start_W, end_W, reason_W)
    _mark_lines(text, start_W, reason_W)
    _mark_operands(words, reason_W)
    return [REASONS[i] for i in reason_W.tolist()]


def language_of(text: str, languages: Sequence[str]) -> str:
    """Of `languages` the first that is written in the script of most letters of `text`; the first when none is.

    The beginning of the text decides.
    """
    scripts = Counter(_script(letter) for letter in text[:1000] if letter.isalpha())
    counts = [sum(scripts[script] for script in scripts_of(language)) for language in languages]
    return languages[int(np.argmax(counts))]


def scripts_of(language: str) -> tuple[str, ...]:
    """The scripts that a language is written in, as Unicode names begin."""
    if language not in _SCRIPTS:
        raise ValueError(
            f"language={language!r} has no known script; known are {', '.join(sorted(_SCRIPTS))}; add it to speakable._SCRIPTS"
        )
    return _SCRIPTS[language]


def _word_reason(word: str, languages: tuple[str, ...]) -> int:
    """What is wrong with a word, seen alone, as an index into `REASONS`."""
    if len(word) > LONG_WORD:  # no two are the same: kept, they would only fill the memory
        return _CODE_OF["url" if "://" in word else "hash"]
    return _short_word_reason(word, languages)


@functools.lru_cache(maxsize=1 << 17)
def _short_word_reason(word: str, languages: tuple[str, ...]) -> int:
    scripts = {script for language in languages for script in scripts_of(language)}
    if _PLAIN.fullmatch(word):
        return 0 if "LATIN" in scripts else _CODE_OF["script"]
    if word == "&":
        return 0
    if not any(letter.isalnum() for letter in word):
        return _CODE_OF["formula" if word in _RELATIONS else "code" if _OPERATOR.fullmatch(word) else "sign"]
    core = word.strip(_AROUND)
    if _ANY_WORD_RULE.search(core) or _ANY_WORD_RULE.search(word):
        return next(code for code, rule in _WORD_PATTERNS if rule.search(core) or rule.search(word))
    foreign = any(letter.isalpha() and _script(letter) not in scripts | _NO_SCRIPT for letter in word)
    return _CODE_OF["script"] if foreign else 0


@functools.lru_cache(maxsize=1 << 16)
def _script(letter: str) -> str:
    return unicodedata.name(letter, "").split(" ")[0]


def _mark_stretches(text: str, start_W: np.ndarray, end_W: np.ndarray, reason_W: np.ndarray) -> None:
    """Give every word that touches a stretch the stretch's reason, unless it is known better than as code."""
    for reason, start, end in _stretches(text):
        words = slice(np.searchsorted(end_W, start, "right"), np.searchsorted(start_W, end, "left"))
        reason_W[words][reason_W[words] <= _CODE_OF["code"]] = _CODE_OF[reason]


def _stretches(text: str) -> Iterator[tuple[str, int, int]]:
    for sign, reason, pattern in _STRETCHES:
        if sign in text:
            for match in pattern.finditer(text):
                yield reason, match.start(), match.end()


def _mark_lines(text: str, start_W: np.ndarray, reason_W: np.ndarray) -> None:
    """Lines of tables, code and signs; then lines and indented blocks that are mostly unspeakable."""
    lines = text.split("\n")
    line_starts = np.cumsum([0] + [len(line) + 1 for line in lines[:-1]])
    line_W = np.searchsorted(line_starts, start_W, "right") - 1
    reason_L = np.array([_line_reason(line[:LINE_START]) for line in lines], dtype=np.int8)
    columns_L = np.array([_COLUMNS.match(line[:LINE_START]) is not None for line in lines])
    beside_L = np.zeros(len(lines), dtype=bool)
    beside_L[1:] |= columns_L[:-1]
    beside_L[:-1] |= columns_L[1:]
    reason_L[columns_L & beside_L] = _CODE_OF["table"]
    reason_W[:] = np.where(reason_W == 0, reason_L[line_W], reason_W)

    block_L, indented_L = _blocks(lines)
    _spread(reason_W, line_W, least=0.5, allowed_W=np.ones(len(line_W), dtype=bool))
    _spread(reason_W, block_L[line_W], least=0.25, allowed_W=indented_L[line_W])


def _line_reason(line: str) -> int:
    found = _LINE_RULE.match(line)
    if found:
        return _CODE_OF[found.lastgroup or ""]
    signs = len(_MARK.findall(line))
    return _CODE_OF["sign"] if signs >= 6 and 2 * signs > len(line) - line.count(" ") else 0


def _blocks(lines: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """`block_L`: number of the run of equally (un)indented lines; `indented_L`: by four spaces or a tab."""
    indented_L = np.array([line.startswith(("    ", "\t")) for line in lines])
    blank_L = np.array([not line or line.isspace() for line in lines])
    new_L = np.ones(len(lines), dtype=bool)
    new_L[1:] = (indented_L[1:] != indented_L[:-1]) | blank_L[1:]
    return np.cumsum(new_L), indented_L


def _spread(reason_W: np.ndarray, group_W: np.ndarray, *, least: float, allowed_W: np.ndarray) -> None:
    """Groups of words (lines, blocks) of which a share of `least` cannot be spoken: all of them get the commonest reason.

    Signs do not count on either side, and words of another script or with numbers do not make their neighbours unreadable.
    """
    telling_W = ~np.isin(reason_W, [_CODE_OF[reason] for reason in ("", "sign", "script", "number")])
    size = group_W.max() + 1
    counts_GR = np.bincount((group_W * len(REASONS) + reason_W)[telling_W], minlength=size * len(REASONS)).reshape(
        size, len(REASONS)
    )
    read_G = np.bincount(group_W[reason_W != _CODE_OF["sign"]], minlength=size)
    lost_G = (counts_GR.sum(1) > 0) & (counts_GR.sum(1) >= least * read_G)
    hit_W = lost_G[group_W] & allowed_W & (reason_W == 0)
    reason_W[hit_W] = counts_GR.argmax(1)[group_W][hit_W]


def _mark_operands(words: Sequence[str], reason_W: np.ndarray) -> None:
    """Single letters and numbers beside a formula belong to it: "E = 5"."""
    for i in np.flatnonzero(reason_W == _CODE_OF["formula"]).tolist():
        for j in (i - 1, i + 1):
            if 0 <= j < len(words) and reason_W[j] == 0:
                core = words[j].strip().strip(_AROUND)
                if len(core) == 1 or core.replace(".", "").isdigit():
                    reason_W[j] = _CODE_OF["formula"]
