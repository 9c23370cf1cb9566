"""Packing: documents of the mixture -> rows of whole documents -> `types.Batch`, the end of the data pipeline.

Each document is laid out, then patched, then packed into a row with others.
Trap: every rank builds every row of the global batch and keeps its own share; that is what makes any number of ranks
see what one sees, with one state for all. A row is full by *units* or by *tokens*, whichever comes first.
"""

import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from speechquilt.config import fingerprint
from speechquilt.data.feed.mixture import Exhausted, Mixture, Sample
from speechquilt.data.feed.parts import Part, parts_of
from speechquilt.protocols import Patcher
from speechquilt.types import IGNORE, Batch, Document, LaidOut
from speechquilt.vocab import Vocab

FIRST_SHARE = 0.8  # of a batch's units goes to the oldest documents; the rest is chosen for fit
WORTH_A_MOVE = 1e-3  # share of a row that a change of its documents must fill, units and tokens added up
PADDING_UNITS = 2  # what padding adds to a row with patches, see `PackedLoader`


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """The size of a batch: rows of whole documents, each full when it has no room for more units or for more tokens.

    A unit is what the global transformer makes one step over: a patch of speech, or any single token that is in no
    patch.
    """

    rows: int
    """Rows of the global batch, over all ranks; a multiple of the number of ranks."""
    units_per_row: int
    """Most units (speech patches, text tokens, special tokens) in a row; at least 4. Longer documents are cut."""
    tokens_per_row: int
    """Most tokens in a row, those inside patches included; at least 4. Longer documents are cut."""
    buffer: int = 128
    """Documents held beside those that fill a batch, to choose from for the ends of rows; more leave less padding."""
    round_tokens_to: int = 32
    """A batch is padded to a multiple of this many tokens: the larger, the fewer different shapes and the more padding.
    The value of tokens_per_row makes all batches alike.
    """

    def __post_init__(self) -> None:
        for key, least in (
            ("rows", 1),
            ("units_per_row", 4),
            ("tokens_per_row", 4),
            ("buffer", 0),
            ("round_tokens_to", 1),
        ):
            if getattr(self, key) < least:
                raise ValueError(f"{key}={getattr(self, key)} must be at least {least}")

    def build(
        self,
        mixture: Mixture,
        vocab: Vocab,
        patcher: Patcher | None,
        *,
        seed: int,
        total_batches: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> "PackedLoader":
        return PackedLoader(mixture, vocab, patcher, self, seed, total_batches, rank, world_size)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Item:
    """One part of a patched document, ready for a row. `drawn_in`: the batch during which it was drawn and patched."""

    sample: Sample
    drawn_in: int
    part: Part

    @property
    def num_tokens(self) -> int:
        return len(self.part.labels_T)

    @property
    def num_units(self) -> int:
        return self.part.num_units

    @property
    def laid_out(self) -> LaidOut:
        return self.part.laid_out


class PackedLoader:
    """A `protocols.Loader` of `Batch`es, for ever.

    Without a patcher the batches have no `opens` / `closes` and every token is a unit. With one, each document is patched
    once, when it is drawn: `draw` is a pure function of (seed, sample number), `progress` is the share of `total_batches`
    made by then (at most 1), which moves a curriculum.

    Rows: the oldest documents are spread over the rows of the batch, level in units *and* in tokens (rows are padded to
    the longest); then documents are added and exchanged for others of the buffer until both are nearly full. A document
    longer than a row is split into parts (`parts.parts_of`), which are placed like documents of their own; one with context is
    cut at the end of its row, and left out when no target is left of it.
    Padding is the last document of its row. Its first token is a closed unit, so that every padding position sees one
    (no empty attention); all its other tokens are one open unit, so that padding adds two units whatever its length.

    `meta` of a batch, for this rank's rows: `tokens`, `speech_tokens`, `units`, `speech_units` (patches), `unit_slots`
    (`units_per_row` of every row), `targets`, `documents` (per source), `epochs` (per source: share of its documents that are
    here, so that sums over batches and ranks say how often it was trained on), `document_ids` (per row). A document counts where its
    first part is: `split_documents` have more, `parts` here are others than the first. `cut_documents` have lost `cut_tokens` at
    the end of their row; `dropped_documents` were left out while the batch was made (each counts on one rank). For the global batch: `waste` (share of `units_per_row` without a unit) and `max_units` (most units in a row,
    padding included), equal on all ranks. So are T, `num_units` and `num_local` (both None without a patcher).
    A source that leaves a mixture with `max_epochs` is named in a warning of rank 0. When all have left, batches are made
    while the buffer can fill one; then `next_batch` raises mixture.Exhausted, and less than a batch stays unused.
    Raises ValueError when `rows` cannot be divided by `world_size`.
    """

    def __init__(
        self,
        mixture: Mixture,
        vocab: Vocab,
        patcher: Patcher | None,
        config: PackConfig,
        seed: int,
        total_batches: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if config.rows % world_size:
            raise ValueError(f"rows={config.rows} cannot be divided over {world_size} ranks; make it a multiple")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} must be between 0 and {world_size - 1}")
        if total_batches < 1:
            raise ValueError(f"total_batches={total_batches} must be at least 1")
        self.mixture, self.vocab, self.patcher, self.config = mixture, vocab, patcher, config
        self.seed, self.total_batches, self.rank, self.world_size = seed, total_batches, rank, world_size
        self.num_batches = 0
        self._buffer: list[_Item] = []
        self._dropped: list[int] = []  # samples that were left out for this batch

    def next_batch(self) -> Batch:
        gone = self.mixture.left
        self._dropped = []
        rows = self._pack_rows()
        self._report_left([name for name in self.mixture.left if name not in gone])
        self.num_batches += 1
        return self._collate(rows, self._rounded(max(sum(item.num_tokens for item in row) for row in rows)))

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON data, the same on every rank. Buffered parts are kept as their place in the stream."""
        return {
            "made_for": self._made_for(),
            "mixture": self.mixture.state_dict(),
            "num_batches": self.num_batches,
            "buffer": [
                {**asdict(item.sample), "drawn_in": item.drawn_in, "part": item.part.number} for item in self._buffer
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the batch at which the state was saved, bit for bit; the number of ranks may have changed.

        Raises ValueError when the state belongs to another packing, seed or mixture.
        """
        if state["made_for"] != self._made_for():
            raise ValueError(
                f"the loader's state was saved with {state['made_for']}, this run has {self._made_for()}; "
                "resume with the same values, or start a new run"
            )
        self.mixture.load_state_dict(state["mixture"])
        self.num_batches = state["num_batches"]
        self._buffer = []
        items: list[_Item] = []  # of the document before
        for entry in state["buffer"]:
            sample = Sample(**{key: entry[key] for key in ("number", "source", "index", "epoch")})
            if not items or items[0].sample != sample:
                items = self._prepare(sample, self.mixture.document(sample), entry["drawn_in"])
            self._buffer.append(items[entry.get("part", 0)])  # states from before there were parts have none

    def _made_for(self) -> dict[str, Any]:
        made_for = {"seed": self.seed, "total_batches": self.total_batches, **asdict(self.config)}
        return made_for if self.vocab.opening_marker else {**made_for, "opening_marker": False}

    # --- documents -> items

    def _draw(self) -> bool:
        """Put the next document that is of use into the buffer; False when there is none because every source has left."""
        for _ in range(1 + sum(map(len, self.mixture.sources.values()))):
            if self.mixture.is_exhausted:
                return False
            sample, document = self.mixture.draw()
            if items := self._prepare(sample, document, self.num_batches):
                self._buffer += items
                return True
            self._dropped.append(sample.number)
        raise ValueError(
            f"no document has a target within a row of units_per_row={self.config.units_per_row} and "
            f"tokens_per_row={self.config.tokens_per_row}; raise them, or make shorter documents"
        )

    def _draw_or_end(self) -> None:
        if self._draw():
            return
        try:
            self.mixture.draw()
        except Exhausted as error:
            wanted = f"batch {self.num_batches + 1} of {self.total_batches}"
            raise Exhausted(f"{wanted} cannot be filled: {error}") from error

    def _prepare(self, sample: Sample, document: Document, drawn_in: int) -> list[_Item]:
        """Patch a document, in as many parts as it takes to fit into rows; none when it is of no use."""
        draw = int(fingerprint([self.seed, sample.number]), 16) / 16**12
        progress = min(1.0, drawn_in / self.total_batches)
        parts = parts_of(
            self.vocab.lay_out(document),
            lambda laid_out: self._patch(laid_out, draw, progress),
            self.vocab,
            splits=all(segment.loss for segment in document.segments),
            units_per_row=self.config.units_per_row,
            tokens_per_row=self.config.tokens_per_row,
        )
        return [_Item(sample=sample, drawn_in=drawn_in, part=part) for part in parts]

    def _patch(self, laid_out: LaidOut, draw: float, progress: float) -> tuple[np.ndarray, np.ndarray]:
        if self.patcher is None:
            every_T = np.ones(len(laid_out.ids_T), dtype=bool)
            return every_T, every_T
        return self.patcher(laid_out, draw, progress)

    # --- items -> rows

    def _pack_rows(self) -> list[list[_Item]]:
        """Take the rows of one global batch out of the buffer; what is left stays in stream order."""
        first = self._refill()
        sizes_N2 = np.array([(item.num_units, item.num_tokens) for item in self._buffer])
        placed = _place(sizes_N2, first, self.config)
        rows = [[self._buffer[n] for n in sorted(row)] for row in placed]
        gone = {n for row in placed for n in row}
        self._buffer = [item for n, item in enumerate(self._buffer) if n not in gone]
        return rows

    def _refill(self) -> int:
        """Draw until the buffer holds a batch's units and `config.buffer` documents more; returns how many come first."""
        slots = self.config.rows * self.config.units_per_row
        first, whole, units = 1, 0, 0
        while units < slots:
            if whole == len(self._buffer):
                self._draw_or_end()
            units += self._buffer[whole].num_units
            whole += 1
            if units <= FIRST_SHARE * slots:
                first = whole
        while len(self._buffer) < whole + self.config.buffer and self._draw():
            pass
        return first

    def _report_left(self, names: list[str]) -> None:
        for name in names if self.rank == 0 else ():
            warnings.warn(
                f"source {name!r} has given its max_epochs={self.mixture.max_epochs[name]} and leaves the mixture while "
                f"batch {self.num_batches + 1} of {self.total_batches} is packed; the others go on by their weights",
                stacklevel=3,
            )

    # --- rows -> Batch

    def _collate(self, rows: list[list[_Item]], num_tokens: int) -> Batch:
        mine = rows[self.rank :: self.world_size]
        shape = (len(mine), num_tokens)
        ids_BT = np.full(shape, self.vocab.pad, dtype=np.int64)
        labels_BT = np.full(shape, IGNORE, dtype=np.int64)
        doc_BT = np.empty(shape, dtype=np.int64)
        opens_BT, closes_BT = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
        for r, row in enumerate(mine):
            end = sum(item.num_tokens for item in row)
            ids_BT[r, :end] = np.concatenate([item.laid_out.ids_T for item in row])
            labels_BT[r, :end] = np.concatenate([item.part.labels_T for item in row])
            opens_BT[r, :end] = np.concatenate([item.part.opens_T for item in row])
            closes_BT[r, :end] = np.concatenate([item.part.closes_T for item in row])
            doc_BT[r, :end] = np.repeat(np.arange(len(row)), [item.num_tokens for item in row])
            doc_BT[r, end:] = len(row)
            opens_BT[r, end : end + PADDING_UNITS] = True
            closes_BT[r, end : end + 1] = True
        return Batch(
            ids_BT=torch.from_numpy(ids_BT),
            labels_BT=torch.from_numpy(labels_BT),
            doc_BT=torch.from_numpy(doc_BT),
            opens_BT=None if self.patcher is None else torch.from_numpy(opens_BT),
            closes_BT=None if self.patcher is None else torch.from_numpy(closes_BT),
            num_units=None if self.patcher is None else self.config.units_per_row + PADDING_UNITS,
            num_local=None if self.patcher is None else self._num_local(rows),
            meta=self._meta(rows, mine, num_tokens),
        )

    def _num_local(self, rows: list[list[_Item]]) -> int:
        """Most tokens of a row in speech spans, their markers included; rounded, and never zero."""
        marker = self.vocab.marker("speech")
        return self._rounded(
            max(sum(int((x.laid_out.is_speech_T | (x.laid_out.ids_T == marker)).sum()) for x in row) for row in rows)
        )

    def _rounded(self, num_tokens: int) -> int:
        step = self.config.round_tokens_to
        return max(1, -(-num_tokens // step)) * step

    def _meta(self, rows: list[list[_Item]], mine: list[list[_Item]], num_tokens: int) -> dict[str, Any]:
        items = [item for row in mine for item in row]
        first = [item for item in items if item.part.number == 0]
        documents = Counter(item.sample.source for item in first)
        units_R = [sum(item.num_units for item in row) for row in rows]
        tokens_R = [sum(item.num_tokens for item in row) for row in rows]
        padding_units = [
            min(PADDING_UNITS, num_tokens - n) if self.patcher is not None else num_tokens - n for n in tokens_R
        ]
        return {
            "tokens": sum(item.num_tokens for item in items),
            "speech_tokens": sum(int(item.laid_out.is_speech_T.sum()) for item in items),
            "units": sum(item.num_units for item in items),
            "speech_units": sum(int((item.part.opens_T & item.laid_out.is_speech_T).sum()) for item in items),
            "unit_slots": self.config.units_per_row * len(mine),
            "targets": sum(int((item.part.labels_T != IGNORE).sum()) for item in items),
            "split_documents": sum(not item.part.is_last for item in first),
            "parts": len(items) - len(first),
            "cut_documents": sum(item.part.num_cut > 0 for item in items),
            "cut_tokens": sum(item.part.num_cut for item in items),
            "dropped_documents": sum(number % self.world_size == self.rank for number in self._dropped),
            "documents": dict(documents),
            "epochs": {name: documents[name] / len(source) for name, source in self.mixture.sources.items()},
            "document_ids": [[item.laid_out.id for item in row] for row in mine],
            "waste": 1 - sum(units_R) / (self.config.units_per_row * len(rows)),
            "max_units": max(units + padding for units, padding in zip(units_R, padding_units)),
        }


def _place(sizes_N2: np.ndarray, first: int, config: PackConfig) -> list[list[int]]:
    """Which of N buffered documents go into which row. The oldest always goes, so that none waits for ever.

    `sizes_N2`: units and tokens. Rows are filled to the tokens that a row of units holds on average, rounded as T will be,
    or to the oldest document's if it has more; a longer document waits until it is the oldest.
    """
    units, tokens = sizes_N2.sum(0)
    step = config.round_tokens_to
    mean = max(1, round(config.units_per_row * tokens / units / step)) * step  # the documents left make up for rounding
    common = max(min(config.tokens_per_row, mean), int(sizes_N2[0, 1]))
    rows = _Rows(sizes_N2, np.array([config.units_per_row, common]), config.rows)
    rows.spread(first)
    for r in range(config.rows):
        while rows.improve(r):
            pass
        rows.ensure_one(r)
    return rows.documents


class _Rows:
    """R rows being filled with N documents, `limits_2` units and tokens each; document 0 never leaves its row."""

    def __init__(self, sizes_N2: np.ndarray, limits_2: np.ndarray, num_rows: int) -> None:
        self.documents: list[list[int]] = [[] for _ in range(num_rows)]
        self._sizes_N2, self._limits_2 = sizes_N2, limits_2
        self._room_R2 = np.tile(limits_2, (num_rows, 1))
        self._free_N = np.ones(len(sizes_N2), dtype=bool)

    def spread(self, first: int) -> None:
        """Document 0, then the others of the `first` ones, largest first: each into the row that it leaves least full."""
        share_N = (self._sizes_N2[:first] / self._limits_2).max(1)
        for n in [0, *(1 + np.argsort(-share_N[1:], kind="stable")).tolist()]:
            left_R2 = self._room_R2 - self._sizes_N2[n]
            worst_R = np.where((left_R2 >= 0).all(1), (left_R2 / self._limits_2).min(1), -1.0)
            if worst_R.max() >= 0:
                self._put(n, int(np.argmax(worst_R)))

    def improve(self, r: int) -> bool:
        """Add a free document to row r, or put it in the place of one that becomes free, whatever fills most of the row.

        False when nothing fills enough more to be worth it.
        """
        out_O = [n for n in self.documents[r] if n]
        free_F = np.flatnonzero(self._free_N)
        if not len(free_F):
            return False
        room_O2 = self._room_R2[r] + np.concatenate([np.zeros((1, 2), np.int64), self._sizes_N2[out_O]])
        left_OF2 = room_O2[:, None] - self._sizes_N2[free_F]
        empty_OF = np.where((left_OF2 >= 0).all(2), (left_OF2 / self._limits_2).sum(2), np.inf)
        o, f = divmod(int(np.argmin(empty_OF)), len(free_F))
        if empty_OF[o, f] > (self._room_R2[r] / self._limits_2).sum() - WORTH_A_MOVE:
            return False
        if o:
            self._take(out_O[o - 1], r)
        self._put(int(free_F[f]), r)
        return True

    def ensure_one(self, r: int) -> None:
        """The oldest free document in a row that is still empty, though it is longer than rows are filled to."""
        if not self.documents[r]:
            self._put(int(np.argmax(self._free_N)), r)

    def _put(self, n: int, r: int) -> None:
        self.documents[r].append(n)
        self._room_R2[r] -= self._sizes_N2[n]
        self._free_N[n] = False

    def _take(self, n: int, r: int) -> None:
        self.documents[r].remove(n)
        self._room_R2[r] += self._sizes_N2[n]
        self._free_N[n] = True
