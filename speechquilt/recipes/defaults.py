"""Sizes and schedules that two CPU cores finish in minutes: the toy story's, and where one's own data starts from.

Place in the pipeline: layer 4, read by `toy` and `own`; override any of them with key=value.
Trap: they are chosen for a hundred words in a few voices. Real speech wants the sizes of the papers (`docs/`), a GPU and
a hundred times the steps; nothing but numbers changes.
"""

from speechquilt.data.pack import PackConfig
from speechquilt.model.presets import toy_latent, toy_plain
from speechquilt.nn.llama import LlamaConfig
from speechquilt.recipes.text_to_token import TextToTokenRecipe
from speechquilt.recipes.tokenizer import TokenizerRecipe
from speechquilt.text_to_token.examples import TextToTokenDataConfig
from speechquilt.text_to_token.generate import EngineConfig
from speechquilt.tokenizer.model import SpeechTokenizerConfig
from speechquilt.train.trainer import TrainConfig

TOKENIZER = TokenizerRecipe(
    model=SpeechTokenizerConfig(text_vocab_size=1024, block_frames=40, vq_warmup_updates=250),
    train=TrainConfig(steps=600, lr=1.5e-3, warmup_steps=60, beta2=0.98, weight_decay=0.01, checkpoint_every=200),
)
TEXT_TO_TOKEN = TextToTokenRecipe(
    llama=LlamaConfig(width=160, num_layers=4, num_heads=4, num_kv_heads=4, ffn_width=448),
    data=TextToTokenDataConfig(),
    train=TrainConfig(steps=600, lr=2e-3, warmup_steps=60, checkpoint_every=200),
    engine=EngineConfig(temperature=0.7),
)
PLAIN, LATENT = toy_plain(0), toy_latent(0)  # the vocabulary's size comes with the shards
WEIGHTS = {"text": 0.25, "interleaved": 0.35, "parallel": 0.15, "speech": 0.15, "asr": 0.05, "tts": 0.05}
PACK = PackConfig(rows=8, units_per_row=256, tokens_per_row=768)
PRETRAIN = TrainConfig(steps=500, lr=2e-3, warmup_steps=50, checkpoint_every=200)
