"""English texts that Debian packages, as documents: the King James Bible by chapters, and the collection of fortunes.

Trap: fortunes hold drawings, tables and verse beside prose; what is not mostly letters is left out, and the lines of a
paragraph become one.
"""

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from speechquilt.files import replacing
from speechquilt.types import TextDocument

SHORTEST = 40  # characters of a fortune
LETTERS = 0.92  # share of a fortune that letters, spaces and plain punctuation must have
_VERSE = re.compile(r"(\d?[A-Za-z]+\d+):\d+ (.*)")
_SOURCE = re.compile(r"\n\s*--\s.*\Z", re.DOTALL)  # who said it
_PLAIN = re.compile(r"[A-Za-z ,.;:!?'\"-]")


def bible_chapters(folder: Path) -> Iterator[TextDocument]:
    """A document for each chapter. `folder` holds `verses`: lines like "Ge1:1 In the beginning ...".

    Raises FileNotFoundError without it, ValueError at a line of another form.
    """
    path = _there(folder / "verses")

    def verses() -> Iterator[tuple[str, str]]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            verse = _VERSE.fullmatch(line)
            if not verse:
                raise ValueError(f"{path} line {number} is no verse: {line[:60]!r}; delete it and run `make texts`")
            yield verse[1], verse[2]

    for chapter, rows in itertools.groupby(verses(), key=lambda verse: verse[0]):
        yield TextDocument(id=f"bible/{chapter}", text=" ".join(text for _, text in rows))


def fortunes(folder: Path) -> Iterator[TextDocument]:
    """A document for each saying of 40 characters or more that is mostly letters, without its author. `folder` holds files of
    sayings with a line "%" between them, each with its index beside it (.dat).

    Raises FileNotFoundError when it holds none.
    """
    indices = sorted(folder.glob("*.dat"))
    if not indices:
        _there(folder / "fortunes.dat")
    for path in (index.with_suffix("") for index in indices):
        for number, saying in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n%\n")):
            text = " ".join(_SOURCE.sub("", saying).split())
            if len(text) >= SHORTEST and len(_PLAIN.findall(text)) >= LETTERS * len(text):
                yield TextDocument(id=f"fortunes/{path.name}/{number}", text=text)


def write_texts(documents: Iterable[TextDocument], path: Path) -> int:
    """The documents as JSON lines {id, text}, which every reader of texts takes; -> how many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"id": d.id, "text": d.text}, ensure_ascii=False).encode() + b"\n" for d in documents]
    with replacing(path) as file:
        file.writelines(lines)
    return len(lines)


def _there(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; run `make texts`, or give the folder that it fills")
    return path
