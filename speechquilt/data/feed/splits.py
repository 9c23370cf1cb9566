"""Which documents are never trained on: a share of the ids, by their hash, whatever else a source holds.

Trap: one recording is in several sources ("x" as speech, "asr/x" and "tts/x" as pairs) and one text in several passes
("x/pass0", "x/pass1"). They are held out together, or the loss on one would be what was learned from another.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from speechquilt.config import fingerprint
from speechquilt.data.feed.mixture import RedrawnSource, Source
from speechquilt.types import Document

_MADE_OF = re.compile(r"(?:(?:asr|tts)/)?(.*?)(?:/pass\d+)?(?:\+\d+)?")


class Identified(Protocol):
    """A source that can tell its ids without making its documents."""

    def ids(self) -> Sequence[str]: ...


class Part:
    """Some documents of a source, in its order."""

    def __init__(self, source: Source, indices: Sequence[int]) -> None:
        self.source, self.indices = source, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Document:
        return self.source[self.indices[index]]


class RedrawnPart(Part):
    """Some documents of a source that differ by epoch."""

    source: RedrawnSource  # type: ignore[assignment]

    def in_epoch(self, index: int, epoch: int) -> Document:
        return self.source.in_epoch(self.indices[index], epoch)


class Split(NamedTuple):
    """A source in two; the documents held out come in the order of their hashes, so that the first of them are a fixed
    sample."""

    train: Part
    held_out: Part


def split(name: str, source: Source, ids: Sequence[str], share: float) -> Split:
    """The documents of `source`, whose ids are `ids`. Raises ValueError when one of the two parts would be empty."""
    places = [place(id) for id in ids]
    held_out = sorted((i for i, at in enumerate(places) if at < share), key=lambda i: (places[i], i))
    train = [i for i, at in enumerate(places) if at >= share]
    if not held_out or not train:
        raise ValueError(
            f"held_out={share} leaves {len(train)} documents of source {name!r} to train on and {len(held_out)} held out; "
            "both need some, choose another share or leave the source out"
        )
    kind = RedrawnPart if isinstance(source, RedrawnSource) else Part
    return Split(kind(source, train), kind(source, held_out))


def place(id: str) -> float:
    """Between 0 and 1, the same for everything that was made of one recording or text."""
    found = _MADE_OF.fullmatch(id)
    return int(fingerprint(found[1] if found else id), 16) / 16**12
