"""Mixture: a deterministic stream of documents from several sources, weighted by tokens, endless unless epochs are
bounded.

The mixtures of the two papers: spec synthetic-interleaved, 6.1, and spec latent-speech-text, 3.3.
Trap: weights are shares of *tokens* (markers, BOS and EOS included), not of documents and not of units. Speech
documents are longer than text documents and units are fewer than tokens, so the three differ a lot.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import inf
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import numpy as np

from speechquilt.config import fingerprint, nearest
from speechquilt.types import Document


class Source(Protocol):
    """Documents by index: a ShardFolder, or a list."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Document: ...


@runtime_checkable
class RedrawnSource(Protocol):
    """A source whose documents differ by epoch; a pure function of (index, epoch)."""

    def __len__(self) -> int: ...

    def in_epoch(self, index: int, epoch: int) -> Document: ...


Convert = Callable[[Document], Document]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Where one document of the stream comes from. `number` counts the stream from 0."""

    number: int
    source: str
    index: int
    epoch: int


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """How documents of several sources are mixed into one stream."""

    weights: dict[str, float]
    """Share of the tokens for each source, by name; they need not add up to 1. 0 leaves a source out."""
    seed: int = 0
    """Decides the order in which each source's documents come."""
    max_epochs: dict[str, float] = field(default_factory=dict)
    """How often each source may be gone through before it leaves the mixture; parts of an epoch count (1.5 is one and
    a half). A source that is not named has no bound.
    """

    def __post_init__(self) -> None:
        for name, weight in self.weights.items():
            if not weight >= 0 or weight == float("inf"):
                raise ValueError(f"weights.{name}={weight} must be a number of at least 0")
        if not any(self.weights.values()):
            raise ValueError(f"weights={self.weights} leaves nothing to mix; give at least one source a weight above 0")
        for name, epochs in self.max_epochs.items():
            if name not in self.weights:
                raise ValueError(f"max_epochs names {name!r}; {nearest(name, list(self.weights))}")
            if not 0 < epochs < float("inf"):
                raise ValueError(
                    f"max_epochs.{name}={epochs} must be a number above 0; leave {name!r} out for no bound"
                )

    def build(
        self,
        sources: Mapping[str, Source | RedrawnSource],
        convert: Convert | None = None,
        count: Callable[[Document], int] | None = None,
    ) -> "Mixture":
        return Mixture(sources, self.weights, self.seed, convert, self.max_epochs, count)


class Exhausted(ValueError):
    """Every source of the mixture has given its `max_epochs`."""


@dataclass
class _Progress:
    """What one source has given so far."""

    epoch: int = 0
    position: int = 0  # in the permutation of this epoch
    tokens: int = 0
    order: np.ndarray | None = field(default=None, repr=False)


