"""Patchers: which tokens open a unit, and after which tokens a unit is known to be complete.

Place in the pipeline: between `vocab.lay_out` and the packer; in generation, between the sampler and `LanguageModel.step`.
Trap: the last token of a *short* patch at a span end does not close it. Nobody knows yet that the span ends; the marker
that follows opens its own unit and thereby completes the short one. Closing it would leak the end of the span (spec 2, 6.4).
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from speechquilt.protocols import Patcher
from speechquilt.types import LaidOut


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

    def step(self, is_speech: bool, state: None) -> tuple[bool, bool, None]:
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

    def step(self, is_speech: bool, state: int) -> tuple[bool, bool, int]:
        if not is_speech:
            return True, True, 0
        return state == 0, state == self.size - 1, (state + 1) % self.size


@dataclass(frozen=True)
class AlignedPatcher:
    """One patch per word and per silence run ("sil-separate"), from the `unit_end_T` the shards carry.

    The end of a word is side information from the aligner, so its last token closes the patch.
    """

    causal = False

    def __call__(self, laid_out: LaidOut, draw: float, progress: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        if laid_out.unit_end_T is None:
            raise ValueError(
                f"document {laid_out.id!r} (source {laid_out.source!r}) has speech without unit_end_T, which aligned "
                "patching needs; align the corpus before making shards, or use kind='static'"
            )
        text_T = ~laid_out.is_speech_T
        ended_T = text_T | (laid_out.unit_end_T > 0)
        return text_T | np.roll(ended_T, 1), ended_T

    def init_state(self) -> Any:
        raise self._not_causal()

    def step(self, is_speech: bool, state: Any) -> tuple[bool, bool, Any]:
        raise self._not_causal()

    def _not_causal(self) -> ValueError:
        return ValueError(
            f"{type(self).__name__} needs word ends that are unknown while generating; "
            "use eval_patcher(config) of a static or curriculum config"
        )


@dataclass(frozen=True)
class CurriculumPatcher(AlignedPatcher):
    """Aligned with probability P(progress), else static: 1 before `tau1`, linear down to 0 at `tau2` (spec 2, 5)."""

    size: int
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
        if draw < self.aligned_probability(progress):
            return super().__call__(laid_out, draw, progress)
        return StaticPatcher(self.size)(laid_out, draw, progress)


@dataclass(frozen=True, kw_only=True)
class PatcherConfig:
    """`patch_size` serves static and curriculum, `tau1` and `tau2` (fractions of training) curriculum alone."""

    kind: Literal["none", "static", "aligned", "curriculum"]
    patch_size: int = 4
    tau1: float = 1 / 3
    tau2: float = 2 / 3

    def build(self) -> Patcher:
        if self.kind == "none":
            return NoPatcher()
        if self.kind == "static":
            return StaticPatcher(self.patch_size)
        if self.kind == "aligned":
            return AlignedPatcher()
        return CurriculumPatcher(self.patch_size, self.tau1, self.tau2)


def eval_patcher(config: PatcherConfig) -> Patcher:
    """What a model trained with `config` is tested with: static for curriculum, else the same (spec 2, 9)."""
    return StaticPatcher(config.patch_size) if config.kind == "curriculum" else config.build()
