"""Sizes: what a Whisper of each size becomes as a tokenizer at each frame rate (spec 1, 2.1).

Trap: 6.25 Hz makes one token of 8 frames, and neither Whisper's window of 1,500 frames nor the paper's block of 100 is
a multiple of that. Its window is 1,496 frames (29.92 s) and its block 96 (1.92 s).
"""

from dataclasses import dataclass
from typing import Any

from speechquilt.config import nearest
from speechquilt.tokenizer.supervised import SupervisedTokenizerConfig

WINDOW_FRAMES = 1500  # 30 s
# Carried into the next window: 4 s, for 15 % more work on long audio (docs/decisions/0018-long-audio.md).
CONTEXT_BLOCKS = 2
WARMUP_UPDATES = 100  # at the least; the codebook is not made before there are four vectors per code


@dataclass(frozen=True)
class WhisperSize:
    """Layers are those of the encoder and of the decoder each, unless `decoder_layers` says otherwise."""

    width: int
    num_heads: int
    layers: int
    num_mels: int = 80
    vocab_size: int = 51865
    decoder_layers: int | None = None


@dataclass(frozen=True)
class Rate:
    """`pooling` frames of 20 ms make a token; the lower the rate, the larger the codebook."""

    pooling: int
    codebook_size: int


WHISPER = {
    "tiny": WhisperSize(384, 6, 4),
    "base": WhisperSize(512, 8, 6),
    "small": WhisperSize(768, 12, 12),
    "medium": WhisperSize(1024, 16, 24),
    "large-v2": WhisperSize(1280, 20, 32),
    "large-v3": WhisperSize(1280, 20, 32, num_mels=128, vocab_size=51866),
    "large-v3-turbo": WhisperSize(1280, 20, 32, num_mels=128, vocab_size=51866, decoder_layers=4),
}
RATES = {50.0: Rate(1, 4096), 25.0: Rate(2, 4096), 12.5: Rate(4, 16384), 6.25: Rate(8, 65536)}


def rate_fields(pooling: int, max_frames: int = WINDOW_FRAMES) -> dict[str, Any]:
    """Config fields that go with a pooling: codebook size, block and window in whole tokens.

    Raises ValueError for a pooling that the paper did not train.
    """
    for rate in RATES.values():
        if rate.pooling == pooling:
            whole = {key: n - n % pooling for key, n in (("block_frames", 100), ("max_frames", max_frames))}
            return {"pooling": pooling, "codebook_size": rate.codebook_size, **whole}
    raise ValueError(
        f"pooling={pooling} has no published codebook size; give codebook_size, block_frames and max_frames"
    )


def preset(name: str = "large-v3", frame_rate: float = 12.5) -> SupervisedTokenizerConfig:
    """A tokenizer of a Whisper's size, split in the middle; `preset()` is the paper's, large-v3 at 12.5 Hz.

    Recognition is learnt by the attention decoder alone. Training starts with the codebook bypassed. Raises ValueError for a name or a rate that is not in the tables.
    """
    if name not in WHISPER:
        raise ValueError(f"unknown preset {name!r}; {nearest(name, list(WHISPER))}")
    if frame_rate not in RATES:
        raise ValueError(f"frame_rate={frame_rate} must be one of {', '.join(map(str, RATES))} Hz")
    size, rate = WHISPER[name], rate_fields(RATES[frame_rate].pooling)
    return SupervisedTokenizerConfig(
        text_vocab_size=size.vocab_size,
        num_mels=size.num_mels,
        width=size.width,
        num_heads=size.num_heads,
        ffn_width=4 * size.width,
        layers_below=size.layers // 2,
        layers_above=size.layers - size.layers // 2,
        decoder_layers=size.decoder_layers or size.layers,
        ctc_weight=0.0,
        read_back_head="attention",
        vq_warmup_updates=WARMUP_UPDATES,
        context_frames=CONTEXT_BLOCKS * rate["block_frames"],
        **rate,
    )
