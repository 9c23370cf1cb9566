"""Tokens while the audio is still arriving, equal to those of the whole audio.

Place in the pipeline: layer 2, the incremental twin of `TokenEncoder.encode` for causal models; `windows.step` serves the others.
Trap: nothing is certain before its block is complete, since frames see to the end of their block; so samples wait here
until then, and a block is computed once, from its own samples, a little context and the keys and values of its window.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from speechquilt.tokenizer import windows
from speechquilt.tokenizer.encoder import KeyValues

if TYPE_CHECKING:
    from speechquilt.tokenizer.token_encoder import TokenEncoder

# A frame's features reach back 4 mel frames of 160 samples through the two convolutions and 240 samples through the
# analysis window: 880 samples, less than 3 encoder frames of 320.
CONTEXT_FRAMES = 3


@dataclass(frozen=True)
class StreamState:
    """Bounded by one window. `wav_S`: context, then the samples of the block that is not complete yet; `num_context`:
    how many of them are context (0 at a window's start); `frame`: where the block starts in its window; `past`: keys and
    values of the window's earlier frames, one pair per layer."""

    wav_S: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    num_context: int = 0
    frame: int = 0
    past: tuple[KeyValues, ...] = ()


def step(
    model: "TokenEncoder", wav_S: torch.Tensor, state: StreamState, final: bool
) -> tuple[torch.Tensor, StreamState]:
    """See `TokenEncoder.step`. Raises ValueError on audio that is not 1-D, float and finite."""
    config = model.config
    windows.check_samples(wav_S)
    state = StreamState(torch.cat([state.wav_S, wav_S.to(device="cpu", dtype=torch.float32)]), *_rest(state))
    frame_samples = model.token_samples // config.pooling
    ids = []
    while True:
        num_frames = min(config.block_frames, config.max_frames - state.frame)
        stop = state.num_context + num_frames * frame_samples
        if len(state.wav_S) < stop:
            break
        ids_T, state = _block(model, state, stop)
        ids.append(ids_T)
    if final:
        num_new = len(state.wav_S) - state.num_context
        if num_new:
            padded_S = torch.nn.functional.pad(state.wav_S, (0, -num_new % model.token_samples))
            ids.append(_block(model, StreamState(padded_S, *_rest(state)), len(padded_S))[0])
        state = StreamState()
    return torch.cat(ids) if ids else torch.zeros(0, dtype=torch.long, device=model.device), state


def _rest(state: StreamState) -> tuple[int, int, tuple[KeyValues, ...]]:
    return state.num_context, state.frame, state.past


def _block(model: "TokenEncoder", state: StreamState, stop: int) -> tuple[torch.Tensor, StreamState]:
    """Tokens of the block that ends with sample `stop` of the buffer, and the state at the next block's start."""
    frame_samples = model.token_samples // model.config.pooling
    end_frame = state.frame + (stop - state.num_context) // frame_samples
    pooled_BTD, past = model.frames(
        state.wav_S[None, :stop].to(model.device),
        torch.tensor([end_frame * frame_samples], device=model.device),
        skip=state.num_context // frame_samples,
        past=list(state.past) or None,
    )
    ids_T = model.quantizer.encode(pooled_BTD)[0]
    if end_frame >= model.config.max_frames:
        return ids_T, StreamState(state.wav_S[stop:])
    num_context = min(CONTEXT_FRAMES * frame_samples, stop)
    return ids_T, StreamState(state.wav_S[stop - num_context :], num_context, end_frame, tuple(past))
