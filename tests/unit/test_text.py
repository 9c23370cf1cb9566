"""The text tokenizer takes any script and gives a word the same ids wherever it stands."""

import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speechquilt.text import TextTokenizer, spoken_form

TOKENIZER = TextTokenizer.train(["tom lives in rome. where does tom live? rome."] * 3, 320)


@given(st.text(max_size=40))
def test_any_script_round_trips(text):
    """Surrounding spaces aside: a piece is stripped, and a space is prefixed."""
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text.strip() or "\ufffd" in text


def test_a_word_has_the_same_ids_at_the_start_and_inside():
    assert TOKENIZER.encode("rome") == TOKENIZER.encode("in rome")[-len(TOKENIZER.encode("rome")) :]


def test_save_and_load(tmp_path):
    TOKENIZER.save(tmp_path / "t.json")
    again = TextTokenizer.load(tmp_path / "t.json")
    assert again.encode("tom lives") == TOKENIZER.encode("tom lives")
    assert again.size == TOKENIZER.size
    with pytest.raises(FileNotFoundError, match=r"nothing\.json is missing"):
        TextTokenizer.load(tmp_path / "nothing.json")


@pytest.mark.parametrize(
    ("text", "spoken"),
    [("Where does Tom live?", "where does tom live"), ("  A -- b. ", "a b"), ("don't", "don't"), ("東京。", "東京")],
)
def test_spoken_form(text, spoken):
    assert spoken_form(text) == spoken


@pytest.mark.parametrize(
    ("text", "spoken"),
    [
        ("don\u2019t we\u2019re O\u2019Neill", "don't we're o'neill"),
        ("\u2018Go,\u2019 she said; the dogs\u2019 home", "go she said the dogs home"),
        ("gener\u00adally profi\u00adcient", "generally proficient"),
        ("हिन्दी में", "हिन्दी में"),
        ("x\u0323 ke\u0301t", "x\u0323 k\u00e9t"),
        ("สวัสดีครับ", "สวัสดีครับ"),
        ("I \u2764\ufe0f you", "i you"),
        ("می\u200cخواهم", "میخواهم"),
        ("\u0301 alone", "alone"),
        ("\u0130stanbul", "i\u0307stanbul"),
        ("ﬁne ½", "fine 1 2"),
    ],
)
def test_letters_keep_their_marks_and_words_their_apostrophes(text, spoken):
    assert spoken_form(text) == spoken


@given(st.text(st.characters(max_codepoint=127), max_size=60))
def test_ascii_is_spoken_as_ever(text):
    lower = unicodedata.normalize("NFKC", text).lower()
    assert spoken_form(text) == re.sub(r"\s+", " ", re.sub(r"[^\w\s']", " ", lower)).strip()


@given(st.text(max_size=40))
def test_a_spoken_form_is_its_own(text):
    spoken = spoken_form(text)
    assert spoken == " ".join(spoken.split())
    assert spoken_form(spoken) == spoken
