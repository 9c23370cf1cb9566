"""Tokens of a causal `TokenEncoder` while the audio is still arriving, equal to those that `encode` gives for all of
it.

Frames see to the end of their block, so samples wait here until a block is complete. Then it is computed once, from its
own samples, a few before it, and the keys and values of its window.
Trap: keys and values hold positions of their window. They are of no use in the next one, whose first block therefore
encodes the carried context again.
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
    """What is kept between two steps, at most a window of it.

    `wav_S`: samples that were heard and are needed again, then those of the block that is not complete yet;
    `num_heard`: how many of them were heard; `frame`: where the block starts in its window; `past`: keys and values of
    the window's earlier frames, one pair per layer, none before the window's first block.
    """

    wav_S: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    num_heard: int = 0
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
        stop = state.num_heard + num_frames * frame_samples
        if len(state.wav_S) < stop:
            break
        ids_T, state = _block(model, state, stop)
        ids.append(ids_T)
    if final:
        num_new = len(state.wav_S) - state.num_heard
        if num_new:
            padded_S = torch.nn.functional.pad(state.wav_S, (0, -num_new % model.token_samples))
            ids.append(_block(model, StreamState(padded_S, *_rest(state)), len(padded_S))[0])
        state = StreamState()
    return torch.cat(ids) if ids else torch.zeros(0, dtype=torch.long, device=model.device), state


def _rest(state: StreamState) -> tuple[int, int, tuple[KeyValues, ...]]:
    return state.num_heard, state.frame, state.past


def _block(model: "TokenEncoder", state: StreamState, stop: int) -> tuple[torch.Tensor, StreamState]:
    """Tokens of the block that ends with sample `stop` of the buffer, and the state at the next block's start."""
    config = model.config
    frame_samples = model.token_samples // config.pooling
    end_frame = state.frame + (stop - state.num_heard) // frame_samples
    # The first block of a window takes all samples that were heard as part of the window. A later one takes only those
    # that the features of its first frames reach back to.
    lead = min(CONTEXT_FRAMES * frame_samples, state.num_heard) if state.past else 0
    start = state.num_heard - lead if state.past else 0
    pooled_BTD, past = model.frames(
        state.wav_S[None, start:stop].to(model.device),
        torch.tensor([end_frame * frame_samples], device=model.device),
        skip=lead // frame_samples,
        past=list(state.past) or None,
    )
    given = 0 if state.past else state.num_heard // model.token_samples
    ids_T = model.quantizer.encode(pooled_BTD[:, given:])[0]
    if end_frame >= config.max_frames:
        num_heard = config.context_frames * frame_samples
        return ids_T, StreamState(state.wav_S[stop - num_heard :], num_heard, config.context_frames)
    num_heard = min(max(CONTEXT_FRAMES, config.context_frames) * frame_samples, stop)
    return ids_T, StreamState(state.wav_S[stop - num_heard :], num_heard, end_frame, tuple(past))
