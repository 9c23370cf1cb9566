"""Waveform -> speech tokens: log-mel, half an ASR encoder, pooling, one VQ codebook.

A released tokenizer without the ASR half that it was trained with is just this.
Trap: audio is cut into windows of `max_frames` (30 s), because position tables end there. A window knows of those
before it only what it reads again, `context_frames`; 0 means hard cuts, as in the released tokenizer (spec 1, 2.6).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NoReturn

import numpy as np
import torch
from torch import nn

from speechquilt.audio import HOP, LogMel, MelMode
from speechquilt.config import fingerprint
from speechquilt.nn.batching import valid_places
from speechquilt.nn.quantize import VectorQuantizerConfig
from speechquilt.tokenizer import streaming, windows
from speechquilt.tokenizer.encoder import AudioEncoder, EncoderSizes, KeyValues
from speechquilt.tokenizer.windows import checked_audio

FRAME_SAMPLES = 320  # one encoder frame: 20 ms at 16 kHz
_ENCODING_KEYS = (  # the config fields that the tokens depend on
    "num_mels", "width", "num_heads", "ffn_width", "layers_below", "pooling", "block_frames", "max_frames", "causal",
    "codebook_size",
)  # fmt: skip
# Fields that came later. They enter the fingerprint when they are not this, so that older fingerprints stay valid.
_LATER_KEYS = {"features": "stream", "context_frames": 0, "positions_out": False, "metric_width": 0}

StreamState = streaming.StreamState | windows.WindowState


@dataclass(frozen=True, kw_only=True)
class TokenEncoderConfig(EncoderSizes):
    """What makes tokens out of audio: encoder, codebook, and how they hear."""

    codebook_size: int = 512
    """Number of different tokens. More: each can say more, and each is seen less often in training."""
    features: MelMode = "stream"
    """Input features. "stream": nothing of the future is heard and the last token counts as full. "whisper": Whisper's
    own log-mel, which hears the whole window, with the frames after the last sample masked, as in the released
    GLM-4-Voice tokenizer."""
    context_frames: int = 0
    """Frames of 20 ms of its past that every window but a clip's first hears again, in whole blocks of `block_frames`
    (docs/decisions/0018-long-audio.md). More: fewer errors where windows meet, more compute on long audio. 0: windows
    know nothing of each other."""

    metric_width: int = 0
    """Dimensions in which a vector's distances to the codes are measured, after a map that weighs what a reader would
    lose (docs/decisions/0021-codebook.md). 0: all of the vector, as in the paper."""

    def __post_init__(self) -> None:
        super().__post_init__()
        unit = self.block_frames if self.causal else self.pooling
        if not 0 <= self.context_frames < self.max_frames or self.context_frames % unit:
            raise ValueError(
                f"context_frames={self.context_frames} must be a multiple of {unit} frames (whole blocks and tokens) and less "
                f"than max_frames={self.max_frames}; 0 cuts long audio into windows that know nothing of each other"
            )

    def quantizer(self) -> VectorQuantizerConfig:
        return VectorQuantizerConfig(codebook_size=self.codebook_size, width=self.width, metric_width=self.metric_width)

    def build(self) -> "TokenEncoder":
        return TokenEncoder(self)


class TokenEncoder(nn.Module):
    """16 kHz audio -> ids. Streams block by block when nothing in it sees further, else window by window."""

    sample_rate = 16000
    config: TokenEncoderConfig

    def __init__(self, config: TokenEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.token_samples = FRAME_SAMPLES * config.pooling
        self.window_samples = FRAME_SAMPLES * config.max_frames
        self.vocab_size = config.codebook_size
        self.frame_rate = self.sample_rate / self.token_samples
        self.context_samples = FRAME_SAMPLES * config.context_frames
        self.rule = windows.WindowRule(
            core=config.max_frames // config.pooling, context=config.context_frames // config.pooling
        )
        self.streams_blocks = config.causal and config.features == "stream"
        frames = config.block_frames if self.streams_blocks else config.max_frames
        self.lookahead_s = (frames - config.pooling) * FRAME_SAMPLES / self.sample_rate
        self.log_mel = LogMel(num_mels=config.num_mels, mode=config.features)
        self.encoder = AudioEncoder(config)
        self.quantizer = config.quantizer().build()

    @property
    def fingerprint(self) -> str:
        """12 hex digits of everything that the tokens depend on: sizes, weights below the bottleneck, codebook."""
        fields = asdict(self.config)
        changed = [key for key, usual in _LATER_KEYS.items() if fields[key] != usual]
        weights = self._encoding_weights() | {"codebook": self.quantizer.codebook_KD}
        if self.config.metric_width:
            weights["metric"] = self.quantizer.metric_DE
        return weights_fingerprint({key: fields[key] for key in (*_ENCODING_KEYS, *changed)}, weights)

    @torch.no_grad()
    def encode(self, wav_BS: torch.Tensor, num_samples_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Right-padded 16 kHz audio -> `ids_BT` (int64, 0 in the padding), `num_tokens_B` = ceil(samples / token
        samples).

        A row gives the same ids alone and in any batch; what lies beyond its `num_samples_B` is never read. Raises
        ValueError on empty or non-finite audio, and before the codebook exists.
        """
        pooled_BTD, num_tokens_B = self._pooled(wav_BS, num_samples_B)
        ids_BT = self.quantizer.encode(pooled_BTD)
        return ids_BT.masked_fill(~valid_places(num_tokens_B, ids_BT.shape[1]), 0), num_tokens_B

    def init_state(self) -> StreamState:
        return streaming.StreamState() if self.streams_blocks else windows.WindowState()

    @torch.no_grad()
    def step(self, wav_S: torch.Tensor, state: StreamState, *, final: bool = False) -> tuple[torch.Tensor, StreamState]:
        """Any number of new samples -> ids `ids_T` that no later sample can change, and the new state.

        The ids of all steps together are those of `encode` on the whole audio. `final` flushes the last, incomplete
        block; the returned state is then a fresh one. Without causal features and attention the whole window is
        awaited; `lookahead_s` says so.
        """
        if isinstance(state, streaming.StreamState):
            return streaming.step(self, wav_S, state, final)
        return windows.step(self.rule, self.token_samples, self._encode_alone, wav_S, state, final, self.device)

    def read_back(self, tokens: Sequence[np.ndarray]) -> list[str]:
        """Always a ValueError: a released tokenizer has no ASR half."""
        refuse_to_read()

    def frames(
        self,
        wav_BS: torch.Tensor,
        num_samples_B: torch.Tensor,
        skip: int = 0,
        past: list[KeyValues] | None = None,
        later: int = 0,
    ) -> tuple[torch.Tensor, list[KeyValues]]:
        """Samples of one window (padded to whole tokens, after `skip` frames of context) -> `encoder.lower`'s result.

        `num_samples_B` counts the window's valid samples, the past included and the context not; `later` is `encoder.lower`'s.
        """
        x_BFD = self.encoder.stem(self._mel(wav_BS, num_samples_B))[:, skip:]
        unit = self.token_samples if self.config.features == "stream" else FRAME_SAMPLES
        num_frames_B = -(-num_samples_B // unit) * (unit // FRAME_SAMPLES)
        return self.encoder.lower(x_BFD, num_frames_B, past, later)

    @property
    def device(self) -> torch.device:
        return self.quantizer.codebook_KD.device

    def _pooled(
        self, wav_BS: torch.Tensor, num_samples_B: torch.Tensor, later: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Audio -> vectors before the quantiser, window by window, and the number of valid ones. `later`: see
        `AudioEncoder.lower`; only for audio of one window."""
        wav_BS = checked_audio(wav_BS, num_samples_B)
        wav_BS = windows.to_whole_tokens(wav_BS[:, : int(num_samples_B.max())], self.token_samples)
        parts = []
        for window in self.rule.windows(wav_BS.shape[1] // self.token_samples):
            start = window.start * self.token_samples
            window_BS = wav_BS[:, start : window.stop * self.token_samples]
            pooled_BTD, _ = self.frames(window_BS, (num_samples_B - start).clamp(0, window_BS.shape[1]), later=later)
            parts.append(pooled_BTD[:, window.first - window.start :])
        return torch.cat(parts, 1), -(-num_samples_B // self.token_samples)

    def _mel(self, wav_BS: torch.Tensor, num_samples_B: torch.Tensor) -> torch.Tensor:
        """Log-mel of each row as if it were alone; features that look ahead must see the row's own end."""
        length_B = -(-num_samples_B // self.token_samples) * self.token_samples
        if self.config.features == "whisper":
            return self._whisper_mel(wav_BS, length_B)
        mel_BMF = self.log_mel(wav_BS)
        if self.config.causal:
            return mel_BMF
        frame_F = torch.arange(mel_BMF.shape[2], device=mel_BMF.device)
        beyond_BF = frame_F >= (length_B // HOP)[:, None]
        return mel_BMF.masked_fill(beyond_BF[:, None], 0.0)  # what a centred convolution finds after the end of a clip

    def _whisper_mel(self, wav_BS: torch.Tensor, length_B: torch.Tensor) -> torch.Tensor:
        mel_BMF = wav_BS.new_zeros(len(wav_BS), self.config.num_mels, wav_BS.shape[1] // HOP)
        for length in length_B.unique().tolist():
            if length:
                rows_B = length_B == length
                mel_BMF[rows_B, :, : length // HOP] = self.log_mel(wav_BS[rows_B, :length])
        return mel_BMF

    def _encode_alone(self, wav_S: torch.Tensor) -> torch.Tensor:
        wav_BS = wav_S[None].to(self.device)
        return self.encode(wav_BS, torch.tensor([len(wav_S)], device=self.device))[0][0]

    def _encoding_weights(self) -> dict[str, torch.Tensor]:
        above = tuple(f"layers.{i}." for i in range(self.config.layers_below, len(self.encoder.layers)))
        skip = (*above, "embed_positions2", "layer_norm")
        return {k: v for k, v in self.encoder.state_dict().items() if not k.startswith(skip)}


def refuse_to_read() -> NoReturn:
    """What reading tokens back answers where there is no head for it."""
    raise ValueError(
        "this tokenizer was published without an ASR half, so its tokens cannot be read back as text; decode them to "
        "audio and use a recogniser, or train a tokenizer with heads"
    )


def weights_fingerprint(fields: dict, weights: dict[str, torch.Tensor]) -> str:
    """12 hex digits of plain JSON data and of tensors with their names."""
    digest = hashlib.sha256(fingerprint(fields).encode())
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]
