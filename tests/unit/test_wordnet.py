"""WordNet's files as sentences: what a reader wants is there once, what would spoil a corpus is not."""

from pathlib import Path

import pytest

from speechquilt.data.sources.wordnet import FILES, definitions, example_sentences, read_glosses
from speechquilt.text import spoken_form

HEAD = "  1 This software and database is being provided to you, the LICENSEE  \n"
ENTRY = "{number:08d} 04 n 01 {word} 0 001 @ 00001740 n 0000 | {gloss}  \n"
GLOSSES = {
    "gratitude": 'an expression of thanks; "he expressed his appreciation in a short note"; "a note"',
    "well-being": 'being happy (as a guest); "is everyone\'s happiness a matter of luck?"',
    "again_and_again": 'often; "He  expressed his appreciation, in a short note!"',
    "fame": 'being known; "fame is the thirst of youth"- Byron; "the rest is silence, it is said - W.Shakespeare"',
    "number": 'a count; "there were exactly 144 of them in the room"; "the price (in pounds) was very high"',
    "plain": "only a definition",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in FILES:
        (tmp_path / name).write_text(HEAD)
    entries = [ENTRY.format(number=n, word=w, gloss=g) for n, (w, g) in enumerate(GLOSSES.items(), 1)]
    (tmp_path / "data.noun").write_text(HEAD + "".join(entries))
    return tmp_path


def test_sentences_are_clean_and_said_once(folder: Path) -> None:
    assert example_sentences(folder) == [
        "He expressed his appreciation in a short note.",
        "Is everyone's happiness a matter of luck?",
        "Fame is the thirst of youth.",
    ]


def test_every_meaning_has_a_definition(folder: Path) -> None:
    texts = {document.id: document.text for document in definitions(folder)}
    assert len(texts) == len(GLOSSES)
    assert texts["data.noun/2"] == "Well-being: being happy (as a guest)."
    assert texts["data.noun/3"] == "Again and again: often."
    assert [gloss.word for gloss in read_glosses(folder)][-1] == "plain"


def test_a_damaged_file_is_named(folder: Path) -> None:
    (folder / "data.verb").write_text(HEAD + "half a li")
    with pytest.raises(ValueError, match=r"data.verb line 2 is no entry of WordNet: 'half a li'"):
        example_sentences(folder)
    (folder / "data.adv").unlink()
    with pytest.raises(FileNotFoundError, match="make texts"):
        list(read_glosses(folder / "elsewhere"))


def test_the_real_files() -> None:
    real = Path(__file__).parents[2] / ".cache" / "texts" / "wordnet"
    if not real.is_dir():
        pytest.skip("WordNet is not here; run `make texts`")
    sentences = example_sentences(real)
    assert 29_000 < len(sentences) < 30_000
    assert len({spoken_form(sentence) for sentence in sentences}) == len(sentences)
    assert all(25 <= len(sentence) <= 111 and sentence[-1] in ".?!" for sentence in sentences)
