"""Speech tokens -> log-mel frames by conditional flow matching: the first half of a speech decoder (spec 1, 3).

`forward` is what training needs, `decode` generates block by block, `step` does the same while tokens are still coming,
`decode_whole` generates an utterance in one pass that sees all of it.
Trap: `decode` and `decode_whole` give different mels. A block of `decode` knows a bounded past and nothing of the
future, as in a conversation.

Axis letters: B rows, T tokens, F mel frames, M mel bands, E speaker vector.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from speechquilt.decoder import mel_stream
from speechquilt.decoder.matching import FlowDraws, frame_noise, on_path, warped
from speechquilt.decoder.mel import MelConfig
from speechquilt.decoder.mel_guess import MelGuess, MelGuessConfig, linear_velocity, phases
from speechquilt.decoder.mel_stream import StreamConfig, StreamState, Window
from speechquilt.decoder.mel_time import MelTime
from speechquilt.decoder.token_states import LengthRegulator, TokenStates, TokenStatesConfig
from speechquilt.decoder.unet import UNet, UNetConfig
from speechquilt.nn.batching import valid_places

LONGEST_WHOLE_S = 120  # of `decode_whole`, whose attention grows with the square


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """Tokens to mel. The defaults are the released GLM-4-Voice decoder's, 111 M parameters."""

    codebook_size: int = 16_384
    """Number of different tokens; ids are 0 to codebook_size - 1."""
    token_rate: float = 12.5
    """Speech tokens per second."""
    tokenizer: str = ""
    """Fingerprint of the tokenizer whose tokens it was trained on. Empty: not known, and not compared."""
    mel: MelConfig = MelConfig()
    """The mel that it makes, which the vocoder must know."""
    mel_mean: float = 0.0
    """What is subtracted from the log-mel before the flow sees it: the training data's mean, or 0 as in the release."""
    mel_std: float = 1.0
    """What it is divided by then: the training data's standard deviation, or 1 as in the release. Noise has 1, and
    training is steadier when both are alike."""
    encoder: TokenStatesConfig = TokenStatesConfig()
    """The token encoder."""
    guess: MelGuessConfig | None = None
    """A first guess of the mel that the flow goes on from; decoders that learn in minutes need it. None, as in the release: the
    flow gets the tokens as a condition and finds all of the mel."""
    unet: UNetConfig = UNetConfig()
    """The flow's estimator."""
    speaker_width: int = 192
    """Numbers in a speaker's vector. Without a speaker it is all zeros."""
    drop_chance: float = 0.2
    """Share of training items that see no condition at all, 0 to 1, so that guidance has something to guide away
    from."""
    prompt_chance: float = 0.5
    """Share of training items that see the beginning of their mel as a prompt, 0 to 1."""
    prompt_share: float = 0.8
    """Longest prompt, as a share of the item's frames, 0 to 1."""
    guidance: float = 0.7
    """How far sampling goes beyond the conditioned velocity, away from the unconditioned one. 0: not at all, and twice
    as fast."""
    euler_steps: int = 10
    """Steps from noise to mel. More: slower, and nearer to the flow that was learned."""
    temperature: float = 1.0
    """Factor of the noise that sampling starts from. Smaller: less varied."""
    stream: StreamConfig = StreamConfig()
    """How `decode` and `step` cut an utterance into blocks."""

    def __post_init__(self) -> None:
        for key in ("codebook_size", "euler_steps", "speaker_width", "mel_std"):
            if getattr(self, key) <= 0:
                raise ValueError(f"{key}={getattr(self, key)} must be above 0")
        for key in ("drop_chance", "prompt_chance", "prompt_share"):
            if not 0.0 <= getattr(self, key) <= 1.0:
                raise ValueError(f"{key}={getattr(self, key)} must lie in 0..1, it is a share")
        for key in ("guidance", "temperature"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key}={getattr(self, key)} must be at least 0")
        _ = self.time  # tokens must not be shorter than frames

    @property
    def time(self) -> MelTime:
        """Which frames belong to which tokens."""
        return MelTime.of(self.token_rate, self.mel)

    def require_tokenizer(self, fingerprint: str) -> None:
        """Raises ValueError unless this decoder was trained on that tokenizer's tokens, or it is not known on whose."""
        if self.tokenizer and fingerprint != self.tokenizer:
            raise ValueError(
                f"the tokens are of tokenizer {fingerprint}, but this decoder was trained on those of {self.tokenizer}; "
                "decode with a decoder of the same tokenizer"
            )

    def build(self) -> "FlowDecoder":
        return FlowDecoder(self)


