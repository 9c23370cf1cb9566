"""Which mel frames belong to which speech tokens, by absolute time, in whole numbers.

n tokens have floor(n * frames per token) frames (spec 1, 3.1), and frame i shows the token that sounds when it begins.
Both depend on the place in the utterance alone, so whoever decodes a part gets the frames that the whole would have.
Trap: tokens do not all have the same number of frames: 6.89 on average in the released decoder, so 6 or 7.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

import torch

from speechquilt.decoder.mel import MelConfig

LARGEST_DENOMINATOR = 10_000  # of the token rate; products with frame numbers then fit in int64

N = TypeVar("N", int, torch.Tensor)


@dataclass(frozen=True, kw_only=True)
class MelTime:
    """`frames` mel frames last exactly as long as `tokens` tokens."""

    frames: int
    tokens: int

    @classmethod
    def of(cls, token_rate: float, mel: MelConfig) -> "MelTime":
        """`token_rate` in Hz. Raises ValueError when a token is shorter than a frame."""
        rate = Fraction(token_rate).limit_denominator(LARGEST_DENOMINATOR)
        ratio = Fraction(mel.sample_rate, mel.hop) / rate if rate > 0 else Fraction(0)
        if ratio < 1:
            raise ValueError(
                f"token_rate={token_rate} must be above 0 and at most {mel.frame_rate:.2f}, the frames per second of "
                "the mel: every token needs a frame"
            )
        return cls(frames=ratio.numerator, tokens=ratio.denominator)

    def num_frames(self, num_tokens: N) -> N:
        """Frames of the first `num_tokens` tokens of an utterance."""
        return num_tokens * self.frames // self.tokens

    def token_of(self, frame_BF: torch.Tensor) -> torch.Tensor:
        """The token that sounds when each of these frames begins; both counted from the utterance's start."""
        return frame_BF * self.tokens // self.frames
