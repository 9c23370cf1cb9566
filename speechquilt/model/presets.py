"""Ready sizes of both model families.

Place in the pipeline: recipes start from these and override single keys.
Trap: a plain and a latent preset of one name share the global transformer, not the number of parameters or FLOPs.
"""

from speechquilt.model.latent import LatentLMConfig
from speechquilt.model.lm import PlainLMConfig
from speechquilt.nn.llama import LlamaConfig

TOY = LlamaConfig(width=192, num_layers=4, num_heads=4, num_kv_heads=4, ffn_width=512)


def toy_plain(vocab_size: int) -> PlainLMConfig:
    """Trains on two CPU cores in minutes."""
    return PlainLMConfig(vocab_size=vocab_size, llama=TOY)


def toy_latent(vocab_size: int) -> LatentLMConfig:
    """The toy's global transformer with local modules of two thirds of its width; at half of it speech is learned late."""
    return LatentLMConfig(
        vocab_size=vocab_size,
        global_=TOY,
        local_width=128,
        encoder_layers=1,
        decoder_layers=2,
        local_heads=4,
        local_ffn=344,
    )
