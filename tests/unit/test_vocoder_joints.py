"""The measure of clicks: a planted one is found, sound that runs on is not accused."""

import pytest
import torch

from speechquilt.decoder.joints import Jumps, jumps

RATE = 16_000
JOINTS = torch.arange(1500, 14_000, 1700)


def tone(hz: float, phase: float = 0.0) -> torch.Tensor:
    return 0.3 * torch.sin(2 * torch.pi * hz * torch.arange(16_000) / RATE + phase)


def voice(seed: int) -> torch.Tensor:
    """Harmonics of 120 Hz under a resonance, a little noise, and pauses: it jumps by itself."""
    generator = torch.Generator().manual_seed(seed)
    phase_S = 2 * torch.pi * 120 * torch.arange(16_000) / RATE
    wav_S = torch.stack([torch.cos(k * phase_S) / (1 + ((k - 5) / 2) ** 2) for k in range(1, 20)]).sum(0)
    wav_S = 0.2 * wav_S + 0.002 * torch.randn(16_000, generator=generator)
    return wav_S * torch.sin(torch.arange(16_000) / 1300).clamp(min=0)


def largest(found: Jumps) -> float:
    return max(vars(found).values())


@pytest.mark.parametrize("hz", [110.0, 440.0, 3000.0])
def test_a_continuous_tone_has_no_clicks(hz: float) -> None:
    assert largest(jumps(tone(hz), RATE, JOINTS)) < 1.3


@pytest.mark.parametrize("seed", [0, 1])
def test_a_voice_that_runs_on_has_no_clicks(seed: int) -> None:
    found = jumps(voice(seed), RATE, JOINTS)
    assert found.amplitude_worst < 1.0
    assert found.spectrum_worst < 1.0


@pytest.mark.parametrize(("hz", "step"), [(110.0, 0.02), (440.0, 0.05), (1000.0, 0.15)])
def test_a_planted_step_is_found(hz: float, step: float) -> None:
    wav_S = tone(hz)
    wav_S[JOINTS[3] :] += step
    assert jumps(wav_S, RATE, JOINTS).amplitude_worst > 1.5
    assert jumps(wav_S, RATE, JOINTS + 1000).amplitude_worst <= 1.0, "it lies elsewhere then"


def test_blocks_of_another_phase_are_found() -> None:
    wav_S = tone(440.0)
    for joint in JOINTS.tolist()[::2]:
        wav_S[joint : joint + 1700] = tone(440.0, phase=2.0)[joint : joint + 1700]
    found = jumps(wav_S, RATE, JOINTS)
    assert found.amplitude_worst > 3
    assert found.amplitude_usual > 3


def test_a_click_in_a_voice_is_found() -> None:
    wav_S = voice(0)
    wav_S[int(JOINTS[0]) :] += 0.1
    assert jumps(wav_S, RATE, JOINTS).amplitude_worst > 1.0


def test_another_colour_without_a_step_is_a_jump_of_the_spectrum_alone() -> None:
    joint = 8000  # both tones pass 0 here, upwards
    wav_S = torch.where(torch.arange(16_000) < joint, tone(400.0), 0.5 * tone(800.0))
    found = jumps(wav_S, RATE, torch.tensor([joint]))
    assert found.spectrum_worst > 3
    assert found.amplitude_worst < 1.3


def test_silence_does_not_jump() -> None:
    wav_S = torch.cat([torch.zeros(8000), tone(440.0)])
    assert largest(jumps(wav_S, RATE, torch.tensor([2000, 5000]))) < 0.1


def test_joints_without_sound_beside_them_are_refused() -> None:
    for joint in (100, 15_900):
        with pytest.raises(ValueError, match=r"joints must lie in 160\.\.15840"):
            jumps(tone(440.0), RATE, torch.tensor([joint]))
    with pytest.raises(ValueError, match="leave others out"):
        jumps(tone(440.0), RATE, torch.tensor([], dtype=torch.long))
    with pytest.raises(ValueError, match="give longer pieces"):
        jumps(tone(440.0), RATE, torch.arange(160, 15_840, 200))
