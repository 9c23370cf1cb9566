"""Our log-mel against transformers' WhisperFeatureExtractor."""

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor
from transformers.audio_utils import mel_filter_bank

from speechquilt import audio
from speechquilt.tts.espeak import EspeakTTSConfig


def _signal(name: str) -> np.ndarray:
    t = np.arange(audio.SAMPLE_RATE * 2) / audio.SAMPLE_RATE
    noise = np.random.default_rng(0).standard_normal(len(t))
    if name == "noise":
        return 0.1 * noise
    if name == "tones":
        return 0.5 * np.sin(2 * np.pi * 440 * t) + 0.01 * np.sin(2 * np.pi * 5000 * t)
    if name == "silence":
        return np.zeros_like(t)
    if name == "faint":  # below the guard of the logarithm in most bins
        return 1e-6 * noise
    said = EspeakTTSConfig(voices=("en-us",)).build().speak("where does tom live? rome.", "en-us")
    return audio.resample(said.audio, audio.SAMPLE_RATE).samples_S


@pytest.mark.parametrize("num_mels", [80, 128])
@pytest.mark.parametrize("name", ["noise", "tones", "silence", "faint", "speech"])
def test_equals_whisper(name: str, num_mels: int) -> None:
    wav_S = _signal(name).astype(np.float32)
    whisper = WhisperFeatureExtractor(feature_size=num_mels)
    expected_MF = whisper(wav_S, sampling_rate=audio.SAMPLE_RATE, return_tensors="pt").input_features[0]
    padded_S = torch.from_numpy(np.pad(wav_S, (0, 30 * audio.SAMPLE_RATE - len(wav_S))))
    mel_BMF = audio.LogMel(num_mels, "whisper")(padded_S[None])
    assert mel_BMF[0].shape == expected_MF.shape
    assert (mel_BMF[0] - expected_MF).abs().max() <= 1e-4


def test_rows_of_a_batch_have_their_own_maximum() -> None:
    loud_S, quiet_S = torch.from_numpy(_signal("noise")).float(), torch.from_numpy(_signal("faint")).float()
    log_mel = audio.LogMel(80, "whisper")
    together_BMF = log_mel(torch.stack([loud_S, quiet_S]))
    torch.testing.assert_close(together_BMF[1:], log_mel(quiet_S[None]))


@pytest.mark.parametrize("num_mels", [80, 128])
def test_filters_equal_transformers(num_mels: int) -> None:
    expected_KM = mel_filter_bank(201, num_mels, 0.0, 8000.0, audio.SAMPLE_RATE, norm="slaney", mel_scale="slaney")
    np.testing.assert_allclose(audio.mel_filters(num_mels), expected_KM.T, atol=1e-12)
