"""The verbs: what each stage must be able to do, so that stages never import each other.

State is an argument and a result, never hidden in a module. `forward` (whole sequence) and `step` (incremental) are
twins, and a contract test proves them equal for every implementation.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from speechquilt.types import AlignedWord, Batch, LaidOut, SpokenSpan, Utterance, Waveform


@runtime_checkable
class SpeechTokenizer(Protocol):
    """Waveform -> speech tokens, one codebook."""

    sample_rate: int  # Hz of the waveforms it takes
    frame_rate: float  # speech tokens per second
    vocab_size: int  # codebook entries
    lookahead_s: float  # how far past a token's end the audio can still change it

    @property
    def fingerprint(self) -> str:
        """Changes whenever the tokens could; stored in every shard."""
        ...

    def encode(self, wav_BS: torch.Tensor, num_samples_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Right-padded audio -> `ids_BT` (int64, 0 in the padding), `num_tokens_B` = ceil(samples / token samples)."""
        ...

    def init_state(self) -> Any: ...

    def step(self, wav_S: torch.Tensor, state: Any, *, final: bool = False) -> tuple[torch.Tensor, Any]:
        """Any number of new samples -> the tokens `ids_T` that are now certain, and the new state."""
        ...


class TextToSpeech(Protocol):
    """Text -> waveform with word times."""

    voices: Sequence[str]

    def speak(self, text: str, voice: str) -> Utterance: ...


class TextToToken(Protocol):
    """Text -> speech tokens without audio. Each result is a speech Segment's content, or a reject with its reason."""

    frame_rate: float  # speech tokens per second

    def generate(self, texts: Sequence[str], seeds: Sequence[int]) -> list[SpokenSpan]:
        """Same seed, same text, same output, whatever else is in the call."""
        ...


class Patcher(Protocol):
    """Fills the two booleans that drive the latent model.

    The same document, `draw` and `progress` always give the same patches. `draw` is a uniform number in [0, 1) that is
    a pure function of the sample's global index and the run's seed, for patchers that choose at random; `progress` is
    the share of the run that is done, in [0, 1], for patchers that follow a curriculum.
    """

    @property
    def causal(self) -> bool:
        """False: needs side information (word ends); for training and likelihoods only."""
        ...

    def __call__(self, laid_out: LaidOut, draw: float, progress: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """-> `opens_T`, `closes_T`, bool."""
        ...

    def init_state(self) -> Any: ...

    def step(self, token_id: int, is_speech: bool, state: Any) -> tuple[bool, bool, Any]:
        """One token (its model id) -> (opens, closes, state). The given state may not be used again.

        Raises ValueError when not causal.
        """
        ...


@runtime_checkable
class LanguageModel(Protocol):
    """Next-token logits over the whole vocabulary."""

    def forward(self, batch: Batch) -> torch.Tensor:
        """-> `logits_BTV`; the logits at t depend on tokens <= t of the same document alone."""
        ...

    def init_state(self, num_rows: int, max_tokens: int) -> Any: ...

    def step(
        self,
        ids_B: torch.Tensor,
        opens_B: torch.Tensor,
        closes_B: torch.Tensor,
        state: Any,
        active_B: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Any]:
        """One token per row -> `logits_BV` for the next, and the new state.

        Rows where `active_B` is False are left alone; `state.reset(rows_B)` begins a new document in some rows.
        """
        ...


@runtime_checkable
class LogitsAt(LanguageModel, Protocol):
    """Computes no logits but those that are asked for."""

    def logits_at(self, batch: Batch, wanted_BT: torch.Tensor) -> torch.Tensor:
        """-> `logits_NV`, those of `forward` at the N places where bool `wanted_BT` is True, in row order."""
        ...


@runtime_checkable
class ReadsOn(LanguageModel, Protocol):
    """Takes many tokens of a row at once, so that what several rows begin with is read once and its state repeated."""

    def read_on(
        self, ids_BT: torch.Tensor, num_B: torch.Tensor, state: Any, wanted_BT: torch.Tensor
    ) -> tuple[torch.Tensor, Any]:
        """Row b reads the first `num_B[b]` of its ids -> `logits_NV` as of `logits_at`, and the new state.

        `state.repeated(rows_R)` copies rows, each as often as it is named.
        """
        ...


Objective = Callable[[Any, Any], tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]
"""(model, batch) -> (summed loss, its weight, sums of named scalars).

Sums, not means: the trainer adds loss, weight and scalars over micro-batches and ranks and divides once, so that two
processes give exactly what one gives. A scalar `x` is divided by the scalar `x_weight` when there is one, else by the
loss's weight; a scalar `total_x` is never divided but added up over the whole run (tokens, units, FLOPs seen).
"""


class Loader(Protocol):
    """Yields batches for ever; `state_dict()` after batch n resumes with batch n + 1, bit for bit."""

    def next_batch(self) -> Any: ...

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...


class Task(Protocol):
    """Scores a model on one thing. `name` and `version` go into results.json with every number."""

    name: str
    version: int

    def run(self, scorer: Any) -> dict[str, Any]: ...


@runtime_checkable
class Aligner(Protocol):
    """Recording + transcript -> word times."""

    def align(self, waveform: Waveform, text: str) -> tuple[AlignedWord, ...]:
        """One word per whitespace-separated word of `text`, in its spelling and order, with times inside the audio.

        `score` lies in [0, 1]. A word whose times were not heard lies between its neighbours with score 0. Raises
        ValueError when the audio cannot be used, when no word can be found, or when the text is too long for the audio.
        """
        ...


@runtime_checkable
class Vocoder(Protocol):
    """Log-mel frames -> waveform at their rate, `mel.hop` samples per frame."""

    mel: Any  # the decoder's MelConfig: another mel's frames would be noise to it
    lookahead_frames: int  # how many frames after its own can still change a frame's samples

    def forward(self, mel_BMF: torch.Tensor, num_frames_B: torch.Tensor) -> torch.Tensor:
        """Right-padded frames -> `wav_BS`, S = F * hop, 0 past a row's end. A row is what it is alone."""
        ...

    def init_state(self) -> Any: ...

    def step(self, mel_MF: torch.Tensor, state: Any, *, final: bool = False) -> tuple[torch.Tensor, Any]:
        """Any number of new frames -> the samples `wav_S` that are now certain, and the new state.

        The samples of frame f are there when frame f + `lookahead_frames` is, or at the end.
        """
        ...
