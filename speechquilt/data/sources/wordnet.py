"""WordNet's database files as plain English: example sentences, short enough to be spoken, and definitions.

A line of `data.noun` and its like ends in a gloss: a definition, then examples in double quotes.
Trap: examples carry their author behind the quote, or inside it behind a dash, and the same sentence stands under
several words; neither may reach a corpus that is split by sentence.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from speechquilt.text import spoken_form
from speechquilt.types import TextDocument

FILES = ("data.noun", "data.verb", "data.adj", "data.adv")
SHORTEST, LONGEST = 25, 110  # characters of an example that is worth speaking
_EXAMPLE = re.compile(r'"([^"]*)"')
_CLEAN = re.compile(r"[A-Za-z][A-Za-z ,.;:!?'-]*[A-Za-z.!?]")
_AUTHOR = re.compile(r"\s-+\s?[A-Z]|--")
_COMMENT = re.compile(r"  \d")  # the licence at the head of a file is indented and numbered


@dataclass(frozen=True)
class Gloss:
    """What WordNet says about one meaning: `word` is its first name, `id` its place, "data.noun/1740"."""

    id: str
    word: str
    definition: str
    examples: tuple[str, ...]


def read_glosses(folder: Path) -> Iterator[Gloss]:
    """All meanings in the order of the files. `folder` holds data.noun, data.verb, data.adj and data.adv.

    Raises FileNotFoundError when one is missing, ValueError at a line that is no entry.
    """
    for name in FILES:
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; run `make texts`, or give the folder of WordNet's data files")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if _COMMENT.match(line):
                continue
            entry, bar, gloss = line.partition(" | ")
            fields = entry.split(" ")
            if not bar or len(fields) < 5:
                raise ValueError(f"{path} line {number} is no entry of WordNet: {line[:60]!r}; get the file again")
            yield Gloss(
                id=f"{name}/{int(fields[0])}",
                word=fields[4].replace("_", " "),
                definition=gloss.partition('"')[0].strip(" ;"),
                examples=tuple(example.strip() for example in _EXAMPLE.findall(gloss)),
            )


def example_sentences(folder: Path) -> list[str]:
    """Example sentences of 25 to 110 characters in plain letters, each once, in the order of the files, written with a
    capital and a full stop. Raises what `read_glosses` does.
    """
    found: dict[str, str] = {}
    for gloss in read_glosses(folder):
        for example in gloss.examples:
            if SHORTEST <= len(example) <= LONGEST and _CLEAN.fullmatch(example) and not _AUTHOR.search(example):
                found.setdefault(spoken_form(example), _as_sentence(example))
    return list(found.values())


def definitions(folder: Path) -> Iterator[TextDocument]:
    """A sentence for each meaning, "Word: its definition." Raises what `read_glosses` does."""
    for gloss in read_glosses(folder):
        yield TextDocument(id=gloss.id, text=_as_sentence(f"{gloss.word}: {gloss.definition}"))


def _as_sentence(text: str) -> str:
    text = text.rstrip(" ,;:-")
    return text[0].upper() + text[1:] + ("" if text[-1] in ".!?" else ".")
