"""Audio of any length in windows of bounded length, offline and as it arrives, for networks that see a whole window.

Trap: nothing of a window is certain before its last sample is there. Such a tokenizer streams, but with a look-ahead of
a window; what is causal inside the window (`streaming.py`) need not wait.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from speechquilt.nn.batching import valid_places

ENDLESS = sys.maxsize  # tokens of a clip whose end is not known


@dataclass(frozen=True)
class Window:
    """In tokens of the clip: the window reads `start` to `stop` and gives the tokens `first` to `last`."""

    start: int
    stop: int
    first: int
    last: int


@dataclass(frozen=True, kw_only=True)
class WindowRule:
    """Each window gives `core` tokens and reads up to `margin` tokens more on either side, as far as the clip goes.

    `context`: a window after the first reads this many tokens more before its own and gives as many fewer, so no window
    is longer than the first, and every token but the clip's first ones has heard `context` tokens before it.
    """

    core: int
    margin: int = 0
    context: int = 0

    def __post_init__(self) -> None:
        if self.core < 1 or self.margin < 0:
            raise ValueError(f"core={self.core} must be at least 1 token and margin={self.margin} not negative")
        if not 0 <= self.context < self.core:
            raise ValueError(f"context={self.context} must be at least 0 and less than core={self.core} tokens")

    def window(self, first: int, num_tokens: int) -> Window:
        """The window whose tokens begin with `first`, 0 or the `last` of another, in a clip of `num_tokens`."""
        last = min(first + self.core - (self.context if first else 0), num_tokens)
        start = max(first - self.margin - self.context, 0)
        return Window(start, min(last + self.margin, num_tokens), first, last)

    def windows(self, num_tokens: int) -> Iterator[Window]:
        """All windows of a clip; their tokens follow each other without gap or overlap."""
        first = 0
        while first < num_tokens:
            window = self.window(first, num_tokens)
            yield window
            first = window.last

    @property
    def lookahead_tokens(self) -> int:
        """The most tokens after its own end that a token may depend on, which is so for the first token of a core."""
        return self.core - 1 + self.margin


@dataclass(frozen=True)
class WindowState:
    """`wav_S`: samples from the start of the next window on, on CPU; `first`: the next token."""

    wav_S: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    first: int = 0


def step(
    rule: WindowRule,
    token_samples: int,
    encode_S: Callable[[torch.Tensor], torch.Tensor],
    wav_S: torch.Tensor,
    state: WindowState,
    final: bool,
    device: torch.device,
) -> tuple[torch.Tensor, WindowState]:
    """New samples -> the tokens of every window that is now complete, and the new state.

    `encode_S` turns one window's samples into all of its tokens, int64 `[T]` on `device`. Raises ValueError on audio
    that is not 1-D, float and finite.
    """
    check_samples(wav_S)
    waiting_S, first = torch.cat([state.wav_S, wav_S.to(device="cpu", dtype=torch.float32)]), state.first
    ids = [torch.zeros(0, dtype=torch.long, device=device)]
    while True:
        window = rule.window(first, ENDLESS)
        if len(waiting_S) < (window.stop - window.start) * token_samples:
            window = rule.window(first, window.start + -(-len(waiting_S) // token_samples))
            if not final or window.last <= first:
                break
        ids_T = encode_S(waiting_S[: (window.stop - window.start) * token_samples])
        ids.append(ids_T[window.first - window.start : window.last - window.start])
        first = window.last
        waiting_S = waiting_S[(rule.window(first, ENDLESS).start - window.start) * token_samples :]
    return torch.cat(ids), WindowState() if final else WindowState(waiting_S, first)


def check_samples(wav_S: torch.Tensor) -> None:
    """ValueError unless these can be the next samples of a stream."""
    if wav_S.ndim != 1 or not wav_S.is_floating_point() or not torch.isfinite(wav_S).all():
        raise ValueError(f"wav_S of shape {tuple(wav_S.shape)}, {wav_S.dtype}: expected finite float mono samples")


def checked_audio(wav_BS: torch.Tensor, num_samples_B: torch.Tensor) -> torch.Tensor:
    """`wav_BS` with zeros beyond each row's samples. Raises ValueError on empty, too short or non-finite audio."""
    if wav_BS.ndim != 2 or not wav_BS.is_floating_point():
        raise ValueError(
            f"wav_BS is {wav_BS.dtype} of shape {tuple(wav_BS.shape)}; expected float rows of mono samples"
        )
    if int(num_samples_B.min()) < 1:
        raise ValueError("empty audio: num_samples_B has a row without samples; drop it before tokenizing")
    if int(num_samples_B.max()) > wav_BS.shape[1]:
        raise ValueError(f"num_samples_B asks for {int(num_samples_B.max())} samples, wav_BS holds {wav_BS.shape[1]}")
    wav_BS = wav_BS.masked_fill(~valid_places(num_samples_B, wav_BS.shape[1]), 0.0)
    if not torch.isfinite(wav_BS).all():
        raise ValueError("audio has NaN or infinite samples; repair or drop the recording")
    return wav_BS


def to_whole_tokens(wav_BS: torch.Tensor, token_samples: int) -> torch.Tensor:
    """Zero-pad rows to a multiple of `token_samples`."""
    return F.pad(wav_BS, (0, -wav_BS.shape[-1] % token_samples))
