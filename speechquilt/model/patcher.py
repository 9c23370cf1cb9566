"""Patchers: which tokens open a unit, and after which tokens a unit is known to be complete.

Trap: the last token of a *short* patch at the end of a span does not close it. While generating nobody knows yet that
the span ends; the marker that follows opens its own unit and thereby completes the short one. Closing it earlier would
tell the model that the span ends (spec 2, 6.4).
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn

import numpy as np

from speechquilt.model.entropy import EntropyConfig
from speechquilt.protocols import Patcher
from speechquilt.types import LaidOut, UnitEnd

_DRAW_BITS = 53  # a float in [0, 1) has no more


def _index_in_run(is_speech_T: np.ndarray) -> np.ndarray:
    """Index of each speech token in its span; text and special tokens get 0."""
    index_T = np.arange(len(is_speech_T))
    last_other_T = np.maximum.accumulate(np.where(is_speech_T, -1, index_T))
    return np.where(is_speech_T, index_T - last_other_T - 1, 0)


@dataclass(frozen=True)
class NoPatcher:
    """Every token is a unit."""

    causal = True

    def __call__(self, laid_out: LaidOut, draw: float, progress: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        every_T = np.ones(len(laid_out.ids_T), dtype=bool)
        return every_T, every_T.copy()

    def init_state(self) -> None:
        return None

    def step(self, token_id: int, is_speech: bool, state: None) -> tuple[bool, bool, None]:
        return True, True, None


@dataclass(frozen=True)
class StaticPatcher:
    """Patches of `size` speech tokens, counted from the start of each span; the last of a span may be short."""

    size: int
    causal = True

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"patch size {self.size} must be at least 1; use 1 for one unit per token")

    def __call__(self, laid_out: LaidOut, draw: float, progress: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        member_T = _index_in_run(laid_out.is_speech_T) % self.size
        text_T = ~laid_out.is_speech_T
        return text_T | (member_T == 0), text_T | (member_T == self.size - 1)

    def init_state(self) -> int:
        """The state is the number of tokens in the open patch."""
        return 0

    def step(self, token_id: int, is_speech: bool, state: int) -> tuple[bool, bool, int]:
        if not is_speech:
            return True, True, 0
        return state == 0, state == self.size - 1, (state + 1) % self.size


@dataclass(frozen=True, kw_only=True)
class BoundaryNoise:
    """Moves the ends of aligned patches about, as an aligner's errors would (spec 2, 4: moves of 0.02 to 0.04 s cost
    about 1 %). A move is turned into whole tokens by stochastic rounding, so that moves shorter than a token count
    too."""

    seconds: tuple[float, float]
    """Smallest and largest move in seconds, earlier or later by chance: 0 <= smallest <= largest."""
    frame_rate: float
    """Speech tokens per second of the run's tokenizer, for example 12.5."""

    def __post_init__(self) -> None:
        low, high = self.seconds
        if not 0 <= low <= high:
            raise ValueError(
                f"boundary_noise.seconds={self.seconds} must be (least, largest) with 0 <= least <= largest"
            )
        if self.frame_rate <= 0:
            raise ValueError(f"boundary_noise.frame_rate={self.frame_rate} must be positive, in tokens per second")

    def moved(self, ended_T: np.ndarray, is_speech_T: np.ndarray, draw: float) -> np.ndarray:
        """Bool `ended_T` with the ends *inside* each span moved; a pure function of `draw`.

        Ends keep their order and every patch keeps at least one token; the last token of a span stays as it is.
        """
        rng = np.random.default_rng(int(draw * 2**_DRAW_BITS))
        moved_T = ended_T.copy()
        edges_T = np.diff(np.concatenate([[0], is_speech_T.astype(np.int8), [0]]))
        for start, stop in zip(np.flatnonzero(edges_T > 0), np.flatnonzero(edges_T < 0)):
            inside_T = moved_T[start : stop - 1]  # a view
            ends_N = np.flatnonzero(inside_T)
            inside_T[ends_N] = False
            inside_T[self._in_order(ends_N + self._shifts(len(ends_N), rng), len(inside_T))] = True
        return moved_T

    def _shifts(self, count: int, rng: np.random.Generator) -> np.ndarray:
        tokens_N = rng.uniform(*self.seconds, count) * self.frame_rate
        return np.floor(tokens_N + rng.random(count)).astype(np.int64) * rng.choice([-1, 1], count)

    @staticmethod
    def _in_order(places_N: np.ndarray, num_places: int) -> np.ndarray:
        """Distinct places in 0..`num_places` - 1, in order, each as near to the wanted one as the others leave room."""
        rank_N = np.arange(len(places_N))
        up_N = np.maximum.accumulate(np.maximum(places_N, 0) - rank_N) + rank_N
        return np.minimum(up_N, num_places - len(places_N) + rank_N)


