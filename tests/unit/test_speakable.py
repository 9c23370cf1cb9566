"""What can be spoken, and in which words."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechquilt.data.interleaving.speakable import REASONS, _short_word_reason, language_of, unspeakable_words
from speechquilt.data.interleaving.synthetic import split_words
from speechquilt.data.interleaving.verbalise import needs_verbalising, verbalise

# Written and spoken, as the grammars give it. Not all of it is what a careful reader would say: see the last rows.
SPOKEN = [
    ("Jan. 5th", "the fifth of january"),
    ("June 29, 2007", "the twenty ninth of june, two thousand seven"),
    ("2024-01-15", "the fifteenth of january twenty twenty four"),
    ("in 1999", "in nineteen ninety nine"),
    ("the 1990s", "the nineteen nineties"),
    ("1995-1999", "nineteen ninety five to nineteen ninety nine"),
    ("at 7:30 p.m.", "at seven thirty PM"),
    ("10:00", "ten o'clock"),
    ("$1,000,000", "one million dollars"),
    ("$1.5 million", "one point five million dollars"),
    ("€20", "twenty euros"),
    ("$ 100", "one hundred dollars"),
    ("10%", "ten percent"),
    ("5 kg of flour", "five kilograms of flour"),
    ("120 km/h", "one hundred and twenty kilometers per hour"),
    ("20°C", "twenty degrees Celsius"),
    ("10 km²", "ten kilometers squared"),
    ("the 3rd and 21st", "the third and twenty first"),
    ("a 21st-century idea", "a twenty first century idea"),
    ("½ cup", "one half cup"),
    ("3/4", "three quarters"),
    ("-5 degrees", "negative five degrees"),
    ("pp. 5-10", "pp. five to ten"),
    ("#7", "number seven"),
    ("~100", "about one hundred"),
    ("A & B", "A and B"),
    ("Dr. Smith, e.g. here", "doctor Smith, for example here"),
    ("Mr. and Mrs. Jones", "Mister and Misses Jones"),
    ("the U.S. army", "the US army"),
    ("(555) 123-4567", "five five five, one two three, four five six seven"),
    ("version 2.13.0", "version two point thirteen point zero"),
    ("§ 4 [1]", "section four one"),
    ("GPT-4 and H2O", "GPT-four and H two O"),
    ("World War II", "World War two"),
    (
        "© 2007 Free Software Foundation, Inc. and",
        "copyright two thousand seven Free Software Foundation, Incorporated and",
    ),
    ("**5 apples**", "five apples"),
    ("a **bold** `call`, here", "a bold call, here"),
    ("It costs $3.50.", "It costs three dollars and fifty cents."),
    ("it cost $1,234.56", "it cost one thousand two hundred thirty four dollars and fifty six cents"),
    ("£13.60 or £1.01", "thirteen pounds and sixty pence or one pound and one penny"),
    ("$0.99, €1,000", "ninety nine cents, one thousand euros"),
    ("$12,000,019.00", "twelve million nineteen dollars"),
    ("$1.25 million", "one point two five million dollars"),
    ("the No. 5 bus, nos. 6 and 7", "the number five bus, numbers six and seven"),
    ("No. I said no. 5", "No. I said number five"),
    ("R&amp;D said it&#39;s caf&eacute;", "R and D said it's café"),
    ("the \x1b[1;31mred\x1b[0m house\x07", "the red house"),
    ("gener\u00adally 5", "generally five"),
    # what the library gets wrong, or leaves
    ("on May 5, 2012", "on May five, twenty twelve"),
    ("on May 5th", "on May fifth"),
    ("5 m", "five minutes"),
    ("Henry VIII", "Henry VIII"),
    ("555-1234", "five hundred and fifty five to one thousand two hundred and thirty four"),
    ("100,000,000,000", "one hundred and billion"),
]
SPOKEN_ZH = [
    ("我有3个苹果，2024年1月15日。", "我有三个苹果，二零二四年一月十五日。"),
    ("价格是¥100", "价格是一百元"),
    ("占10%", "占百分之十"),
    ("5kg", "五千克"),
]


@pytest.mark.parametrize(("written", "spoken"), SPOKEN)
def test_written_english_becomes_words(written, spoken):
    assert verbalise(written) == spoken


@pytest.mark.parametrize(("written", "spoken"), SPOKEN_ZH)
def test_written_chinese_becomes_words(written, spoken):
    assert verbalise(written, "zh") == spoken


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="abcXYZ éßü\n.,;:!?'’“”\"()-–—…中文。，", max_size=60))
def test_text_that_is_read_as_it_is_written_stays(text):
    assert verbalise(text) == text


WRITTEN = [
    "5",
    "1st",
    "#7",
    "$",
    "10²",
    "3×",
    "[1]",
    "+1",
    "🙂",
    "%",
    "km/h",
    "½",
    "a_b",
    "100$",
    "\u00a0",
    "é5",
    "5é",
    "@",
    "^",
]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(WRITTEN), max_size=8))
def test_nothing_breaks_it_and_no_digit_of_a_known_form_stays(pieces):
    text = " ".join(pieces)
    spoken = verbalise(text)
    assert not any(sign.isdigit() and sign.isascii() for sign in spoken), (text, spoken)


def test_a_language_without_grammars_is_left_as_it_is():
    assert verbalise("am 5. Mai", "de") == "am 5. Mai"
    assert unspeakable_words(split_words("am 5. Mai 10%"), ("de",)) == ["", "number", "", "number"]


def test_without_the_library_plain_text_works_and_a_number_names_the_extra():
    code = (
        "import sys; sys.modules['wetext'] = None\n"
        "from speechquilt.data.interleaving.verbalise import verbalise\n"
        "assert verbalise('Plain, e.g. \"this\".') == 'Plain, for example \"this\".'\n"
        "verbalise('5 apples')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError" in done.stderr
    assert "speechquilt[speaking]" in done.stderr


# (text, reasons of its words, "." for a word that can be spoken)
TEXTS = [
    ("He said: “Don’t (really) go—now!” and left in 1999, for $5.", ". . . . . . . . . . ."),
    ("Dr. O'Brien-Smith's 3rd item(s), AT&T and/or GitHub's e.g. U.S.A. 24/7", ". . . . . . . . . ."),
    ("state-of-the-art LaTeX at 7:30 p.m. & 10% (5 kg)", ". . . . . . . . ."),
    ("you see https://a.org/x?y=1 or www.b.de, or then example.com.", ". . url . url . . url"),
    ("mail <a.b@c.org> now", ". e-mail ."),
    ("read /etc/passwd and ~/x and src/main/a.c and README.md there", ". path . path . path . path ."),
    ("the max_len and getValue and os.path and f(x) and foo() here", ". code . code . code . code . code ."),
    ("if a != b then x += y here and there we", ". . code . . . code . . . . ."),
    ("run it with --verbose or -v on it", ". . . code . code . ."),
    ("so $E = mc^2$ is known and \\frac{1}{2} too we say", ". formula formula formula . . . formula . . ."),
    ("here x = 5 holds for every one", ". formula formula formula . . . ."),
    ("it costs $5 and $6 in all", ". . . . . . ."),
    ("commit 3f786850e387550fdab836ed7e6dc881de23001b of the tree", ". hash . . ."),
    ("a <b>bold</b> word and &amp; so on, <br/> here", ". markup . . markup . . markup ."),
    ("we read привет and 世界 and λόγος here too", ". . script . . . . script . ."),
    ("so then call `pip install it` now please", ". . . code code code . ."),
    ("one ======= two — three * four", ". sign . sign . sign ."),
    ("He wrote:\n```\nsome words\n```\nand left", ". . sign code code sign . ."),
    ("It is so:\n\n>>> print words\nfour\n\nand so on", ". . . code code code . . . ."),
    (
        "Sizes:\n| a | b |\n|---|---|\n| big one | 2 |\nand so on",
        ". " + "sign table sign table sign sign sign table table sign table sign . . .",
    ),
    ("Name    Size    Age\ntom     big     ten\nso it is", "table table table table table table . . ."),
    ("1. Introduction ....... 5\nIt begins.", "table table sign table . ."),
    ("Content-Type: text\nThen: so it is", "markup markup . . . ."),
    ("Words:\n\n    for i in range(3):\n        do it now\n\nand so on", ". " + "code " * 7 + ". . ."),
    ("Words:\n\n    This is quoted prose, set in\n    by four spaces.\n\nand so on", ". " + ". " * 9 + ". . ."),
]


@pytest.mark.parametrize(("text", "expected"), TEXTS)
def test_reasons(text, expected):
    words = split_words(text)
    found = unspeakable_words(words)
    assert [reason or "." for reason in found] == expected.split(), list(zip(words, found))


def test_plain_documents_have_no_reason_at_all():
    text = 'Tom went to the beach. He found a shell there, and a boat! Did Kate see it? "Yes," she said.\n\n' * 3
    assert set(unspeakable_words(split_words(text))) == {""}
    assert set(unspeakable_words(split_words("你好，世界。他说好的。"))) == {""}


def test_languages_decide_which_scripts_are_read():
    words = split_words("word слово 字")
    assert unspeakable_words(words, ("en",)) == ["", "script", "script"]
    assert unspeakable_words(words, ("en", "ru", "zh")) == ["", "", ""]
    assert unspeakable_words(words, ("zh",)) == ["script", "script", ""]
    assert language_of("这是一个 word 中文", ("en", "zh")) == "zh"
    assert language_of("a word 中", ("en", "zh")) == "en"
    assert language_of("123", ("en", "zh")) == "en"
    with pytest.raises(ValueError, match="language='xx'"):
        unspeakable_words(words, ("xx",))


PIECES = [
    "a",
    "word",
    "x_y",
    "`b",
    "c`",
    "$",
    "$$",
    "\\[",
    "<b",
    ">",
    "```",
    "|",
    "===",
    "#",
    "5",
    "世",
    "¿",
    "λ",
    "=",
    "\n",
    "\n    ",
    "\n\n",
    "\t",
]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=40).map(" ".join))
def test_every_word_has_one_known_reason(text):
    words = split_words(text)
    found = unspeakable_words(words)
    assert len(found) == len(words)
    assert set(found) <= set(REASONS)
    for word, reason in zip(words, found):
        assert reason or any(sign.isalnum() for sign in word) or word.strip() == "&"


def test_what_needs_words():
    assert not needs_verbalising("Plain words, (here) too.")
    assert all(needs_verbalising(text) for text in ("5", "a & b", "Dr. X", "e.g. this", "½"))


@pytest.mark.parametrize(
    ("monster", "reason"),
    [
        ("a" * 300_000, "hash"),
        ("http://" + "a/" * 100_000, "url"),
        ("$" * 200_000, "hash"),
        ("x" + " " * 300_000 + "y", ""),
        ("`a " * 100_000, "code"),
        ("<a " * 100_000 + ">", ""),
    ],
)
def test_monsters_are_judged_too(monster, reason):
    """Rules that look at everything from everywhere would not come back from these."""
    words = split_words(f"here comes {monster} and so on it goes and on")
    found = unspeakable_words(words)
    assert len(found) == len(words)
    assert found[2] == reason


def test_long_words_are_not_kept_in_memory():
    """Base64 by the megabyte, no two alike, in the cache of words would be a corpus in memory."""
    _short_word_reason.cache_clear()
    assert set(unspeakable_words([f"{i}{'A' * 1000}" for i in range(100)])) == {"hash"}
    assert _short_word_reason.cache_info().currsize == 0
