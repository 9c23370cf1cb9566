"""Conditional flow matching: the path from noise to mel, its times, what training draws, and noise that can be drawn again
(spec 1, 3.1).

Trap: noise of sampling belongs to (seed, mel frame of the utterance), never to a call, so that a frame has the same one
whoever generates it. It comes from the CPU's generator, on every device.

Axis letters: B rows, M mel bands, F mel frames.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

SIGMA_MIN = 1e-6  # what is left of the noise at the path's end
PAGE_FRAMES = 64  # frames whose noise is drawn at once


@dataclass(frozen=True)
class FlowDraws:
    """What one training batch draws. `time_B` in [0, 1), before it is warped; `noise_BMF` standard normal; `prompt_B`
    frames that are given as a prompt, int64; `keep_B` bool, False where all conditions are dropped."""

    time_B: torch.Tensor
    noise_BMF: torch.Tensor
    prompt_B: torch.Tensor
    keep_B: torch.Tensor


def draw_flow(
    mel_BMF: torch.Tensor,
    num_frames_B: torch.Tensor,
    *,
    prompt_chance: float,
    prompt_share: float,
    drop_chance: float,
) -> FlowDraws:
    """From torch's global generators: the noise from that of the mel's device, the rest from the CPU's.

    A prompt is a prefix of 0 to `prompt_share` of the row's frames, each length as likely as another.
    """
    device = mel_BMF.device
    time_B, prompted_B, length_B, kept_B = torch.rand(4, len(mel_BMF)).to(device)
    longest_B = (prompt_share * num_frames_B).floor()
    prompt_B = (length_B * (longest_B + 1)).floor().long()
    return FlowDraws(
        time_B=time_B,
        noise_BMF=torch.randn_like(mel_BMF),
        prompt_B=prompt_B.masked_fill(prompted_B >= prompt_chance, 0),
        keep_B=kept_B >= drop_chance,
    )


def warped(time: torch.Tensor) -> torch.Tensor:
    """Even times -> times that are dense near the noise: 1 - cos(pi t / 2), in training and in sampling."""
    return 1 - torch.cos(time * (math.pi / 2))


def on_path(noise_BMF: torch.Tensor, mel_BMF: torch.Tensor, time_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The point between noise and mel at a time, and the velocity there, which is the same all along the path."""
    time_B11 = time_B[:, None, None]
    point_BMF = (1 - (1 - SIGMA_MIN) * time_B11) * noise_BMF + time_B11 * mel_BMF
    return point_BMF, mel_BMF - (1 - SIGMA_MIN) * noise_BMF


def frame_noise(seed: int, first: int, stop: int, num_mels: int) -> torch.Tensor:
    """Standard normal numbers of the utterance's frames `first` to `stop`, `[M, stop - first]`, on the CPU."""
    begin = first // PAGE_FRAMES
    pages = [_page(seed, page, num_mels) for page in range(begin, -(-stop // PAGE_FRAMES))]
    if not pages:
        return torch.zeros(num_mels, 0)
    return torch.cat(pages, 1)[:, first - begin * PAGE_FRAMES : stop - begin * PAGE_FRAMES]


@lru_cache(maxsize=64)  # a window is generated again with the next ones, as their prompt
def _page(seed: int, page: int, num_mels: int) -> torch.Tensor:
    state = np.random.SeedSequence([seed, page]).generate_state(1, np.uint64)
    return torch.randn(num_mels, PAGE_FRAMES, generator=torch.Generator().manual_seed(int(state[0])))
