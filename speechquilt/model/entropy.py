"""Entropy patching, as in BLT: a patch ends where a small speech LM no longer knows what comes next.

It needs no alignment, but a `PlainLM` folder trained beforehand.
Trap: `__call__` and `step` compute the same entropies in another order, so they differ by rounding. The LM runs in
float64 and `calibrate` keeps the threshold away from every entropy it has seen, so that no decision depends on the last
bit.
"""

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from speechquilt.model import saving
from speechquilt.model.plain import PlainLM
from speechquilt.nn.attention import KVState
from speechquilt.types import IGNORE, Batch, LaidOut

_FIRST_CACHE = 128  # tokens; doubles whenever a span outgrows it
_CLEAR_GAP = 1e-9  # nats between two entropies, enough for a threshold between them


@dataclass(frozen=True, kw_only=True)
class EntropyConfig:
    """Patches that end where a small language model becomes unsure of the next token."""

    model: str
    """Folder of that small model: a trained plain language model with the same vocabulary as the run."""
    threshold: float
    """A patch ends after a token when the entropy of what may follow it exceeds this, in nats. Higher: longer patches.
    `calibrate` finds the value for a wanted mean length."""
    max_patch_size: int
    """Longest patch, in speech tokens: it ends there whatever the entropy."""

    def build(self) -> "EntropyPatcher":
        """Raises FileNotFoundError without the model, ValueError when it is of another kind."""
        model = saving.load(Path(self.model))
        if not isinstance(model, PlainLM):
            raise ValueError(f"entropy.model={self.model} is a {type(model).__name__}; train a plain LM for entropies")
        return EntropyPatcher(model, self)


@dataclass(frozen=True, kw_only=True)
class EntropyState:
    """`marker`: id of the last token that was no speech; `num_open` tokens in the open patch; `cache` of the LM after
    `num_read` tokens of this span (the marker included), None before its first speech token."""

    marker: int | None = None
    num_open: int = 0
    num_read: int = 0
    cache: KVState | None = None


