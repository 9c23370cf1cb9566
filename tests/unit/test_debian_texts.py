"""The Bible and the fortunes as documents that the readers of texts take."""

from pathlib import Path

import pytest

from speechquilt.data.sources.debian_texts import bible_chapters, fortunes, write_texts
from speechquilt.data.sources.text_files import read_texts
from speechquilt.types import TextDocument

TEXTS = Path(__file__).parents[2] / ".cache" / "texts"
SAYINGS = """A halted retreat is nerve-wracking
and dangerous to all  who retreat.
\t\t-- I Ching, a book -- of changes
%
Too short.
%
+-----------+ 1001 1010 0110 1010 0110 |____| /\\/\\/\\
%
The last of the sayings in this file has no sign behind it, and no author.
"""


def test_verses_become_chapters(tmp_path: Path) -> None:
    (tmp_path / "verses").write_text("Ge1:1 In the beginning.\nGe1:2 And the earth.\nGe2:1 Thus.\n1Sm1:1 Now.\n")
    assert list(bible_chapters(tmp_path)) == [
        TextDocument(id="bible/Ge1", text="In the beginning. And the earth."),
        TextDocument(id="bible/Ge2", text="Thus."),
        TextDocument(id="bible/1Sm1", text="Now."),
    ]
    (tmp_path / "verses").write_text("Ge1:1 In the beginning.\n  2 And the earth\n")
    with pytest.raises(ValueError, match="line 2 is no verse: '  2 And the earth'"):
        list(bible_chapters(tmp_path))


def test_sayings_are_prose_without_authors(tmp_path: Path) -> None:
    (tmp_path / "wisdom").write_text(SAYINGS)
    (tmp_path / "wisdom.dat").touch()
    (tmp_path / "copyright").write_text("Free to use, and much longer than forty characters of plain text.")
    assert [(d.id, d.text) for d in fortunes(tmp_path)] == [
        ("fortunes/wisdom/0", "A halted retreat is nerve-wracking and dangerous to all who retreat."),
        ("fortunes/wisdom/3", "The last of the sayings in this file has no sign behind it, and no author."),
    ]


def test_written_texts_are_read_back(tmp_path: Path) -> None:
    documents = [TextDocument(id=f"a/{n}", text=text) for n, text in enumerate(("one", "two «naïve» lines"))]
    assert write_texts(documents, tmp_path / "new" / "texts.jsonl") == 2
    assert [(d.id, d.text) for d in read_texts(str(tmp_path / "new")) if isinstance(d, TextDocument)] == [
        (d.id, d.text) for d in documents
    ]


def test_what_is_missing_names_the_remedy(tmp_path: Path) -> None:
    for read in (bible_chapters, fortunes):
        with pytest.raises(FileNotFoundError, match="make texts"):
            list(read(tmp_path))


@pytest.mark.skipif(not (TEXTS / "bible").is_dir(), reason="the texts are not here; run `make texts`")
def test_the_real_files() -> None:
    chapters = list(bible_chapters(TEXTS / "bible"))
    assert len(chapters) == 1189  # of the King James version
    assert chapters[0].text.startswith("In the beginning God created the heaven and the earth.")
    assert len(list(fortunes(TEXTS / "fortunes"))) > 10_000
