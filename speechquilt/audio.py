"""Audio files, sample rates and log-mel features.

Trap: Whisper's own features look ahead (centred window) and back from the end (floor at the clip's maximum - 8), so a
model on them cannot stream. `LogMel(mode="stream")` has neither; the two modes are different inputs, never mix them.

Axis letters: B rows, S samples, F frames (10 ms), M mel bins.
"""

import importlib
import io
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from speechquilt.types import Waveform

SAMPLE_RATE = 16_000  # what speech tokenizers hear
HOP = 160  # samples per mel frame
WINDOW = 400  # samples under one analysis window
FRAME_RATE = SAMPLE_RATE / HOP  # 100 mel frames per second
TOKEN_SAMPLES = 1_280  # samples per speech token at 12.5 Hz (spec 1, 2.6)

SMALLEST_POWER = 1e-10  # Whisper's guard of the logarithm
DYNAMIC_RANGE = 8.0  # Whisper keeps 80 dB below the loudest bin of the clip
STREAM_FLOOR = -6.0  # log10 power; where the floor of a clip near full scale lies in Whisper's features

MelMode = Literal["whisper", "stream"]


def load(path: str | Path) -> Waveform:
    """First channel of an audio file at its own rate (spec 1, 2.6: no down-mix); another when all of that is zero.

    Raises FileNotFoundError, or ValueError when the file is not audio.
    """
    soundfile = package("soundfile")
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"audio file {path} is missing; check the path and the folder it is relative to")
    try:
        samples_SC, rate = soundfile.read(str(path), dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{path} cannot be read as audio ({error}); convert it to WAV, FLAC, OGG or MP3") from error
    return Waveform(samples_S=first_channel(samples_SC), sample_rate=rate)


def first_channel(samples_SC: np.ndarray) -> np.ndarray:
    """The first channel; the first that is not silent when it is silent throughout, as where a microphone was not plugged in."""
    channel = 0
    if samples_SC.shape[1] > 1 and not samples_SC[:, 0].any():
        channel = int(np.argmax(samples_SC.any(0)))  # 0 when all are silent
    return np.ascontiguousarray(samples_SC[:, channel])


def save(path: str | Path, wav: Waveform) -> None:
    """Write 16-bit audio; the suffix of `path` is the format (.wav, .flac, .ogg). Raises OSError when it cannot."""
    soundfile = package("soundfile")
    try:
        soundfile.write(str(path), wav.samples_S, wav.sample_rate)
    except (soundfile.LibsndfileError, TypeError) as error:
        raise OSError(
            f"cannot write audio to {path} ({error}); the folder must exist and the suffix be known"
        ) from error


def to_wav_bytes(wav: Waveform) -> bytes:
    """The content of a 16-bit WAV file, for a page that must not need other files."""
    buffer = io.BytesIO()
    package("soundfile").write(buffer, wav.samples_S, wav.sample_rate, format="WAV")
    return buffer.getvalue()


def check(wav: Waveform) -> Waveform:
    """`wav` itself, or ValueError saying why it cannot be used."""
    samples_S = wav.samples_S
    if samples_S.ndim != 1:
        raise ValueError(f"audio has shape {samples_S.shape}; one channel is expected, take samples[:, 0]")
    if wav.sample_rate <= 0:
        raise ValueError(f"sample_rate={wav.sample_rate} must be positive, in Hz")
    if not len(samples_S):
        raise ValueError("audio is empty; leave this recording out")
    if not np.isfinite(samples_S).all():
        bad = int((~np.isfinite(samples_S)).sum())
        raise ValueError(f"audio holds {bad} samples that are NaN or infinite; decode or record it again")
    return wav


def resample(wav: Waveform, sample_rate: int) -> Waveform:
    """The same sound at another rate (soxr, high quality)."""
    if sample_rate <= 0:
        raise ValueError(f"sample_rate={sample_rate} must be positive, in Hz")
    if wav.sample_rate == sample_rate:
        return wav
    samples_S = package("soxr").resample(wav.samples_S, wav.sample_rate, sample_rate).astype(np.float32, copy=False)
    return Waveform(samples_S=samples_S, sample_rate=sample_rate)


def mel_filters(num_mels: int) -> np.ndarray:
    """Triangles [num_mels, WINDOW // 2 + 1] on Slaney's mel scale (linear below 1 kHz), each of unit area in Hz."""
    top = hz_to_mel(np.array(SAMPLE_RATE / 2))
    edges_hz = mel_to_hz(np.linspace(0.0, top, num_mels + 2))
    bins_hz = np.linspace(0.0, SAMPLE_RATE / 2, WINDOW // 2 + 1)
    low, centre, high = edges_hz[:-2, None], edges_hz[1:-1, None], edges_hz[2:, None]
    rising, falling = (bins_hz - low) / (centre - low), (high - bins_hz) / (high - centre)
    return np.maximum(0.0, np.minimum(rising, falling)) * (2.0 / (high - low))


class LogMel(nn.Module):
    """Waveform at 16 kHz -> log-mel frames, 100 per second, scaled to roughly [-1, 1].

    "whisper": equals transformers' WhisperFeatureExtractor, for public checkpoints. Frame f is centred on sample 160 f.
    "stream": frame f covers samples [160 f - 240, 160 f + 160) with zeros before the start, and the floor is fixed, so
    a frame depends on nothing after its own end; `forward` and `stream_step` are twins.
    """

    filters_MK: torch.Tensor
    window_W: torch.Tensor

    def __init__(self, num_mels: int = 80, mode: MelMode = "whisper") -> None:
        super().__init__()
        if num_mels < 1:
            raise ValueError(f"num_mels={num_mels} must be at least 1; Whisper checkpoints use 80 or 128")
        if mode not in ("whisper", "stream"):
            raise ValueError(f"mode={mode!r} must be 'whisper' or 'stream'")
        self.num_mels, self.mode = num_mels, mode
        # derived, so not part of a checkpoint
        self.register_buffer("filters_MK", torch.from_numpy(mel_filters(num_mels)).float(), persistent=False)
        self.register_buffer("window_W", torch.hann_window(WINDOW), persistent=False)

    def forward(self, wav_BS: torch.Tensor) -> torch.Tensor:
        """`wav_BS` float -> `mel_BMF` float32 with F = S // 160. Samples that fill no frame are dropped: pad first.

        Raises ValueError on fewer than 201 samples in "whisper" mode, whose first window is mirrored.
        """
        wav_BS = wav_BS.float()
        if self.mode == "stream":
            return self._floor(self._log_power(F.pad(wav_BS, (WINDOW - HOP, 0))))
        if wav_BS.shape[-1] <= WINDOW // 2:
            raise ValueError(
                f"{wav_BS.shape[-1]} samples are too few for Whisper features; zero-pad to a multiple of {TOKEN_SAMPLES}"
            )
        num_frames = wav_BS.shape[-1] // HOP
        padded_BS = F.pad(wav_BS, (WINDOW // 2, WINDOW // 2), mode="reflect")
        return self._floor(self._log_power(padded_BS)[..., :num_frames])

    def stream_init(self) -> torch.Tensor:
        """State of a stream: the samples that later windows still need, at first the zeros before the start."""
        if self.mode != "stream":
            raise ValueError('Whisper features need the whole clip; build LogMel(mode="stream")')
        return torch.zeros(WINDOW - HOP, device=self.window_W.device)

    def stream_step(self, wav_S: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Any number of new samples -> the frames `mel_MF` they complete, and the new state."""
        waiting_S = torch.cat([state, wav_S.float()])
        mel_MF = self._floor(self._log_power(waiting_S[None]))[0]
        return mel_MF, waiting_S[mel_MF.shape[1] * HOP :]

    def _log_power(self, padded_BS: torch.Tensor) -> torch.Tensor:
        """log10 of the mel power of every whole window: [B, M, F], F = 0 for less than a window."""
        if padded_BS.shape[-1] < WINDOW:
            return padded_BS.new_zeros(padded_BS.shape[0], self.num_mels, 0)
        # Features stay float32 inside a mixed-precision region; bfloat16 would keep 8 bits of a 27-bit range.
        with torch.autocast(padded_BS.device.type, enabled=False):
            windows_BFW = padded_BS.unfold(-1, WINDOW, HOP) * self.window_W
            power_BKF = torch.fft.rfft(windows_BFW).abs().square().transpose(1, 2)
            return (self.filters_MK @ power_BKF).clamp(min=SMALLEST_POWER).log10()

    def _floor(self, log_BMF: torch.Tensor) -> torch.Tensor:
        if self.mode == "whisper":
            log_BMF = torch.maximum(log_BMF, log_BMF.amax((1, 2), keepdim=True) - DYNAMIC_RANGE)
        else:
            log_BMF = log_BMF.clamp(min=STREAM_FLOOR)
        return (log_BMF + 4.0) / 4.0


def hz_to_mel(hz: np.ndarray) -> np.ndarray:
    """Slaney: 3 mel per 200 Hz up to 1 kHz (15 mel), then 27 mel per factor 6.4."""
    return np.where(hz < 1000.0, 3.0 * hz / 200.0, 15.0 + 27.0 * np.log(np.maximum(hz, 1000.0) / 1000.0) / np.log(6.4))


def mel_to_hz(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < 15.0, 200.0 * mel / 3.0, 1000.0 * 6.4 ** ((mel - 15.0) / 27.0))


def package(name: str) -> ModuleType:
    """soundfile or soxr, which a training run does not need. Raises ImportError saying how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{name} is not installed; run `pip install speechquilt[audio]`") from error
