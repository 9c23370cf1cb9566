"""The text tokenizer takes any script and gives a word the same ids wherever it stands."""

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
