"""Phase reconstruction: it makes the sound that the mel is of, and runs on over joints."""

from dataclasses import replace

import pytest
import torch

from speechquilt.decoder.joints import jumps
from speechquilt.decoder.mel import SMALLEST_MAGNITUDE, MelConfig
from speechquilt.decoder.phase import PhaseVocoder, PhaseVocoderConfig

MEL = MelConfig(sample_rate=8000, num_mels=40, fft_samples=256, hop=64, high_hz=4000.0)
CONFIG = PhaseVocoderConfig(mel=MEL)


def voiced(seconds: float = 0.6) -> torch.Tensor:
    """A voice that glides from 110 to 150 Hz through two resonances."""
    time_S = torch.arange(round(seconds * 8000)) / 8000
    pitch_S = 110 + 40 * time_S / seconds
    phase_S = 2 * torch.pi * (pitch_S / 8000).cumsum(0)
    harmonics = [
        torch.cos(k * phase_S) / (1 + ((k * pitch_S - 500) / 200).square() * (1 + (k * pitch_S / 1500).square()))
        for k in range(1, 25)
    ]
    return 0.2 * torch.stack(harmonics).sum(0)


def sound(config: PhaseVocoderConfig, mel_MF: torch.Tensor) -> torch.Tensor:
    return config.build()(mel_MF[None], torch.tensor([mel_MF.shape[1]]))[0]


def distance(config: PhaseVocoderConfig, wav_S: torch.Tensor) -> float:
    """Mean difference of the log-mels, natural logarithm, without what is 60 dB under the loudest band."""
    mel_MF = MEL.build()(wav_S[None])[0]
    made_MF = MEL.build()(sound(config, mel_MF)[None])[0]
    return float((made_MF - mel_MF).abs()[mel_MF > mel_MF.max() - 6.9].mean())


@pytest.mark.parametrize("hz", [200.0, 437.0, 1500.0])
def test_a_tone_comes_back_as_that_tone(hz: float) -> None:
    wav_S = 0.3 * torch.sin(2 * torch.pi * hz * torch.arange(8000) / 8000)
    made_S = sound(CONFIG, MEL.build()(wav_S[None])[0])[1000:-1000]
    spectrum_H = torch.fft.rfft(made_S * torch.hann_window(len(made_S))).abs()
    heard_hz = float(spectrum_H.argmax()) * 8000 / len(made_S)
    assert abs(heard_hz - hz) < 40, "a band is wider than a frequency"
    assert 0.6 < float(made_S.norm() / wav_S[1000:-1000].norm()) < 1.2


def test_the_mel_of_its_sound_is_the_mel_it_was_given() -> None:
    assert distance(CONFIG, voiced()) < 0.15


@pytest.mark.parametrize("worse", [{"rounds": 1}, {"frames_ahead": 0}, {"momentum": 0.0, "rounds": 4}, {"drift": 0.0}])
def test_every_setting_earns_its_place(worse: dict[str, float]) -> None:
    better = {"rounds": 4} if "momentum" in worse else {}
    assert distance(replace(CONFIG, **better), voiced()) < 0.95 * distance(replace(CONFIG, **worse), voiced())


def blocks(vocoder: PhaseVocoder, mel_MF: torch.Tensor, num_frames: int, carried: bool) -> torch.Tensor:
    waves, state = [], vocoder.init_state()
    for block_MF in mel_MF.split(num_frames, 1):
        wav_S, state = vocoder.step(block_MF, state, final=not carried)
        waves.append(wav_S)
    if carried:
        waves.append(vocoder.step(mel_MF[:, :0], state, final=True)[0])
    return torch.cat(waves)


def test_phases_run_on_over_joints_that_click_when_each_block_begins_anew() -> None:
    vocoder = CONFIG.build()
    mel_MF = vocoder.mel.build()(voiced(1.0)[None])[0]
    joints_P = torch.arange(10 * 64, 7500, 10 * 64)
    carried, anew = (jumps(blocks(vocoder, mel_MF, 10, carried), 8000, joints_P) for carried in (True, False))
    assert carried.amplitude_worst < 1.0
    assert carried.spectrum_worst < 1.2
    assert anew.amplitude_worst > 1.5
    assert anew.spectrum_usual > 1.3 * carried.spectrum_usual


def test_silence_is_silent_and_loud_follows_soft_at_once() -> None:
    silent_MF = torch.full((40, 30), SMALLEST_MAGNITUDE).log()
    assert sound(CONFIG, silent_MF).abs().max() < 1e-3
    mel_MF = torch.cat([silent_MF, MEL.build()(voiced()[None])[0]], 1)
    made_S = sound(CONFIG, mel_MF)
    assert made_S[31 * 64 : 40 * 64].std() > 0.5 * voiced()[64 : 10 * 64].std()


def test_the_same_frames_are_the_same_sound() -> None:
    mel_MF = MEL.build()(voiced()[None])[0]
    assert torch.equal(sound(CONFIG, mel_MF), sound(CONFIG, mel_MF))
    assert not torch.equal(sound(CONFIG, mel_MF), sound(replace(CONFIG, seed=1), mel_MF))


def test_settings_that_cannot_work_are_refused() -> None:
    for wrong in ({"frames_ahead": -1}, {"rounds": 0}, {"momentum": 1.0}, {"drift": 1.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            PhaseVocoderConfig(**wrong)
    with pytest.raises(ValueError, match="hop=160 must be at most half of fft_samples=256"):
        PhaseVocoderConfig(mel=replace(MEL, hop=160)).build()
