"""How far one recording is from another that says the same at the same time: spectrum, envelope and pitch.

Trap: frames are compared by their place, with no warping of time. That is right for sound made again from tokens of the
recording, whose timing it keeps, and wrong for anything else.

Axis letters: S samples, M mel bands, F frames, K cepstral coefficients, L lags.
"""

import math
from dataclasses import dataclass

import numpy as np

from speechquilt.types import Waveform

CEPSTRA = 13  # coefficients 1 to 13, as mel-cepstral distortion is usually taken
DB_PER_NAT = 10 * math.sqrt(2) / math.log(10)  # from a distance of natural-log cepstra to dB (Kubichek, 1993)
PITCH_HZ = (60.0, 400.0)
PITCH_WINDOW_S, PITCH_HOP_S = 0.04, 0.01
VOICED = 0.5  # least autocorrelation at the period, of 1
QUIET_DB = -40.0  # below the loudest frame, a frame has no pitch


@dataclass(frozen=True, kw_only=True)
class SoundDistance:
    """`log_mel`: mean absolute difference, in natural logarithms. `mcd_db`: mel-cepstral distortion. `f0_cents`: median absolute
    difference of pitch where both are voiced, 1200 an octave, NaN where there is no such place. `voicing`: share of the
    frames where one is voiced and the other is not."""

    log_mel: float
    mcd_db: float
    f0_cents: float
    voicing: float


def sound_distance(made_MF: np.ndarray, meant_MF: np.ndarray, made: Waveform, meant: Waveform) -> SoundDistance:
    """Of a recording made again and the one that was meant, with their log-mels; the longer of each is cut."""
    num_frames = min(made_MF.shape[1], meant_MF.shape[1])
    made_MF, meant_MF = made_MF[:, :num_frames], meant_MF[:, :num_frames]
    made_F, meant_F = pitch(made), pitch(meant)
    num_pitches = min(len(made_F), len(meant_F))
    made_F, meant_F = made_F[:num_pitches], meant_F[:num_pitches]
    both_F = (made_F > 0) & (meant_F > 0)
    cents_F = 1200 * np.abs(np.log2(made_F[both_F] / meant_F[both_F]))
    return SoundDistance(
        log_mel=float(np.abs(made_MF - meant_MF).mean()),
        mcd_db=mel_cepstral_distortion(made_MF, meant_MF),
        f0_cents=float(np.median(cents_F)) if len(cents_F) else math.nan,
        voicing=float(((made_F > 0) != (meant_F > 0)).mean()),
    )


def mel_cepstral_distortion(made_MF: np.ndarray, meant_MF: np.ndarray) -> float:
    """In dB, of two log-mels of the same shape; loudness (coefficient 0) does not count."""
    num_mels = made_MF.shape[0]
    angle_KM = np.pi * np.arange(1, CEPSTRA + 1)[:, None] * (np.arange(num_mels) + 0.5) / num_mels
    difference_KF = np.cos(angle_KM) @ (made_MF - meant_MF) / num_mels  # cosine series of the log spectrum
    return float(DB_PER_NAT * np.sqrt(np.square(difference_KF).sum(0)).mean())


def pitch(wav: Waveform) -> np.ndarray:
    """Hz every 10 ms, 0 where nothing is voiced: the first strong peak of the normalised autocorrelation."""
    rate = wav.sample_rate
    window, hop = round(PITCH_WINDOW_S * rate), round(PITCH_HOP_S * rate)
    shortest, longest = int(rate / PITCH_HZ[1]), int(rate / PITCH_HZ[0])
    if len(wav.samples_S) < window + longest:
        return np.zeros(0)
    frames_FS = np.lib.stride_tricks.sliding_window_view(wav.samples_S.astype(np.float64), window + longest)[::hop]
    head_FS = frames_FS[:, :window] - frames_FS[:, :window].mean(1, keepdims=True)
    energy_F = np.square(head_FS).sum(1)
    corr_FL = np.stack([_similarity(head_FS, frames_FS[:, lag : lag + window]) for lag in range(shortest, longest)], 1)
    best_F = corr_FL.max(1)
    first_F = np.argmax(corr_FL >= 0.95 * best_F[:, None], axis=1)  # a later one as strong is an octave below
    climbing = np.arange(corr_FL.shape[1]) >= first_F[:, None]
    peak_F = np.argmax(climbing & (corr_FL >= np.roll(corr_FL, -1, axis=1)), axis=1)
    voiced_F = (best_F > VOICED) & (10 * np.log10(energy_F + 1e-12) > 10 * np.log10(energy_F.max() + 1e-12) + QUIET_DB)
    return np.where(voiced_F, rate / (shortest + peak_F), 0.0)


def _similarity(a_FS: np.ndarray, b_FS: np.ndarray) -> np.ndarray:
    b_FS = b_FS - b_FS.mean(1, keepdims=True)
    return (a_FS * b_FS).sum(1) / np.sqrt(np.square(a_FS).sum(1) * np.square(b_FS).sum(1) + 1e-12)
