"""Ready sizes of the text-to-token model, from the toy to the paper's 1.5B (spec synthetic-interleaved, section 4).

Place in the pipeline: recipes start from these; `benchmarks/text_to_token.py --sizes` prints their table.
Trap: the paper gives its size alone, the shapes are ours. They are Llama shapes with few key heads, because bulk generation
reads the key-value state of a thousand rows at every step. Names count the parameters with the vocabulary of the paper.
"""

from speechquilt.config import nearest
from speechquilt.nn.llama import LlamaConfig

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
