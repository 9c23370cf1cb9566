"""Spoken texts of several folders of shards as one sequence, whole or a part of it; an item is read when it is wanted."""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import overload

import numpy as np

from speechquilt.data.feed.splits import place
from speechquilt.data.shards.spoken import SpokenFolder
from speechquilt.types import AlignedTokens


class SpokenParts(Sequence[AlignedTokens]):
    """The items `indices` of `folders`, counted through all of them."""

    def __init__(self, folders: Sequence[SpokenFolder], indices: Sequence[int]) -> None:
        self.folders, self.indices = folders, indices
        self._ends = list(accumulate(map(len, folders)))

    @classmethod
    def open(cls, paths: Sequence[Path]) -> "SpokenParts":
        """Raises FileNotFoundError or ValueError when a folder is missing, unfinished or of another kind."""
        folders = [SpokenFolder(path) for path in paths]
        return cls(folders, range(sum(map(len, folders))))

    def split(self, every: int) -> tuple["SpokenParts", "SpokenParts"]:
        """All but one in `every`, and those: a fixed choice by the hash of their ids. Raises ValueError below two items."""
        if len(self) < 2:
            raise ValueError(
                f"{len(self)} spoken texts in {', '.join(str(f.folder) for f in self.folders)}: at least two with word times "
                "are needed, one to train on and one to measure with; give tokenize more aligned recordings"
            )
        ids = [id for folder in self.folders for id in folder.ids()]
        order = sorted(self.indices, key=lambda i: (place(ids[i]), i))
        kept = set(order[: max(1, len(order) // every)])
        train = [i for i in self.indices if i not in kept]
        return SpokenParts(self.folders, train), SpokenParts(self.folders, sorted(kept))

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> AlignedTokens: ...

    @overload
    def __getitem__(self, index: slice) -> "SpokenParts": ...

    def __getitem__(self, index: int | slice) -> "AlignedTokens | SpokenParts":
        if isinstance(index, slice):
            return SpokenParts(self.folders, self.indices[index])
        number = self.indices[index]
        which = int(np.searchsorted(self._ends, number, side="right"))
        return self.folders[which][number - (self._ends[which - 1] if which else 0)]
