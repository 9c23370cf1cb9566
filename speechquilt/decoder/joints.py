"""Clicks where pieces of sound were joined: how far a waveform and its spectrum jump there, and how far elsewhere.

Speech jumps by itself, at every pulse of the voice, so a jump is no click before the same utterance's other places are
calmer.
Trap: a joint at sample n lies between n - 1 and n. One sample early, and a click is not seen.

Axis letters: S samples, P places, N samples under a window.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

SIDE_S = 0.01  # of sound on either side that two spectra are taken of
FLOOR = 1e-3  # of the utterance's level; what is fainter than that is silence and does not jump


@dataclass(frozen=True, kw_only=True)
class Jumps:
    """At the joints relative to elsewhere: `worst` compares the largest jumps, `usual` the medians.

    About 1 without clicks. `worst` is at most 1 when some other place of the same sound jumps as far.
    """

    amplitude_worst: float
    amplitude_usual: float
    spectrum_worst: float
    spectrum_usual: float


def jumps(wav_S: torch.Tensor, sample_rate: int, joints_P: torch.Tensor) -> Jumps:
    """Of one utterance, joined before each of the samples `joints_P`. Places elsewhere: all that touch no joint.

    Raises ValueError for a joint with too little sound beside it, and when no place elsewhere is left.
    """
    side = round(SIDE_S * sample_rate)
    if len(joints_P) == 0 or int(joints_P.min()) < side or int(joints_P.max()) > len(wav_S) - side:
        raise ValueError(
            f"joints must lie in {side}..{len(wav_S) - side}, {SIDE_S} s inside these {len(wav_S)} samples; leave others out"
        )
    near_S = torch.zeros(len(wav_S) + 1, dtype=torch.bool)
    for joint in joints_P.tolist():
        near_S[joint - side : joint + side + 1] = True
    others_P = torch.arange(len(wav_S))[~near_S[:-1]]
    others_P = others_P[(others_P >= side) & (others_P <= len(wav_S) - side)]
    if not len(others_P):
        raise ValueError(f"every sample lies within {SIDE_S} s of a joint; give longer pieces")
    wav_S = wav_S.double()
    amplitude_S = _amplitude_jumps(wav_S, side)
    amplitude = amplitude_S[joints_P], amplitude_S[others_P]
    spectrum = _spectrum_jumps(wav_S, joints_P, side), _spectrum_jumps(wav_S, others_P[:: side // 4], side)
    return Jumps(
        amplitude_worst=_relative(torch.max, *amplitude),
        amplitude_usual=_relative(torch.median, *amplitude),
        spectrum_worst=_relative(torch.max, *spectrum),
        spectrum_usual=_relative(torch.median, *spectrum),
    )


def _relative(measure: Callable[[torch.Tensor], torch.Tensor], joints_P: torch.Tensor, others_P: torch.Tensor) -> float:
    """Digital silence elsewhere is left out: a joint is to be compared with sound."""
    at_joints = float(measure(joints_P))
    sounding_P = others_P[others_P > 0]
    if not len(sounding_P):
        return math.inf if at_joints else 0.0
    return at_joints / float(measure(sounding_P))


def _amplitude_jumps(wav_S: torch.Tensor, side: int) -> torch.Tensor:
    """`[S]`: how far a sample is from where the two before it point, in units of what is usual in the sound around it."""
    off_S = F.pad(wav_S.diff(n=2).abs(), (2, 0))
    around_S = F.avg_pool1d(off_S.square()[None], 2 * side + 1, stride=1, padding=side)[0]
    click_S = F.avg_pool1d(off_S.square()[None], 3, stride=1, padding=1)[0] * 3 / (2 * side + 1)
    unit_S = (around_S - click_S).clamp(min=0).sqrt()  # a click, two samples long here, must not raise its own unit
    return off_S / (unit_S + FLOOR * wav_S.square().mean().sqrt() + torch.finfo(wav_S.dtype).tiny)


def _spectrum_jumps(wav_S: torch.Tensor, places_P: torch.Tensor, side: int) -> torch.Tensor:
    """`[P]`: mean difference of the logarithms of the spectra before and after each place."""
    windows_SN, window_N = wav_S.unfold(0, side, 1), torch.hann_window(side, dtype=wav_S.dtype)
    floor = FLOOR * window_N.norm() * wav_S.square().mean().sqrt() + torch.finfo(wav_S.dtype).tiny
    before_PK, after_PK = (
        (torch.fft.rfft(windows_SN[starts_P] * window_N).abs() + floor).log()
        for starts_P in (places_P - side, places_P)
    )
    return (after_PK - before_PK).abs().mean(1)