class EntropyPatcher:
    """A patch closes at speech token t when the entropy of the next token after t exceeds the threshold, or when it has
    `max_patch_size` tokens. Both are known once t is read, so the patcher is causal (spec 2, 6.4).

    The LM reads the marker and the tokens of one span, nothing before it. `model` is turned to float64 in place.
    """

    causal = True

    def __init__(self, model: PlainLM, config: EntropyConfig) -> None:
        if config.max_patch_size < 1:
            raise ValueError(f"entropy.max_patch_size={config.max_patch_size} must be at least 1")
        self.model, self.config = model.double().eval(), config

    def __call__(self, laid_out: LaidOut, draw: float, progress: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        closes_T = ~laid_out.is_speech_T
        for start, entropy_S in _span_entropies(self.model, laid_out):
            closes_T[start : start + len(entropy_S)] = self._ends(entropy_S)
        return np.append(True, closes_T[:-1]) | ~laid_out.is_speech_T, closes_T

    def init_state(self) -> EntropyState:
        return EntropyState()

    def step(self, token_id: int, is_speech: bool, state: EntropyState) -> tuple[bool, bool, EntropyState]:
        """The given state may not be used again: its cache is written in place."""
        if not is_speech:
            return True, True, EntropyState(marker=token_id)
        entropy, state = self._read(token_id, state)
        size = state.num_open + 1
        closes = entropy > self.config.threshold or size == self.config.max_patch_size
        return size == 1, closes, replace(state, num_open=0 if closes else size)

    def _ends(self, entropy_S: np.ndarray) -> np.ndarray:
        return _patch_ends(entropy_S > self.config.threshold, self.config.max_patch_size)

    def _read(self, token_id: int, state: EntropyState) -> tuple[float, EntropyState]:
        """Entropy after one more speech token, in nats."""
        cache, num_read, new = state.cache, state.num_read, [token_id]
        if cache is None:
            new = [_marker(state.marker), token_id]
            cache = self.model.init_state(1, _FIRST_CACHE)
        _check_vocabulary(max(new), self.model)
        for i in new:
            cache = _with_room(cache, num_read + 1)
            logits_BV, cache = self.model.step(torch.tensor([i]), None, None, cache)
            num_read += 1
        return float(_entropy(logits_BV)[0]), replace(state, num_read=num_read, cache=cache)


def calibrate(model: PlainLM, documents: Sequence[LaidOut], *, patch_size: float, max_patch_size: int) -> float:
    """The threshold in nats at which patches hold `patch_size` speech tokens on average over these documents.

    `model` is turned to float64 in place. Raises ValueError when there is no speech, or when no threshold gives that
    mean to within a tenth: `max_patch_size` is too near, or the entropies are all alike.
    """
    model.double().eval()
    spans = [entropy_S for x in documents for _, entropy_S in _span_entropies(model, x)]
    if not spans:
        raise ValueError("calibrate needs documents with speech; none of these has any")
    seen_N = np.unique(np.concatenate(spans))
    clear_N = np.flatnonzero(np.diff(seen_N) > _CLEAR_GAP)
    candidates_N = np.concatenate([[seen_N[0] - 1], (seen_N[clear_N] + seen_N[clear_N + 1]) / 2, [seen_N[-1] + 1]])

    def mean_size(threshold: float) -> float:
        patches = sum(_num_patches(_patch_ends(entropy_S > threshold, max_patch_size)) for entropy_S in spans)
        return sum(map(len, spans)) / patches

    # A higher threshold never makes more patches, so the mean grows along the candidates.
    above = bisect.bisect_left(candidates_N, patch_size, key=mean_size)
    near = candidates_N[max(0, above - 1) : above + 1]
    best = float(min(near, key=lambda threshold: abs(mean_size(threshold) - patch_size)))
    if abs(mean_size(best) - patch_size) > 0.1 * patch_size:
        raise ValueError(
            f"patch_size={patch_size} cannot be reached: the nearest mean is {mean_size(best):.2f} tokens with "
            f"max_patch_size={max_patch_size}; raise max_patch_size, train the entropy model longer, or ask for that mean"
        )
    return best


@torch.no_grad()
def _span_entropies(model: PlainLM, laid_out: LaidOut) -> Iterator[tuple[int, np.ndarray]]:
    """Every span of speech as (its first token, `entropy_S`): entropy in nats of what follows each of its S tokens."""
    edges_T = np.diff(np.concatenate([[0], laid_out.is_speech_T.astype(np.int8), [0]]))
    for start, stop in zip(np.flatnonzero(edges_T > 0).tolist(), np.flatnonzero(edges_T < 0).tolist()):
        marker = _marker(int(laid_out.ids_T[start - 1]) if start else None)
        ids_S = np.append(marker, laid_out.ids_T[start:stop])
        _check_vocabulary(int(ids_S.max()), model)
        ids_BS = torch.from_numpy(ids_S)[None]
        logits_BSV = model(
            Batch(ids_BT=ids_BS, labels_BT=torch.full_like(ids_BS, IGNORE), doc_BT=torch.zeros_like(ids_BS))
        )
        yield start, _entropy(logits_BSV)[0, 1:].numpy()


def _entropy(logits_V: torch.Tensor) -> torch.Tensor:
    """Over the last axis, in nats."""
    log_probs_V = logits_V.log_softmax(-1)
    return -(log_probs_V.exp() * log_probs_V).sum(-1)


def _patch_ends(over_S: np.ndarray, max_patch_size: int) -> np.ndarray:
    """Bool `[S]`: where `over_S` is True, and every `max_patch_size` tokens after the last such place."""
    index_S = np.arange(len(over_S))
    last_over_S = np.maximum.accumulate(np.append(-1, np.where(over_S, index_S, -1)[:-1]))
    return over_S | ((index_S - last_over_S) % max_patch_size == 0)


def _num_patches(ends_S: np.ndarray) -> int:
    return int(ends_S.sum()) + int(not ends_S[-1])


def _marker(before: int | None) -> int:
    if before is None:
        raise ValueError(
            "speech comes before any marker; a laid-out document begins with BOS and each span with a marker"
        )
    return before


def _check_vocabulary(largest_id: int, model: PlainLM) -> None:
    if largest_id >= model.config.vocab_size:
        raise ValueError(
            f"id {largest_id} is outside the entropy model's vocabulary of {model.config.vocab_size}; "
            "train that model with this run's tokenizers"
        )


def _with_room(cache: KVState, num_tokens: int) -> KVState:
    """A cache for at least `num_tokens` tokens."""
    room = cache.k_LBSHK.shape[2]
    if num_tokens <= room:
        return cache
    k_LBSHK, v_LBSHK = (F.pad(x, (0, 0, 0, 0, 0, room)) for x in (cache.k_LBSHK, cache.v_LBSHK))
    return replace(cache, k_LBSHK=k_LBSHK, v_LBSHK=v_LBSHK)
