"""Packing: documents of the mixture -> rows of whole documents -> `types.Batch`, the end of the data pipeline.

Place in the pipeline: mixture -> lay out -> patch -> pack -> the trainer, which sees a `protocols.Loader`.
Trap: every rank builds every row of the global batch and keeps its own share; that is what makes any number of ranks see
what one sees, with one state for all. A row is full by *units* or by *tokens*, whichever comes first.
"""

from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from speechquilt.config import fingerprint
from speechquilt.data.mixture import Mixture, Sample
from speechquilt.protocols import Patcher
from speechquilt.types import IGNORE, Batch, Document, LaidOut
from speechquilt.vocab import Vocab

ROUND_TOKENS_TO = 32  # few different T: less compiling and less memory fragmentation on a GPU
# Measured on documents of 30-250 tokens in rows of 256 units: 0.8 wastes 1 % of the units where 0.9 wastes 5 %.
FIRST_SHARE = 0.8  # of a batch's units goes to the oldest documents; the rest is chosen for fit
TOKEN_SLACK = 1.05  # a row is filled up to this many times the tokens that a row of units holds on average,
SHORT_OF_UNITS = 0.04  # unless more than this share of its units is still empty


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """`rows` of the global batch, over all ranks; a row holds at most `units_per_row` units and `tokens_per_row` tokens.

    `buffer`: documents to choose from for the ends of rows, beside those that fill most of the batch in stream order.
    """

    rows: int
    units_per_row: int
    tokens_per_row: int
    buffer: int = 128

    def __post_init__(self) -> None:
        for key, least in (("rows", 1), ("units_per_row", 4), ("tokens_per_row", 4), ("buffer", 0)):
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
    """One patched document, ready for a row. `drawn_in`: the batch during which it was drawn and patched."""

    sample: Sample
    drawn_in: int
    laid_out: LaidOut
    labels_T: np.ndarray
    opens_T: np.ndarray
    closes_T: np.ndarray
    num_units: int
    num_cut: int  # tokens lost because the document is longer than a row

    @property
    def num_tokens(self) -> int:
        return len(self.labels_T)


