"""What the language models of the real story read: a dictionary, a book and short pieces, as JSONL by kind.

Trap: the texts that are measured on are held out here, by document, and a document with a sentence that the speech is
measured on is left out altogether: a model that has read it would know how it goes on.
"""

from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from speechquilt.data.feed.splits import place
from speechquilt.data.sources import debian_texts
from speechquilt.data.sources.text_files import read_texts
from speechquilt.data.sources.wordnet import read_glosses
from speechquilt.evals.measures import Measure
from speechquilt.recipes.real.sizes import shrunk
from speechquilt.text import spoken_form
from speechquilt.types import TextDocument

ENTRIES = 5  # of the dictionary in one document
HELD_OUT = 0.1  # share of the documents of each kind
TRAIN, MEASURED = "train", "held_out"  # folders of the stage
MEASURES = (
    Measure(key="texts.<kind>.documents", kind="count", meaning="documents of this kind of text that are trained on"),
    Measure(key="texts.<kind>.words", kind="count", meaning="their words"),
    Measure(key="texts.<kind>.held_out", kind="count", meaning="documents that are measured on"),
    Measure(key="texts.<kind>.left_out", kind="count", meaning="documents left out, since the speech that is measured on says a sentence of theirs"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RealTextsConfig:
    """Which texts are read, and how much of them."""

    folder: str = ".cache/texts"
    """Folder of the texts, as `make texts` leaves them."""
    words: int = 80_000
    """Most words of each kind of text."""

    def __post_init__(self) -> None:
        if self.words < 1:
            raise ValueError(f"words={self.words} must be at least 1, of each kind of text")

    def shrunk(self, scale: float) -> "RealTextsConfig":
        return replace(self, words=shrunk(self.words, scale, 2000))


def write_texts(config: RealTextsConfig, measured: Set[str], folder: Path) -> dict[str, Any]:
    """`folder`/train and `folder`/held_out, a JSONL for each kind; `measured`: spoken forms of sentences that no text may hold.

    Which documents are kept is drawn by their names, so that a limit does not mean "those at the beginning of the book".
    """
    results: dict[str, Any] = {}
    for kind in KINDS:
        found = sorted(_READERS[kind](Path(config.folder)), key=lambda document: place(document.id))
        left_out: list[str] = []
        held_out = (document for document in found if place(document.id) < HELD_OUT)
        train = (document for document in found if place(document.id) >= HELD_OUT)
        measured_on = list(_limited(_silent_on(measured, held_out, left_out), max(1, round(config.words * HELD_OUT))))
        read = list(_limited(_silent_on(measured, train, left_out), config.words))
        debian_texts.write_texts(read, folder / TRAIN / f"{kind}.jsonl")
        debian_texts.write_texts(measured_on, folder / MEASURED / f"{kind}.jsonl")
        counts = {"documents": len(read), "held_out": len(measured_on), "left_out": len(left_out)}
        counts["words"] = sum(len(document.text.split()) for document in read)
        results |= {f"texts.{kind}.{key}": n for key, n in counts.items()}
    return results


def measured_texts(folder: Path, kind: str) -> list[TextDocument]:
    """The documents of a kind that were held out, by what `write_texts` has made."""
    return [read for read in read_texts(str(folder / MEASURED / f"{kind}.jsonl")) if isinstance(read, TextDocument)]


def _silent_on(sentences: Set[str], documents: Iterable[TextDocument], left_out: list[str]) -> Iterator[TextDocument]:
    """The documents that hold none of the sentences; ids of the others are added to `left_out`."""
    for document in documents:
        form = f" {spoken_form(document.text)} "
        if any(f" {sentence} " in form for sentence in sentences):
            left_out.append(document.id)
        else:
            yield document


def _limited(documents: Iterable[TextDocument], words: int) -> Iterator[TextDocument]:
    """From the first until there are so many words; the one that passes the limit is the last."""
    for document in documents:
        if words <= 0:
            return
        words -= len(document.text.split())
        yield document


def _dictionary(folder: Path) -> Iterator[TextDocument]:
    """Entries of WordNet with their examples, some to a document, so that it is long enough to be interleaved."""
    entries: list[tuple[str, str]] = []
    for gloss in read_glosses(folder / "wordnet"):
        examples = " ".join(f'"{example}"' for example in gloss.examples)
        entries.append((gloss.id, f"{gloss.word}: {gloss.definition}. {examples}".strip()))
        if len(entries) == ENTRIES:
            yield TextDocument(id=entries[0][0], text="\n".join(text for _, text in entries))
            entries = []


_READERS = {
    "wordnet": _dictionary,
    "bible": lambda folder: debian_texts.bible_chapters(folder / "bible"),
    "fortunes": lambda folder: debian_texts.fortunes(folder / "fortunes"),
}
KINDS = tuple(_READERS)