class FlowErrors(NamedTuple):
    """What training lowers: squared errors of each frame, the mean over bands, `[B, F]`, 0 in the padding. `guess_BF` None:
    there is no guess."""

    velocity_BF: torch.Tensor
    guess_BF: torch.Tensor | None


class FlowDecoder(nn.Module):
    """See the module. Dropout is for training: `eval()` before anything is generated."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.config, self.time = config, config.time
        num_mels = config.mel.num_mels
        self.tokens = TokenStates(
            config.encoder, config.codebook_size, config.guess.width if config.guess else num_mels
        )
        self.regulator = MelGuess(config.guess, num_mels) if config.guess else LengthRegulator(num_mels)
        self.speaker = nn.Linear(config.speaker_width, num_mels)
        self.unet = UNet(config.unet, channels_in=4 * num_mels, channels_out=num_mels)

    def forward(
        self,
        ids_BT: torch.Tensor,
        num_tokens_B: torch.Tensor,
        mel_BMF: torch.Tensor,
        num_frames_B: torch.Tensor,
        first_B: torch.Tensor,
        speaker_BE: torch.Tensor | None,
        draws: FlowDraws,
    ) -> FlowErrors:
        """`first_B`: place of each row's first token in its utterance, the start of a block of the encoder."""
        num_frames = mel_BMF.shape[2]
        valid_B1F = valid_places(num_frames_B, num_frames)[:, None].float()
        target_BMF = (mel_BMF - self.config.mel_mean) / self.config.mel_std
        conditions_BCF = self._conditions(
            ids_BT,
            num_tokens_B,
            first_B,
            target_BMF * valid_places(draws.prompt_B, num_frames)[:, None],
            valid_B1F,
            speaker_BE,
        )
        time_B = warped(draws.time_B)
        point_BMF, velocity_BMF = on_path(draws.noise_BMF, target_BMF, time_B)
        found_BMF = self._velocity(point_BMF, conditions_BCF * draws.keep_B[:, None, None], time_B, valid_B1F)
        guess_BF = None
        if self.config.guess:
            guess_BF = (conditions_BCF[:, : mel_BMF.shape[1]] - target_BMF).square().mean(1) * valid_B1F[:, 0]
        return FlowErrors((found_BMF - velocity_BMF).square().mean(1) * valid_B1F[:, 0], guess_BF)

    def init_state(self, seed: int = 0, speaker_E: torch.Tensor | None = None) -> StreamState:
        """A new utterance. Raises ValueError for a seed below 0 or a speaker of another width."""
        return mel_stream.begin(self, seed, speaker_E)

    def step(self, ids_T: torch.Tensor, state: StreamState, *, final: bool = False) -> tuple[torch.Tensor, StreamState]:
        """Any number of new tokens -> the frames `mel_MF` that are certain now, and the new state.

        The frames of all steps together are those of `decode`. `final` also gives the frames of the last tokens; the
        state is then fresh, of the same seed and speaker. Raises ValueError on ids that are not of the codebook.
        """
        mels, states = self.step_many([ids_T], [state], [final])
        return mels[0], states[0]

    def step_many(
        self, ids: Sequence[torch.Tensor], states: Sequence[StreamState], final: Sequence[bool]
    ) -> tuple[list[torch.Tensor], list[StreamState]]:
        """`step` of many utterances at once; each gets what it gets alone, to the last digits that a batch rounds
        otherwise."""
        return mel_stream.step_many(self, ids, states, final)

    def decode(
        self, ids: Sequence[torch.Tensor], seeds: Sequence[int], speakers: Sequence[torch.Tensor | None] | None = None
    ) -> list[torch.Tensor]:
        """Whole utterances, block by block: for each `mel_MF` with all of its frames, on the model's device. An empty
        one has none."""
        states = self._begin_all(seeds, speakers)
        return self.step_many(ids, states, [True] * len(states))[0]

    def decode_whole(
        self, ids: Sequence[torch.Tensor], seeds: Sequence[int], speakers: Sequence[torch.Tensor | None] | None = None
    ) -> list[torch.Tensor]:
        """Whole utterances, each in one pass, every frame hearing all tokens that the encoder's blocks let it hear.

        Raises ValueError on more than two minutes, whose memory would be too large.
        """
        checked = [mel_stream.checked_ids(self, ids_T) for ids_T in ids]
        states = self._begin_all(seeds, speakers)
        longest = int(LONGEST_WHOLE_S * self.config.token_rate)
        if any(len(ids_T) > longest for ids_T in checked):
            raise ValueError(
                f"an utterance of {max(map(len, checked))} tokens is too long for one pass, at most {longest}; "
                "decode it block by block"
            )
        windows = [
            Window(ids_T, 0, state.mel_MF, state.seed, state.speaker_E)
            for ids_T, state in zip(checked, states, strict=True)
        ]
        made = iter(self.generate([window for window in windows if len(window.ids_T)]))
        return [next(made) if len(window.ids_T) else window.mel_MF for window in windows]

    @torch.no_grad()
    def generate(self, windows: Sequence[Window]) -> list[torch.Tensor]:
        """All frames of each window, `mel_MF`, those that were known included (made again, and not quite equal).

        Raises ValueError when the model is in training mode or its mel is not finite.
        """
        if not windows:
            return []
        if self.training:
            raise ValueError("the decoder is in training mode, with dropout; call eval() before it generates")
        config, num_mels, device = self.config, self.config.mel.num_mels, self.device
        frames = [self._frames(w) for w in windows]
        longest = max(stop - first for first, stop in frames)
        num_tokens_B = torch.tensor([len(w.ids_T) for w in windows], device=device)
        ids_BT = nn.utils.rnn.pad_sequence([w.ids_T for w in windows], batch_first=True).to(device)
        noise_BMF = torch.zeros(len(windows), num_mels, longest)
        prompt_BMF = torch.zeros(len(windows), num_mels, longest, device=device)
        speaker_BE = torch.zeros(len(windows), config.speaker_width, device=device)
        for b, (window, (first, stop)) in enumerate(zip(windows, frames)):
            noise_BMF[b, :, : stop - first] = frame_noise(window.seed, first, stop, num_mels)
            prompt_BMF[b, :, : window.mel_MF.shape[1]] = (window.mel_MF - config.mel_mean) / config.mel_std
            if window.speaker_E is not None:
                speaker_BE[b] = window.speaker_E
        num_frames_B = torch.tensor([stop - first for first, stop in frames])
        valid_B1F = None  # nothing is padding
        if int(num_frames_B.min()) < longest:
            valid_B1F = valid_places(num_frames_B.to(device), longest)[:, None].float()
        first_B = torch.tensor([w.first for w in windows], device=device)
        conditions_BCF = self._conditions(ids_BT, num_tokens_B, first_B, prompt_BMF, valid_B1F, speaker_BE)
        mel_BMF = self._flow(noise_BMF.to(device) * config.temperature, conditions_BCF, valid_B1F)
        if not torch.isfinite(mel_BMF).all():
            raise ValueError("the mel is not finite; the decoder's weights are damaged, load or train them again")
        mel_BMF = mel_BMF * config.mel_std + config.mel_mean
        return [mel_MF[:, : stop - first] for mel_MF, (first, stop) in zip(mel_BMF, frames)]

    @property
    def device(self) -> torch.device:
        return self.unet.out.weight.device

    @property
    def delay_s(self) -> float:
        """Longest time from a token's start until its frames are given: its block, and what is held back."""
        return self.config.stream.delay_tokens / self.config.token_rate

    @property
    def first_delay_s(self) -> float:
        """Speech that must have come before the first frames are given."""
        return self.config.stream.chunk_tokens[0] / self.config.token_rate

    def _begin_all(self, seeds: Sequence[int], speakers: Sequence[torch.Tensor | None] | None) -> list[StreamState]:
        given = speakers if speakers is not None else [None] * len(seeds)
        return [self.init_state(seed, speaker_E) for seed, speaker_E in zip(seeds, given, strict=True)]

    def _frames(self, window: Window) -> tuple[int, int]:
        """Its first frame in the utterance, and the one after its last."""
        return self.time.num_frames(window.first), self.time.num_frames(window.first + len(window.ids_T))

    def _conditions(
        self,
        ids_BT: torch.Tensor,
        num_tokens_B: torch.Tensor,
        first_B: torch.Tensor,
        prompt_BMF: torch.Tensor,
        valid_B1F: torch.Tensor | None,
        speaker_BE: torch.Tensor | None,
    ) -> torch.Tensor:
        """What the flow is conditioned on, `[B, 3 M, F]`: tokens, speaker, prompt. `first_B`: place of each row's first
        token in its utterance; `prompt_BMF` is in the flow's scale and zero where there is none."""
        first_frame_B1 = self.time.num_frames(first_B)[:, None]
        frame_BF = first_frame_B1 + torch.arange(prompt_BMF.shape[2], device=first_B.device)
        # A frame that begins before the window's first token is heard with that token.
        token_BF = (self.time.token_of(frame_BF) - first_B[:, None]).clamp(min=0)
        token_BF = token_BF.minimum(num_tokens_B[:, None] - 1)
        states_BTD = self.tokens(ids_BT, num_tokens_B)
        if self.config.guess:
            phase_BF = phases(self.time, frame_BF, self.config.guess.phases)
            states_BMF = self.regulator(states_BTD, token_BF, phase_BF, valid_B1F)
        else:
            states_BMF = self.regulator(states_BTD, token_BF, valid_B1F)
        if speaker_BE is None:
            speaker_BE = states_BMF.new_zeros(len(ids_BT), self.config.speaker_width)
        speaker_BM = self.speaker(nn.functional.normalize(speaker_BE, dim=1))
        return torch.cat([states_BMF, speaker_BM[..., None].expand_as(states_BMF), prompt_BMF], 1)

    def _flow(
        self, noise_BMF: torch.Tensor, conditions_BCF: torch.Tensor, valid_B1F: torch.Tensor | None
    ) -> torch.Tensor:
        """Euler's method from noise to mel, in the flow's scale; both velocities of guidance in one batch."""
        guidance = self.config.guidance
        if guidance:
            conditions_BCF = torch.cat([conditions_BCF, torch.zeros_like(conditions_BCF)])
            valid_B1F = None if valid_B1F is None else torch.cat([valid_B1F, valid_B1F])
        point_BMF = noise_BMF
        times = warped(torch.linspace(0, 1, self.config.euler_steps + 1, device=noise_BMF.device))
        for now, then in itertools.pairwise(times):
            both_BMF = torch.cat([point_BMF, point_BMF]) if guidance else point_BMF
            velocity_BMF = self._velocity(both_BMF, conditions_BCF, now.expand(len(both_BMF)), valid_B1F)
            if guidance:
                with_BMF, without_BMF = velocity_BMF.chunk(2)
                velocity_BMF = (1 + guidance) * with_BMF - guidance * without_BMF
            point_BMF = point_BMF + (then - now) * velocity_BMF
        return point_BMF

    def _velocity(
        self,
        point_BMF: torch.Tensor,
        conditions_BCF: torch.Tensor,
        time_B: torch.Tensor,
        valid_B1F: torch.Tensor | None,
    ) -> torch.Tensor:
        """The estimator's, or with a guess that of the guess and of what the estimator says is missing."""
        if not self.config.guess:
            return self.unet(torch.cat([point_BMF, conditions_BCF], 1), time_B, valid_B1F)
        guess_BMF, time_B11 = conditions_BCF[:, : point_BMF.shape[1]], time_B[:, None, None]
        of_point, of_input, of_output = linear_velocity(time_B11, self.config.guess.missing_std)
        missing_BMF = point_BMF - time_B11 * guess_BMF
        found_BMF = self.unet(torch.cat([of_input * missing_BMF, conditions_BCF], 1), time_B, valid_B1F)
        return guess_BMF + of_point * missing_BMF + of_output * found_BMF