class PackedLoader:
    """A `protocols.Loader` of `Batch`es, for ever.

    Without a patcher the batches have no `opens` / `closes` and every token is a unit. With one, each document is patched
    once, when it is drawn: `draw` is a pure function of (seed, sample number), `progress` is the share of `total_batches`
    made by then (at most 1), which moves a curriculum.

    Rows: the oldest documents are spread over the rows of the batch, level in units *and* in tokens (rows are padded to
    the longest); the ends are filled with what fits best among the next `config.buffer`. A document longer than a row is
    cut there: its last token becomes an EOS that is no target.
    Padding is the last document of its row. Its first token is a closed unit, so that every padding position sees one
    (no empty attention); all its other tokens are one open unit, so that padding adds two units whatever its length.

    `meta` of a batch, for this rank's rows: `tokens`, `speech_tokens`, `units`, `speech_units` (patches), `targets`,
    `cut_documents`, `cut_tokens`, `documents` (per source), `document_ids` (per row). For the global batch: `waste` (share
    of `units_per_row` without a unit) and `max_units` (most units in a row, padding included), equal on all ranks.
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

    def next_batch(self) -> Batch:
        rows = self._pack_rows()
        self.num_batches += 1
        tokens = max(sum(item.num_tokens for item in row) for row in rows)
        return self._collate(rows, -(-tokens // ROUND_TOKENS_TO) * ROUND_TOKENS_TO)

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON data, the same on every rank. Buffered documents are kept as their place in the stream."""
        return {
            "made_for": self._made_for(),
            "mixture": self.mixture.state_dict(),
            "num_batches": self.num_batches,
            "buffer": [{**asdict(item.sample), "drawn_in": item.drawn_in} for item in self._buffer],
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
        for entry in state["buffer"]:
            sample = Sample(**{key: entry[key] for key in ("number", "source", "index", "epoch")})
            self._buffer.append(self._prepare(sample, self.mixture.document(sample), entry["drawn_in"]))

    def _made_for(self) -> dict[str, Any]:
        return {"seed": self.seed, "total_batches": self.total_batches, **asdict(self.config)}

    # --- documents -> items

    def _draw(self) -> None:
        sample, document = self.mixture.draw()
        self._buffer.append(self._prepare(sample, document, self.num_batches))

    def _prepare(self, sample: Sample, document: Document, drawn_in: int) -> _Item:
        """Patch a document, and cut it as often as it takes to fit into a row."""
        laid_out = self.vocab.lay_out(document)
        whole = len(laid_out.ids_T)
        draw = int(fingerprint([self.seed, sample.number]), 16) / 16**12
        progress = min(1.0, drawn_in / self.total_batches)
        limit = self.config.tokens_per_row
        while True:
            if len(laid_out.ids_T) > limit:
                laid_out = _cut(laid_out, limit, self.vocab.eos)
            opens_T, closes_T = self._patch(laid_out, draw, progress)
            first_U = np.flatnonzero(opens_T)
            if len(first_U) <= self.config.units_per_row:
                break
            limit = int(first_U[self.config.units_per_row - 1]) + 1  # the last unit of the row is the EOS
        return _Item(
            sample=sample,
            drawn_in=drawn_in,
            laid_out=laid_out,
            labels_T=_labels(laid_out),
            opens_T=opens_T,
            closes_T=closes_T,
            num_units=len(first_U),
            num_cut=max(0, whole - len(laid_out.ids_T)),
        )

    def _patch(self, laid_out: LaidOut, draw: float, progress: float) -> tuple[np.ndarray, np.ndarray]:
        if self.patcher is None:
            every_T = np.ones(len(laid_out.ids_T), dtype=bool)
            return every_T, every_T
        return self.patcher(laid_out, draw, progress)

    # --- items -> rows

    def _pack_rows(self) -> list[list[_Item]]:
        """Take the rows of one global batch out of the buffer; what is left stays in stream order."""
        first = self._refill()
        placed = _place(
            units_N=np.array([item.num_units for item in self._buffer]),
            tokens_N=np.array([item.num_tokens for item in self._buffer]),
            first=first,
            config=self.config,
        )
        rows = [[self._buffer[n] for n in sorted(row)] for row in placed]
        gone = {n for row in placed for n in row}
        self._buffer = [item for n, item in enumerate(self._buffer) if n not in gone]
        return rows

    def _refill(self) -> int:
        """Draw until the buffer holds the documents that come first and `config.buffer` more; returns how many do."""
        first, units = 0, 0
        while True:
            if first == len(self._buffer):
                self._draw()
            units += self._buffer[first].num_units
            if first and units > FIRST_SHARE * self.config.rows * self.config.units_per_row:
                break
            first += 1
        while len(self._buffer) < first + self.config.buffer:
            self._draw()
        return first

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
            labels_BT[r, :end] = np.concatenate([item.labels_T for item in row])
            opens_BT[r, :end] = np.concatenate([item.opens_T for item in row])
            closes_BT[r, :end] = np.concatenate([item.closes_T for item in row])
            doc_BT[r, :end] = np.repeat(np.arange(len(row)), [item.num_tokens for item in row])
            doc_BT[r, end:] = len(row)
            opens_BT[r, end : end + 2] = True
            closes_BT[r, end : end + 1] = True
        return Batch(
            ids_BT=torch.from_numpy(ids_BT),
            labels_BT=torch.from_numpy(labels_BT),
            doc_BT=torch.from_numpy(doc_BT),
            opens_BT=None if self.patcher is None else torch.from_numpy(opens_BT),
            closes_BT=None if self.patcher is None else torch.from_numpy(closes_BT),
            meta=self._meta(rows, mine, num_tokens),
        )

    def _meta(self, rows: list[list[_Item]], mine: list[list[_Item]], num_tokens: int) -> dict[str, Any]:
        items = [item for row in mine for item in row]
        units_R = [sum(item.num_units for item in row) for row in rows]
        tokens_R = [sum(item.num_tokens for item in row) for row in rows]
        padding_units = [min(2, num_tokens - n) if self.patcher is not None else num_tokens - n for n in tokens_R]
        return {
            "tokens": sum(item.num_tokens for item in items),
            "speech_tokens": sum(int(item.laid_out.is_speech_T.sum()) for item in items),
            "units": sum(item.num_units for item in items),
            "speech_units": sum(int((item.opens_T & item.laid_out.is_speech_T).sum()) for item in items),
            "targets": sum(int((item.labels_T != IGNORE).sum()) for item in items),
            "cut_documents": sum(item.num_cut > 0 for item in items),
            "cut_tokens": sum(item.num_cut for item in items),
            "documents": dict(Counter(item.sample.source for item in items)),
            "document_ids": [[item.laid_out.id for item in row] for row in mine],
            "waste": 1 - sum(units_R) / (self.config.units_per_row * len(rows)),
            "max_units": max(units + padding for units, padding in zip(units_R, padding_units)),
        }


def _place(*, units_N: np.ndarray, tokens_N: np.ndarray, first: int, config: PackConfig) -> list[list[int]]:
    """Which of N buffered documents go into which row. The oldest always goes, so that none waits for ever.

    The `first` ones are placed largest first, each into the row that it leaves least full; then every row is filled with
    the largest that fit. Only a row that is still short of units may grow past the batch's common number of tokens.
    """
    mean_tokens = min(config.tokens_per_row, config.units_per_row * tokens_N.sum() / units_N.sum())
    units_R, tokens_R = np.zeros(config.rows, dtype=np.int64), np.zeros(config.rows, dtype=np.int64)
    rows: list[list[int]] = [[] for _ in range(config.rows)]
    free_N = np.ones(len(units_N), dtype=bool)

    def put(n: int, r: int) -> None:
        rows[r].append(n)
        units_R[r] += units_N[n]
        tokens_R[r] += tokens_N[n]
        free_N[n] = False

    size_N = np.maximum(units_N / config.units_per_row, tokens_N / mean_tokens)
    for n in [0, *sorted(range(1, first), key=lambda n: -size_N[n])]:
        load_R = np.maximum(
            (units_R + units_N[n]) / config.units_per_row,
            (tokens_R + tokens_N[n]) / mean_tokens,
        )
        fits_R = (units_R + units_N[n] <= config.units_per_row) & (tokens_R + tokens_N[n] <= config.tokens_per_row)
        if fits_R.any():
            put(n, int(np.argmin(np.where(fits_R, load_R, np.inf))))
    common = min(config.tokens_per_row, max(TOKEN_SLACK * mean_tokens, tokens_R.max()))
    for r in range(config.rows):
        while True:
            units_left = config.units_per_row - units_R[r]
            fits_N = free_N & (units_N <= units_left) & (tokens_N <= common - tokens_R[r])
            if not fits_N.any() and units_left > SHORT_OF_UNITS * config.units_per_row:
                fits_N = free_N & (units_N <= units_left) & (tokens_N <= config.tokens_per_row - tokens_R[r])
            if not fits_N.any():
                break
            put(int(np.argmax(np.where(fits_N, units_N, -1))), r)
    return rows


def _labels(laid_out: LaidOut) -> np.ndarray:
    """The next id where it is a target, else IGNORE; nothing follows the last token."""
    labels_T = np.full(len(laid_out.ids_T), IGNORE, dtype=np.int64)
    labels_T[:-1] = np.where(laid_out.loss_T[1:], laid_out.ids_T[1:], IGNORE)
    return labels_T


def _cut(laid_out: LaidOut, num_tokens: int, eos: int) -> LaidOut:
    """The first `num_tokens` - 1 tokens and an EOS that is not a target: the document does not really end here."""
    keep = num_tokens - 1
    return replace(
        laid_out,
        ids_T=np.append(laid_out.ids_T[:keep], eos),
        is_speech_T=np.append(laid_out.is_speech_T[:keep], False),
        loss_T=np.append(laid_out.loss_T[:keep], False),
        unit_end_T=None if laid_out.unit_end_T is None else np.append(laid_out.unit_end_T[:keep], np.uint8(0)),
    )
