"""Sizes of the text-to-token model, from the toy to the paper's 1.5B, and its run (spec synthetic-interleaved, section 4).

Trap: the paper gives its size alone, the shapes are ours. They are Llama shapes with few key heads, because bulk generation
reads the key-value state of a thousand rows at every step. Names count the parameters with the vocabulary of the paper.
"""

from speechquilt.config import nearest
from speechquilt.nn.llama import LlamaConfig
from speechquilt.stages.cost import PaperRun
from speechquilt.stages.train_text_to_token import TextToTokenRecipe
from speechquilt.text_to_token.examples import TextToTokenDataConfig
from speechquilt.text_to_token.generate import EngineConfig
from speechquilt.train.trainer import TrainConfig
from speechquilt.vocab import Vocab

PRESETS = {
    "toy": LlamaConfig(width=160, num_layers=4, num_heads=4, num_kv_heads=4, ffn_width=448),
    "100M": LlamaConfig(width=512, num_layers=24, num_heads=8, num_kv_heads=2, ffn_width=1536),
    "500M": LlamaConfig(width=896, num_layers=24, num_heads=14, num_kv_heads=2, ffn_width=4864),
    "1.5B": LlamaConfig(width=1536, num_layers=28, num_heads=12, num_kv_heads=2, ffn_width=8960),
}


def llama(name: str) -> LlamaConfig:
    """The stack of a preset. Raises ValueError on an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is unknown; {nearest(name, list(PRESETS))}")
    return PRESETS[name]


RECIPES = {
    "text_to_token_1_5b": PaperRun(
        about="the paper's size; shape, data, batch and learning rate are choices (21B tokens, about two epochs of its TTS data)",
        recipe=TextToTokenRecipe(
            llama=llama("1.5B"),
            data=TextToTokenDataConfig(rows=512, row_tokens=2048),
            train=TrainConfig(
                steps=20_000,
                lr=3e-4,
                warmup_steps=500,
                dtype="bfloat16",
                compile=True,
                recompute="selective",
                shard="full",
                checkpoint_every=1000,
                checkpoint_async=True,
            ),
            engine=EngineConfig(),
        ),
        vocab_size=Vocab(num_text=32_000, num_speech=16_384).size,
    )
}