class _NeedsUnitEnds:
    """The incremental half of every patcher that cannot be used in generation, because its boundaries come from an
    aligner: it refuses."""

    causal = False

    def init_state(self) -> Any:
        self._refuse()

    def step(self, token_id: int, is_speech: bool, state: Any) -> tuple[bool, bool, Any]:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise ValueError(
            f"{type(self).__name__} needs word ends that are unknown while generating; "
            "use eval_patcher(config) of a static, mixed, curriculum or entropy config"
        )


@dataclass(frozen=True, kw_only=True)
class AlignedPatcher(_NeedsUnitEnds):
    """One patch per word (or per BPE piece of the text), from the `unit_end_T` the shards carry (spec 2, 5).

    `silence`: each run of it is a patch of its own ("separate"), or joins the unit before it ("merged"; at the start of
    a span the unit after it). `units`: "words", or "pieces", which also cuts words where the data marks pieces. The
    aligner says where a unit ends, so its last token closes the patch.
    """

    silence: Literal["separate", "merged"] = "separate"
    units: Literal["words", "pieces"] = "words"
    noise: BoundaryNoise | None = None

    def __call__(self, laid_out: LaidOut, draw: float, progress: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        if laid_out.unit_end_T is None:
            raise ValueError(
                f"document {laid_out.id!r} (source {laid_out.source!r}) has speech without unit_end_T, which aligned "
                "patching needs; align the corpus before making shards, or use kind='static' or 'entropy'"
            )
        ended_T = self._ends(laid_out.unit_end_T, laid_out.is_speech_T)
        if self.noise is not None:
            ended_T = self.noise.moved(ended_T, laid_out.is_speech_T, draw)
        text_T = ~laid_out.is_speech_T
        closes_T = text_T | ended_T
        return text_T | np.roll(closes_T, 1), closes_T

    def _ends(self, unit_end_T: np.ndarray, is_speech_T: np.ndarray) -> np.ndarray:
        """True on the last token of every patch whose end the data marks."""
        counts_T = unit_end_T != UnitEnd.NONE
        if self.units == "words":
            counts_T &= unit_end_T != UnitEnd.PIECE
        ended_T = is_speech_T & counts_T
        if self.silence == "separate":
            return ended_T
        return ended_T & ~_inside_merged(np.where(ended_T, unit_end_T, UnitEnd.NONE), is_speech_T)


def _inside_merged(unit_end_T: np.ndarray, is_speech_T: np.ndarray) -> np.ndarray:
    """True on the unit ends that fall away when silence is merged: before a silence, and after silence at the start of
    a span."""
    num_tokens = len(unit_end_T)
    index_T, silence_T = np.arange(num_tokens), unit_end_T == UnitEnd.SILENCE
    # The next end or span break, and the last word end or span break, of every token.
    next_T = np.minimum.accumulate(np.where((unit_end_T > 0) | ~is_speech_T, index_T, num_tokens - 1)[::-1])[::-1]
    next_T = np.append(next_T[1:], num_tokens - 1)
    last_T = np.maximum.accumulate(np.where(((unit_end_T > 0) & ~silence_T) | ~is_speech_T, index_T, 0))
    span_goes_on_T = np.append(is_speech_T[1:], False)
    leading_T = silence_T & ~is_speech_T[last_T] & span_goes_on_T
    return silence_T[next_T] | leading_T


@dataclass(frozen=True, kw_only=True)
class MixedPatcher(_NeedsUnitEnds):
    """Per sequence `aligned` with probability `aligned_probability`, else `static`."""

    aligned: AlignedPatcher
    static: StaticPatcher
    aligned_probability: float

    def __post_init__(self) -> None:
        if not 0 <= self.aligned_probability <= 1:
            raise ValueError(f"aligned_probability={self.aligned_probability} must lie in 0..1")

    def __call__(self, laid_out: LaidOut, draw: float, progress: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        return (self.aligned if draw < self.aligned_probability else self.static)(laid_out, draw, progress)


@dataclass(frozen=True, kw_only=True)
class CurriculumPatcher(_NeedsUnitEnds):
    """Per sequence `aligned` with probability P(progress), else `static`.

    P is 1 before `tau1`, then falls linearly to 0 at `tau2` (spec 2, 5).
    """

    aligned: AlignedPatcher
    static: StaticPatcher
    tau1: float
    tau2: float

    def __post_init__(self) -> None:
        if not 0 <= self.tau1 <= self.tau2 <= 1:
            raise ValueError(f"tau1={self.tau1}, tau2={self.tau2} must satisfy 0 <= tau1 <= tau2 <= 1")

    def aligned_probability(self, progress: float) -> float:
        if progress < self.tau1:
            return 1.0
        if progress >= self.tau2:
            return 0.0
        return 1 - (progress - self.tau1) / (self.tau2 - self.tau1)

    def __call__(self, laid_out: LaidOut, draw: float, progress: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        return (self.aligned if draw < self.aligned_probability(progress) else self.static)(laid_out, draw, progress)


@dataclass(frozen=True, kw_only=True)
class PatcherConfig:
    """How speech tokens are grouped into the units of a latent model. A field that only some kinds use names them in
    brackets."""

    kind: Literal["none", "static", "aligned", "mixed", "curriculum", "entropy"]
    """How patches are cut. "none": every token is a unit. "static": patches of `patch_size` speech tokens. "aligned":
    one patch per spoken word, from the alignment in the data. "mixed": each sequence is aligned or static by chance.
    "curriculum": aligned at first, static at the end of training. "entropy": a patch ends where a small model becomes
    unsure."""
    patch_size: int = 4
    """Speech tokens per static patch (static, mixed, curriculum). Larger: fewer units, so less compute, and coarser
    patches."""
    silence: Literal["separate", "merged"] = "separate"
    """Where silence goes (aligned, mixed, curriculum). "separate": each run of it is a patch of its own. "merged": it
    joins the word before it; at the start of a span the word after it."""
    units: Literal["words", "pieces"] = "words"
    """What an aligned patch covers (aligned, mixed, curriculum): "words", or "pieces", which also cuts words where the
    data marks pieces of the text tokenizer."""
    aligned_probability: float = 0.5
    """Share of the sequences that is aligned (mixed), 0 to 1; the others are static."""
    tau1: float = 1 / 3
    """Share of the training after which the first sequences become static (curriculum), 0 to `tau2`. Before it all are
    aligned."""
    tau2: float = 2 / 3
    """Share of the training after which all sequences are static (curriculum), `tau1` to 1. Between the two the share
    of aligned ones falls evenly."""
    boundary_noise: BoundaryNoise | None = None
    """Random moves of the ends of aligned patches in training (aligned, mixed, curriculum). None: no moves."""
    entropy: EntropyConfig | None = None
    """The small model and its threshold; given with kind "entropy", and only with it."""

    def build(self) -> Patcher:
        """Raises ValueError on a value out of range, and on noise or an entropy model that the kind has no use for."""
        if self.boundary_noise is not None and self.kind not in ("aligned", "mixed", "curriculum"):
            raise ValueError(
                f"boundary_noise moves the boundaries of an aligner and kind={self.kind!r} has none; leave it out"
            )
        if (self.entropy is None) == (self.kind == "entropy"):
            raise ValueError(
                f"kind={self.kind!r} with entropy={self.entropy}: give the entropy model and its threshold with "
                "kind='entropy', and only with it"
            )
        if self.entropy is not None:
            return self.entropy.build()
        if self.kind == "none":
            return NoPatcher()
        aligned = AlignedPatcher(silence=self.silence, units=self.units, noise=self.boundary_noise)
        if self.kind == "aligned":
            return aligned
        static = StaticPatcher(self.patch_size)
        if self.kind == "static":
            return static
        if self.kind == "mixed":
            return MixedPatcher(aligned=aligned, static=static, aligned_probability=self.aligned_probability)
        return CurriculumPatcher(aligned=aligned, static=static, tau1=self.tau1, tau2=self.tau2)


def eval_patcher(config: PatcherConfig) -> Patcher:
    """The patcher that a model trained with `config` is tested with (spec 2, 9): static for mixed and curriculum.

    Every other kind is tested with itself, but without the noise, which is an augmentation.
    """
    if config.kind in ("mixed", "curriculum"):
        return StaticPatcher(config.patch_size)
    return replace(config, boundary_noise=None).build()