class Mixture:
    """Sample n is a pure function of (sources, weights, seed, n), reached by drawing n times or from a state.

    Every draw takes the source with the fewest tokens per weight so far, so that after any number of draws the shares are
    right to within one document per source. Each source is walked in a new seeded permutation per epoch.
    `convert` changes what a draw returns (the speech into BPE pieces), never which document is drawn: tokens are counted
    before it, by `count`.
    A source that has given `max_epochs` of its documents (rounded to whole documents, at least one) leaves; the others go on in the
    proportion of their weights. When none is left `draw` raises Exhausted.
    Raises ValueError when a weighted source is missing or empty.
    """

    def __init__(
        self,
        sources: Mapping[str, Source | RedrawnSource],
        weights: Mapping[str, float],
        seed: int = 0,
        convert: Convert | None = None,
        max_epochs: Mapping[str, float] = MappingProxyType({}),
        count: Callable[[Document], int] | None = None,
    ) -> None:
        config = MixtureConfig(weights=dict(weights), seed=seed, max_epochs=dict(max_epochs))
        self.weights = config.weights
        self.weights = {name: weight for name, weight in self.weights.items() if weight > 0}
        for name in self.weights:
            if name not in sources:
                raise ValueError(f"weights names the source {name!r}, the sources are {', '.join(sorted(sources))}")
            if len(sources[name]) == 0:
                raise ValueError(f"source {name!r} has no documents; make its shards again or give it weight 0")
        self.sources = {name: sources[name] for name in sorted(self.weights)}
        self._by_epoch = {name: _by_epoch(source) for name, source in self.sources.items()}
        self.seed, self.convert, self.count = seed, convert, count or num_laid_out
        self.number = 0
        self._progress = {name: _Progress() for name in self.sources}
        self.max_epochs = {name: epochs for name, epochs in config.max_epochs.items() if name in self.sources}
        self._limits = {
            name: max(1, round(epochs * len(self.sources[name]))) for name, epochs in self.max_epochs.items()
        }
        self._active = list(self.sources)

    def draw(self) -> tuple[Sample, Document]:
        """The next sample and its document. Raises Exhausted when every source has left."""
        if self.is_exhausted:
            raise Exhausted(
                f"every source has given its max_epochs={self.max_epochs}, {self.number} documents in all; "
                "raise or remove a bound, or train for fewer steps"
            )
        name = min(self._active, key=lambda name: self._progress[name].tokens / self.weights[name])
        progress = self._progress[name]
        if progress.order is None:
            progress.order = self._permutation(name, progress.epoch)
        sample = Sample(
            number=self.number, source=name, index=int(progress.order[progress.position]), epoch=progress.epoch
        )
        document = self._stored(sample)
        self.number += 1
        progress.tokens += self.count(document)
        progress.position += 1
        if progress.position == len(progress.order):
            progress.epoch, progress.position, progress.order = progress.epoch + 1, 0, None
        if self._is_spent(name):
            self._active.remove(name)
        return sample, self._converted(document)

    def document(self, sample: Sample) -> Document:
        """The document of a sample drawn before."""
        return self._converted(self._stored(sample))

    @property
    def epochs(self) -> dict[str, float]:
        """How often each source has been gone through."""
        return {name: p.epoch + p.position / len(self.sources[name]) for name, p in self._progress.items()}

    @property
    def left(self) -> tuple[str, ...]:
        """Sources that have given their `max_epochs` and are no longer drawn from."""
        return tuple(name for name in self.sources if name not in self._active)

    @property
    def is_exhausted(self) -> bool:
        """Whether every source has left."""
        return not self._active

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens drawn from each source."""
        return {name: p.tokens for name, p in self._progress.items()}

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON data; a mixture that loads it goes on with the next sample."""
        return {
            "made_for": self._made_for(),
            "number": self.number,
            "sources": {
                name: {"epoch": p.epoch, "position": p.position, "tokens": p.tokens}
                for name, p in self._progress.items()
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError when the state belongs to other sources, sizes, weights, bounds or seed."""
        if state["made_for"] != self._made_for():
            raise ValueError(
                f"the mixture's state was saved with {state['made_for']}, this run has {self._made_for()}; "
                "resume with the same sources, weights, max_epochs and seed, or start a new run"
            )
        self.number = state["number"]
        self._progress = {name: _Progress(**state["sources"][name]) for name in self.sources}
        self._active = [name for name in self.sources if not self._is_spent(name)]

    def _is_spent(self, name: str) -> bool:
        progress = self._progress[name]
        given = progress.epoch * len(self.sources[name]) + progress.position
        return given >= self._limits.get(name, inf)

    def _stored(self, sample: Sample) -> Document:
        return self._by_epoch[sample.source](sample.index, sample.epoch)

    def _converted(self, document: Document) -> Document:
        return document if self.convert is None else self.convert(document)

    def _made_for(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "weights": {name: self.weights[name] for name in self.sources},
            "documents": {name: len(source) for name, source in self.sources.items()},
            **(
                {"max_epochs": self.max_epochs} if self.max_epochs else {}
            ),  # so that states saved before there were bounds still load
        }

    def _permutation(self, name: str, epoch: int) -> np.ndarray:
        seed = int(fingerprint([self.seed, name, epoch]), 16)
        return np.random.default_rng(seed).permutation(len(self.sources[name]))


def _by_epoch(source: Source | RedrawnSource) -> Callable[[int, int], Document]:
    if isinstance(source, RedrawnSource):
        return source.in_epoch
    return lambda index, epoch: source[index]


def num_laid_out(document: Document) -> int:
    """Tokens of a document once `vocab.Vocab.lay_out` has added BOS, a marker for every segment, and EOS."""
    return document.num_tokens() + len(document.segments) + 2
