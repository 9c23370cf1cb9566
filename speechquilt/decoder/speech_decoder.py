"""Speech tokens -> sound: a flow that makes mel frames and a vocoder that makes samples of them, as one.

On disk it is the folder of the flow with the vocoder's in `vocoder/`.
Trap: samples are final once given, and come late: a block of tokens must be complete, and the vocoder looks some frames
ahead (`delay_s`).

Axis letters: T tokens, S samples, E speaker vector.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from speechquilt.decoder import flow_folder, mel_stream, vocoder_folder
from speechquilt.decoder.flow import FlowDecoder
from speechquilt.decoder.hifi_gan import HifiGan
from speechquilt.decoder.vocoder_folder import OwnVocoder
from speechquilt.types import Waveform

VOCODER = "vocoder"  # folder inside the decoder's


@dataclass(frozen=True)
class SoundState:
    """Where one utterance stands: the flow's state, and the vocoder's."""

    flow: mel_stream.StreamState
    vocoder: Any


class SpeechDecoder:
    """Both halves. Raises ValueError when the vocoder takes another mel than the flow makes."""

    def __init__(self, flow: FlowDecoder, vocoder: OwnVocoder | HifiGan) -> None:
        flow.config.mel.require(vocoder.mel, "the vocoder")
        self.flow, self.vocoder = flow, vocoder
        self.sample_rate = flow.config.mel.sample_rate

    @property
    def delay_s(self) -> float:
        """Longest time from a token's start until its samples are given."""
        return self.flow.delay_s + self._vocoder_delay_s

    @property
    def first_delay_s(self) -> float:
        """Speech that must have come before the first samples are given; the vocoder's frames ahead are of it."""
        return self.flow.first_delay_s

    @property
    def _vocoder_delay_s(self) -> float:
        return self.vocoder.lookahead_frames / self.flow.config.mel.frame_rate

    def init_state(self, seed: int = 0, speaker_E: torch.Tensor | None = None) -> SoundState:
        """A new utterance. Raises as `FlowDecoder.init_state`."""
        return SoundState(self.flow.init_state(seed, speaker_E), self.vocoder.init_state())

    def step(self, ids_T: torch.Tensor, state: SoundState, *, final: bool = False) -> tuple[torch.Tensor, SoundState]:
        """Any number of new tokens -> the samples `wav_S` that are certain now, and the new state.

        However the tokens come, all samples together are the same. `final` gives the rest; the state is then fresh, of the
        same seed and speaker. Raises ValueError on ids that are not of the codebook.
        """
        waves, states = self.step_many([ids_T], [state], [final])
        return waves[0], states[0]

    def step_many(
        self, ids: Sequence[torch.Tensor], states: Sequence[SoundState], final: Sequence[bool]
    ) -> tuple[list[torch.Tensor], list[SoundState]]:
        """`step` of many utterances at once: one pass of the flow for all, the vocoder one after the other."""
        mels, flows = self.flow.step_many(ids, [state.flow for state in states], final)
        waves, after = [], []
        for mel_MF, flow, state, last in zip(mels, flows, states, final):
            wav_S, vocoder = self.vocoder.step(mel_MF, state.vocoder, final=last)
            waves.append(wav_S)
            after.append(SoundState(flow, vocoder))
        return waves, after

    def speak(
        self,
        tokens: Sequence[np.ndarray],
        seeds: Sequence[int] | None = None,
        speakers: Sequence[torch.Tensor | None] | None = None,
    ) -> list[Waveform]:
        """Whole utterances, block by block, as `step` gives them; seed 0 where none is given. Nothing becomes nothing."""
        states = [
            self.init_state(seed, speaker_E)
            for seed, speaker_E in zip(seeds or [0] * len(tokens), speakers or [None] * len(tokens), strict=True)
        ]
        ids = [torch.as_tensor(np.asarray(ids_T), dtype=torch.long) for ids_T in tokens]
        waves, _ = self.step_many(ids, states, [True] * len(ids))
        return [Waveform(samples_S=wav_S.clamp(-1, 1).cpu().numpy(), sample_rate=self.sample_rate) for wav_S in waves]

    def save(self, folder: Path) -> None:
        """Write both halves; a HiFi-GAN of transformers keeps its own folder and is refused."""
        if isinstance(self.vocoder, HifiGan):
            raise ValueError("a HiFi-GAN of transformers is not written again; copy its folder to vocoder/")
        flow_folder.save(self.flow, folder)
        vocoder_folder.save(self.vocoder, folder / VOCODER)


def load(folder: Path) -> SpeechDecoder:
    """What `save` wrote, on CPU and in eval mode. Raises as `flow_folder.load` and `vocoder_folder.load`."""
    return SpeechDecoder(flow_folder.load(Path(folder)), vocoder_folder.load(Path(folder) / VOCODER))
