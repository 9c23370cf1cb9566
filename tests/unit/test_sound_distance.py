"""Distances of sound: zero to itself, pitch in cents, distortion in dB as it is defined."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechquilt.evals.sound_distance import DB_PER_NAT, mel_cepstral_distortion, pitch, sound_distance
from speechquilt.types import Waveform

RATE = 16_000


def buzz(hz: float, seconds: float = 0.6) -> Waveform:
    """A voiced sound: harmonics that fall off."""
    time_S = np.arange(int(seconds * RATE)) / RATE
    wav_S = sum(np.sin(2 * np.pi * hz * h * time_S) / h for h in range(1, 12))
    return Waveform(samples_S=(0.2 * np.asarray(wav_S)).astype(np.float32), sample_rate=RATE)


@settings(max_examples=20, deadline=None)
@given(hz=st.floats(80, 350))
def test_pitch_of_a_buzz_is_its_own(hz: float) -> None:
    found_F = pitch(buzz(hz))
    assert len(found_F)
    assert np.abs(1200 * np.log2(found_F[found_F > 0] / hz)).max() < 60  # a sample of the period at 350 Hz is 38 cents
    assert (found_F > 0).all()


def test_noise_and_silence_have_no_pitch() -> None:
    noise_S = np.random.default_rng(0).normal(size=RATE).astype(np.float32) * 0.1
    assert (pitch(Waveform(samples_S=noise_S, sample_rate=RATE)) > 0).mean() < 0.05
    assert not pitch(Waveform(samples_S=np.zeros(RATE, np.float32), sample_rate=RATE)).any()
    assert not len(pitch(Waveform(samples_S=np.zeros(100, np.float32), sample_rate=RATE)))


def test_a_sound_is_no_way_from_itself_and_an_octave_from_its_double() -> None:
    mel_MF = np.random.default_rng(0).normal(size=(20, 30))
    same = sound_distance(mel_MF, mel_MF, buzz(120), buzz(120))
    assert (same.log_mel, same.mcd_db, same.f0_cents, same.voicing) == (0, 0, 0, 0)
    assert sound_distance(mel_MF, mel_MF, buzz(120), buzz(240)).f0_cents == pytest.approx(1200, abs=30)


def test_distortion_is_that_of_the_cepstra_and_not_of_loudness() -> None:
    """One coefficient that differs by c everywhere: (10 / ln 10) sqrt(2) c."""
    zero_MF, num_mels, c = np.zeros((40, 5)), 40, 0.3
    cosine_M = np.cos(np.pi * 3 * (np.arange(num_mels) + 0.5) / num_mels)
    assert mel_cepstral_distortion(zero_MF + c * 2 * cosine_M[:, None], zero_MF) == pytest.approx(
        DB_PER_NAT * c, rel=1e-6
    )
    assert mel_cepstral_distortion(zero_MF + 5, zero_MF) == pytest.approx(0, abs=1e-9)
