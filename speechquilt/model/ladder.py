"""Ready sizes of both model families (spec 2, 6.2 and 6.3): the paper's ladder from 420M to 7B, and the toy.

The names are the paper's. Its widths are unknown; ours are of BLT's family (25 layers, local width half the global
one).
Trap: a plain and a latent preset of one name share the global transformer, not the number of parameters or FLOPs.
"""

from dataclasses import dataclass

from speechquilt.config import nearest
from speechquilt.model.latent import LatentLMConfig
from speechquilt.model.plain import PlainLMConfig
from speechquilt.nn.llama import LlamaConfig

HEAD_WIDTH = 128  # of the global transformer
LOCAL_HEAD_WIDTH = 64


@dataclass(frozen=True, kw_only=True)
class Size:
    """What differs along the ladder."""

    width: int
    ffn_width: int
    local_ffn: int
    num_layers: int = 25


SIZES = {
    "420M": Size(width=1024, ffn_width=2816, local_ffn=1536),
    "630M": Size(width=1280, ffn_width=3584, local_ffn=1792),
    "810M": Size(width=1536, ffn_width=4096, local_ffn=2048),
    "1.1B": Size(width=1792, ffn_width=4864, local_ffn=2560),
    "1.4B": Size(width=2048, ffn_width=5632, local_ffn=2816),
    "1.8B": Size(width=2304, ffn_width=6144, local_ffn=3072),
    "7B": Size(width=4096, ffn_width=11008, local_ffn=5632, num_layers=32),
}
TOY = LlamaConfig(width=192, num_layers=4, num_heads=4, num_kv_heads=4, ffn_width=512)
NAMES = ("toy", *SIZES)


def global_transformer(name: str) -> LlamaConfig:
    """The large transformer of a preset. Raises ValueError on an unknown name."""
    if name == "toy":
        return TOY
    if name not in SIZES:
        raise ValueError(f"preset {name!r} is unknown; {nearest(name, NAMES)}")
    size = SIZES[name]
    heads = size.width // HEAD_WIDTH
    return LlamaConfig(
        width=size.width, num_layers=size.num_layers, num_heads=heads, num_kv_heads=heads, ffn_width=size.ffn_width
    )


def plain(name: str, vocab_size: int = 0) -> PlainLMConfig:
    """The papers' baseline: the global transformer alone, over tokens. `vocab_size` 0 waits for `for_vocab`."""
    return PlainLMConfig(vocab_size=vocab_size, llama=global_transformer(name))


def latent(name: str, vocab_size: int = 0) -> LatentLMConfig:
    """The LST of the same global transformer; text runs through the decoder, as in the paper.

    The toy's local modules have two thirds of its width; at half of it speech is learned late.
    """
    stack = global_transformer(name)
    if name == "toy":
        return LatentLMConfig(
            vocab_size=vocab_size,
            global_=stack,
            local_width=128,
            encoder_layers=1,
            decoder_layers=2,
            local_heads=4,
            local_ffn=344,
        )
    width = stack.width // 2
    return LatentLMConfig(
        vocab_size=vocab_size,
        global_=stack,
        local_width=width,
        encoder_layers=1,
        decoder_layers=9,
        local_heads=width // LOCAL_HEAD_WIDTH,
        local_ffn=SIZES[name].local_ffn,
    )
