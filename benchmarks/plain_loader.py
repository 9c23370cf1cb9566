"""The data path of pre-training written as plain loops over tokens: what `benchmarks/loader.py` compares ours with.

It is also the rules in one readable place: mixture (spec synthetic-interleaved 6.1), layout, patching (spec
latent-speech-text 5), packing. Trap: it draws from the same seeds as the real one, so both must ask the same generator
in the same order; nothing else is shared.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from benchmarks.interleave import plain_interleave
from speechquilt.config import fingerprint
from speechquilt.data.feed.pack import FIRST_SHARE, PADDING_UNITS, WORTH_A_MOVE, PackConfig
from speechquilt.types import IGNORE, AlignedTokens, Batch
from speechquilt.vocab import Vocab

TAU1, TAU2, PATCH_SIZE = 1 / 3, 2 / 3, 4
Run = tuple[str, list[int], list[int]]  # modality, local ids, unit ends


class PlainSource:
    """A folder of shards as Python lists; recordings are cut into blocks when they are asked for."""

    def __init__(self, folder: Path, text_encode: Callable[[str], Sequence[int]], seed: int) -> None:
        self.rows: list[dict[str, Any]] = []
        for path in sorted(folder.glob("*.parquet")):
            self.rows += pq.read_table(path).to_pylist()
        self.text_encode, self.seed = text_encode, seed

    def runs(self, index: int, epoch: int) -> list[Run]:
        row = self.rows[index]
        if "words" not in row:
            ends = [x or [0] * len(ids) for ids, x in zip(row["ids"], row["unit_end"])]
            return list(zip(row["modality"], row["ids"], ends))
        spoken = AlignedTokens(
            id=row["id"],
            text=row["text"],
            words=tuple(row["words"]),
            ids_T=np.array(row["ids"]),
            word_T=np.array(row["word"]),
        )
        rng = np.random.default_rng(int(fingerprint([spoken.id, epoch, self.seed]), 16))
        segments = plain_interleave(spoken, rng, self.text_encode).segments
        return [
            (s.modality, s.ids_T.tolist(), [0] * len(s.ids_T) if s.unit_end_T is None else s.unit_end_T.tolist())
            for s in segments
        ]


class Item:
    """One document, laid out and patched, token by token."""

    def __init__(self, runs: list[Run], vocab: Vocab) -> None:
        self.ids, self.speech, self.ends = [vocab.bos], [False], [0]
        for modality, ids, ends in runs:
            self._add(vocab.marker(modality), False, 0)  # type: ignore[arg-type]
            for i, end in zip(ids, ends):
                is_speech = modality == "speech"
                self._add(i + vocab.speech_start if is_speech else i, is_speech, end)
        self._add(vocab.eos, False, 0)
        self.labels = [*self.ids[1:], IGNORE]
        self.opens: list[bool] = []
        self.closes: list[bool] = []

    def _add(self, token: int, is_speech: bool, end: int) -> None:
        self.ids.append(token)
        self.speech.append(is_speech)
        self.ends.append(end)

    def patch_statically(self) -> None:
        inside = 0
        for is_speech in self.speech:
            self.opens.append(not is_speech or inside % PATCH_SIZE == 0)
            self.closes.append(not is_speech or inside % PATCH_SIZE == PATCH_SIZE - 1)
            inside = inside + 1 if is_speech else 0

    def patch_by_words(self) -> None:
        closed = True
        for is_speech, end in zip(self.speech, self.ends):
            self.opens.append(not is_speech or closed)
            closed = not is_speech or end > 0
            self.closes.append(closed)

    @property
    def sizes(self) -> tuple[int, int]:
        return sum(self.opens), len(self.ids)


class PlainLoader:
    """What `PackedLoader` does on one rank for documents that fit into a row."""

    def __init__(
        self,
        sources: Mapping[str, PlainSource],
        weights: Mapping[str, float],
        vocab: Vocab,
        patching: str,
        config: PackConfig,
        seed: int,
        total_batches: int,
    ) -> None:
        self.sources, self.weights, self.vocab, self.patching = dict(sorted(sources.items())), weights, vocab, patching
        self.config, self.seed, self.total_batches = config, seed, total_batches
        self.tokens = dict.fromkeys(self.sources, 0)
        self.given = dict.fromkeys(self.sources, 0)
        self.orders: dict[tuple[str, int], list[int]] = {}
        self.number = self.num_batches = 0
        self.buffer: list[Item] = []

    def state_dict(self) -> dict[str, Any]:
        raise NotImplementedError("a plain loader cannot be resumed")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError("a plain loader cannot be resumed")

    def draw(self) -> None:
        name = min(self.sources, key=lambda name: self.tokens[name] / self.weights[name])
        source = self.sources[name]
        epoch, place = divmod(self.given[name], len(source.rows))
        if (name, epoch) not in self.orders:
            rng = np.random.default_rng(int(fingerprint([self.seed, name, epoch]), 16))
            self.orders[name, epoch] = rng.permutation(len(source.rows)).tolist()
        item = Item(source.runs(self.orders[name, epoch][place], epoch), self.vocab)
        self.given[name] += 1
        self.tokens[name] += len(item.ids)
        if self._is_aligned():
            item.patch_by_words()
        else:
            item.patch_statically()
        self.number += 1
        self.buffer.append(item)

    def _is_aligned(self) -> bool:
        progress = min(1.0, self.num_batches / self.total_batches)
        if self.patching == "static" or progress >= TAU2:
            return False
        draw = int(fingerprint([self.seed, self.number]), 16) / 16**12
        return progress < TAU1 or draw < 1 - (progress - TAU1) / (TAU2 - TAU1)

    def next_batch(self) -> Batch:
        first = self._refill()
        rows = self._place(first)
        taken = {n for row in rows for n in row}
        items = [[self.buffer[n] for n in sorted(row)] for row in rows]
        self.buffer = [item for n, item in enumerate(self.buffer) if n not in taken]
        self.num_batches += 1
        return self._collate(items)

    def _refill(self) -> int:
        slots = self.config.rows * self.config.units_per_row
        first, whole, units = 1, 0, 0
        while units < slots:
            if whole == len(self.buffer):
                self.draw()
            units += self.buffer[whole].sizes[0]
            whole += 1
            if units <= FIRST_SHARE * slots:
                first = whole
        while len(self.buffer) < whole + self.config.buffer:
            self.draw()
        return first

    def _place(self, first: int) -> list[list[int]]:
        sizes = [item.sizes for item in self.buffer]
        units, tokens = sum(u for u, _ in sizes), sum(t for _, t in sizes)
        step = self.config.round_tokens_to
        mean = max(1, round(self.config.units_per_row * tokens / units / step)) * step
        limits = self.config.units_per_row, max(min(self.config.tokens_per_row, mean), sizes[0][1])
        rows: list[list[int]] = [[] for _ in range(self.config.rows)]
        room = [list(limits) for _ in rows]
        free = set(range(len(sizes)))

        def move(n: int, r: int, sign: int) -> None:
            room[r] = [x - sign * size for x, size in zip(room[r], sizes[n])]

        def put(n: int, r: int) -> None:
            rows[r].append(n)
            free.remove(n)
            move(n, r, 1)

        def fits(n: int, space: Sequence[int]) -> bool:
            return sizes[n][0] <= space[0] and sizes[n][1] <= space[1]

        def empty(n: int, space: Sequence[int]) -> float:
            return (space[0] - sizes[n][0]) / limits[0] + (space[1] - sizes[n][1]) / limits[1]

        def fullest_after(n: int, r: int) -> float:
            return min((x - size) / limit for x, size, limit in zip(room[r], sizes[n], limits))

        def share(n: int) -> float:
            return max(size / limit for size, limit in zip(sizes[n], limits))

        for n in [0, *sorted(range(1, first), key=share, reverse=True)]:
            able = [r for r in range(len(rows)) if fits(n, room[r])]
            if able:
                put(n, max(able, key=lambda r: fullest_after(n, r)))
        for r, row in enumerate(rows):
            while free:
                best = (float("inf"), -1, -1)
                for out in [-1, *[n for n in row if n]]:
                    space = room[r] if out < 0 else [x + size for x, size in zip(room[r], sizes[out])]
                    for n in sorted(free):
                        if fits(n, space) and empty(n, space) < best[0]:
                            best = (empty(n, space), out, n)
                if best[0] > room[r][0] / limits[0] + room[r][1] / limits[1] - WORTH_A_MOVE:
                    break
                if best[1] >= 0:
                    row.remove(best[1])
                    free.add(best[1])
                    move(best[1], r, -1)
                put(best[2], r)
            if not row:
                put(min(free), r)
        return rows

    def _collate(self, rows: list[list[Item]]) -> Batch:
        step = self.config.round_tokens_to
        length = -(-max(sum(len(item.ids) for item in row) for row in rows) // step) * step
        arrays: dict[str, list[list[Any]]] = {name: [] for name in ("ids", "labels", "doc", "opens", "closes")}
        for row in rows:
            end = sum(len(item.ids) for item in row)
            padding = length - end
            for name, pad in (("ids", self.vocab.pad), ("labels", IGNORE)):
                arrays[name].append([x for item in row for x in getattr(item, name)] + [pad] * padding)
            arrays["doc"].append([k for k, item in enumerate(row) for _ in item.ids] + [len(row)] * padding)
            for name, first in (("opens", PADDING_UNITS), ("closes", 1)):
                tail = [k < first for k in range(padding)]
                arrays[name].append([x for item in row for x in getattr(item, name)] + tail)
        return Batch(
            **{f"{name}_BT": torch.tensor(values) for name, values in arrays.items()},
            meta={"tokens": sum(len(item.ids) for row in rows for item in row)},
        )
