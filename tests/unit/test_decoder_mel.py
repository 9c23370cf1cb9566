"""The mel between the halves of a speech decoder: its frames, its scale, and who may share it."""

import numpy as np
import pytest
import torch

from speechquilt.decoder.mel import SMALLEST_MAGNITUDE, MelConfig

TINY = MelConfig(sample_rate=8000, num_mels=20, fft_samples=256, hop=64, high_hz=4000.0)


def tone(hz: float, samples: int) -> torch.Tensor:
    return 0.5 * torch.sin(2 * torch.pi * hz * torch.arange(samples) / TINY.sample_rate)


def test_a_frame_a_hop() -> None:
    for samples in (300, 640, 641, 703, 704):
        assert TINY.build()(torch.randn(2, samples)).shape == (2, 20, samples // 64)


def test_it_is_the_magnitude_under_the_window() -> None:
    """A frame by hand: the frame that begins at hop f, half of the overlap earlier."""
    wav_S = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    mel = TINY.build()
    first = 5 * 64 - (256 - 64) // 2
    magnitude_H = np.abs(np.fft.rfft(wav_S[first : first + 256].numpy() * np.hanning(257)[:-1]))
    expected_M = np.log(mel.filters_HM.numpy().T @ magnitude_H)
    np.testing.assert_allclose(mel(wav_S[None])[0, :, 5].numpy(), expected_M, atol=1e-4)


def test_a_tone_is_loudest_in_its_band_and_silence_is_the_floor() -> None:
    mel = TINY.build()
    loudest = [int(mel(tone(hz, 2000)[None])[0, :, 10].argmax()) for hz in (300, 900, 2000, 3500)]
    assert loudest == sorted(set(loudest))
    assert mel(torch.zeros(1, 1000)).exp().max() < SMALLEST_MAGNITUDE * 1.01 + 1e-3


def test_another_mel_is_refused_by_name() -> None:
    TINY.require(MelConfig(sample_rate=8000, num_mels=20, fft_samples=256, hop=64, high_hz=4000.0), "runs/vocoder")
    with pytest.raises(ValueError, match=r"runs/vocoder has another mel: hop=32 and not 64, high_hz=2000.0 and not"):
        TINY.require(MelConfig(sample_rate=8000, num_mels=20, fft_samples=256, hop=32, high_hz=2000.0), "runs/vocoder")


def test_what_cannot_be_a_mel_is_refused() -> None:
    for wrong in ({"hop": 65}, {"hop": 0}, {"high_hz": 4001.0}, {"low_hz": 4000.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            MelConfig(**{"sample_rate": 8000, "fft_samples": 256, "hop": 64, "high_hz": 4000.0} | wrong)
    with pytest.raises(ValueError, match="too few"):
        TINY.build()(torch.zeros(1, 90))
