"""Tokens -> mel block by block, the same frames however the tokens come in (spec 1, 3.3).

A block is generated once, with a window of the past before it: the last tokens and the frames that were given for them,
as a prompt. So a block costs the same however long the utterance is, and memory stays small.
Trap: blocks lie at fixed places of the utterance. Only `final` makes a shorter one, so a session that stalls gets the
rest of its block when more tokens or `final` come, and not before.

Joints: the prompt makes a block continue the frames that were given. The release also fades each block's start over the
end of the one before, which was made without what follows; `overlap_tokens` does that, and its 5 tokens there cost 0.4 s
of delay. Without it a frame is given once and is final, so it is off unless asked for.

Axis letters: T tokens, F mel frames, M mel bands, E speaker vector.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from speechquilt.decoder.flow import FlowDecoder


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """How an utterance is cut into blocks that are generated one after the other."""

    chunk_tokens: tuple[int, ...] = (10,)
    """Tokens in each block; the last number is repeated. A smaller first one: sound starts sooner. GLM-4-Voice's demo
    has 25, 50, 100, 150, 200."""
    prompt_tokens: int = 30
    """Tokens before a block that are heard again with it, together with their frames; rounded up to whole blocks of the
    encoder. More: a steadier voice, and more to compute for every block."""
    overlap_tokens: int = 0
    """Tokens whose frames a block holds back and fades into those that the next block makes for them; less than the
    smallest of `chunk_tokens` and at most `prompt_tokens`. It delays all sound by as much. The release has 5; 0: the
    prompt alone joins the blocks."""

    def __post_init__(self) -> None:
        if not self.chunk_tokens or min(self.chunk_tokens) < 1:
            raise ValueError(f"chunk_tokens={self.chunk_tokens} must be one or more numbers of at least 1 token")
        if self.prompt_tokens < 0:
            raise ValueError(f"prompt_tokens={self.prompt_tokens} must be at least 0")
        if not 0 <= self.overlap_tokens < min(self.chunk_tokens) or self.overlap_tokens > self.prompt_tokens:
            raise ValueError(
                f"overlap_tokens={self.overlap_tokens} must be at least 0, less than the smallest of "
                f"chunk_tokens={self.chunk_tokens} and at most prompt_tokens={self.prompt_tokens}"
            )

    @property
    def delay_tokens(self) -> int:
        """Most tokens, itself counted, that must have come since a token began until its frames are given."""
        return max(self.chunk_tokens) + self.overlap_tokens

    def end_of_chunk(self, start: int) -> int:
        """Where the block ends that begins at token `start`, itself the end of another or 0."""
        end = 0
        for size in self.chunk_tokens:
            end += size
            if end > start:
                return end
        return start + self.chunk_tokens[-1]


@dataclass(frozen=True)
class Window:
    """A stretch of one utterance that is to be generated: `ids_T`, at least one; `first`, the place of its first token,
    where a block of the encoder begins; `mel_MF`, its first frames, as far as they are known already."""

    ids_T: torch.Tensor
    first: int
    mel_MF: torch.Tensor
    seed: int
    speaker_E: torch.Tensor | None


@dataclass(frozen=True)
class StreamState:
    """What is kept between two steps: a window of the past, and the tokens of the block that is not complete.

    `ids_T`: tokens from place `first` on, in the utterance; `done`: tokens that were generated; `mel_MF`: the frames
    that were given, from those of token `first` on; `held_MF`: frames that follow them and are held back.
    """

    seed: int
    speaker_E: torch.Tensor | None
    ids_T: torch.Tensor
    mel_MF: torch.Tensor
    held_MF: torch.Tensor
    first: int = 0
    done: int = 0

    @property
    def received(self) -> int:
        """Tokens of the utterance so far."""
        return self.first + len(self.ids_T)


def begin(model: "FlowDecoder", seed: int, speaker_E: torch.Tensor | None) -> StreamState:
    """See `FlowDecoder.init_state`."""
    if seed < 0:
        raise ValueError(f"seed={seed} must be at least 0")
    width = model.config.speaker_width
    if speaker_E is not None and (speaker_E.shape != (width,) or not torch.isfinite(speaker_E).all()):
        raise ValueError(
            f"the speaker's vector has shape {tuple(speaker_E.shape)}; speaker_width={width} finite numbers are expected"
        )
    empty_M0 = torch.zeros(model.config.mel.num_mels, 0, device=model.device)
    return StreamState(seed, speaker_E, torch.zeros(0, dtype=torch.long), empty_M0, empty_M0)


def step_many(
    model: "FlowDecoder", ids: Sequence[torch.Tensor], states: Sequence[StreamState], final: Sequence[bool]
) -> tuple[list[torch.Tensor], list[StreamState]]:
    """See `FlowDecoder.step_many`."""
    if not len(ids) == len(states) == len(final):
        raise ValueError(f"{len(ids)} runs of ids, {len(states)} states and {len(final)} of `final` must be as many")
    now = [
        replace(state, ids_T=torch.cat([state.ids_T, checked_ids(model, ids_T)])) for ids_T, state in zip(ids, states)
    ]
    mels: list[list[torch.Tensor]] = [[] for _ in now]
    while due := [i for i, state in enumerate(now) if _block_end(model, state, final[i])]:
        ends = [_block_end(model, now[i], final[i]) for i in due]
        made = model.generate([_window(now[i], end) for i, end in zip(due, ends)])
        for i, end, mel_MF in zip(due, ends, made):
            given_MF, now[i] = _advanced(model, now[i], end, mel_MF)
            mels[i].append(given_MF)
    for i, last in enumerate(final):
        if last:
            mels[i].append(now[i].held_MF)
            now[i] = begin(model, now[i].seed, now[i].speaker_E)
    empty_M0 = torch.zeros(model.config.mel.num_mels, 0, device=model.device)
    return [torch.cat([empty_M0, *parts], 1) for parts in mels], now


def checked_ids(model: "FlowDecoder", ids_T: torch.Tensor) -> torch.Tensor:
    """The ids as int64 on the CPU. Raises ValueError unless they are one row of whole numbers in the codebook."""
    size = model.config.codebook_size
    if ids_T.ndim != 1 or ids_T.is_floating_point():
        raise ValueError(
            f"speech ids of shape {tuple(ids_T.shape)} and type {ids_T.dtype}; one row of whole numbers is expected"
        )
    ids_T = ids_T.to(device="cpu", dtype=torch.long)
    if len(ids_T) and not 0 <= int(ids_T.min()) <= int(ids_T.max()) < size:
        wrong = ids_T[(ids_T < 0) | (ids_T >= size)][0]
        raise ValueError(
            f"speech id {int(wrong)} must lie in 0..{size - 1} (codebook_size={size}); these are of another tokenizer, "
            "or model ids that were not turned into speech ids"
        )
    return ids_T


def _block_end(model: "FlowDecoder", state: StreamState, final: bool) -> int:
    """The end of the block that can be generated now; 0: none."""
    end = model.config.stream.end_of_chunk(state.done)
    if state.received >= end:
        return end
    return state.received if final and state.received > state.done else 0


def _window(state: StreamState, end: int) -> Window:
    return Window(state.ids_T[: end - state.first], state.first, state.mel_MF, state.seed, state.speaker_E)


def _advanced(
    model: "FlowDecoder", state: StreamState, end: int, window_MF: torch.Tensor
) -> tuple[torch.Tensor, StreamState]:
    """The frames that are given after the block up to token `end`, and the state at the next block's start."""
    stream, time = model.config.stream, model.time
    new_MF = faded(state.held_MF, window_MF[:, state.mel_MF.shape[1] :])
    num_given = max(0, new_MF.shape[1] - time.num_frames(stream.overlap_tokens))
    given_MF = new_MF[:, :num_given].clone()  # not a view of the whole batch, which would be kept as long
    block = model.config.encoder.block_tokens
    first = max(0, end - stream.prompt_tokens) // block * block
    forgotten = time.num_frames(first) - time.num_frames(state.first)
    return given_MF, replace(
        state,
        ids_T=state.ids_T[first - state.first :],
        mel_MF=torch.cat([state.mel_MF, given_MF], 1)[:, forgotten:],
        held_MF=new_MF[:, num_given:].clone(),
        first=first,
        done=end,
    )


def faded(old_MF: torch.Tensor, new_MF: torch.Tensor) -> torch.Tensor:
    """`new_MF`, its first frames faded in over `old_MF` with the halves of a Hamming window.

    The halves are normalised to one: as they are they add up to 1.06 to 1.08 and would lift the log-mel (spec 1, 3.3).
    """
    num_faded = old_MF.shape[1]
    if num_faded == 0:
        return new_MF
    rising_F, falling_F = torch.hamming_window(2 * num_faded, periodic=False, device=new_MF.device).split(num_faded)
    share_F = rising_F / (rising_F + falling_F)
    start_MF = share_F * new_MF[:, :num_faded] + (1 - share_F) * old_MF
    return torch.cat([start_MF, new_MF[:, num_faded:]], 1)
