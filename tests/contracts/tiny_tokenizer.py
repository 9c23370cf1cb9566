"""A tiny speech tokenizer of ours with random weights, small enough for windows of 2.4 s to hold all edges."""

from dataclasses import replace
from typing import Any, TypeVar

import torch

from speechquilt.text import TextTokenizer
from speechquilt.tokenizer.supervised import SupervisedTokenizer, SupervisedTokenizerConfig
from speechquilt.tokenizer.token_encoder import TokenEncoder
from tests.parity.tiny_tokenizers import noise

TEXT = TextTokenizer.train(["the cat sat on the mat", "where does anna live"], 300)
CONFIG = SupervisedTokenizerConfig(
    text_vocab_size=TEXT.size, num_mels=20, width=32, num_heads=2, ffn_width=64, layers_below=2, layers_above=1,
    decoder_layers=1, block_frames=16, max_frames=120, codebook_size=24, max_text_ids=32,
)  # fmt: skip

M = TypeVar("M", bound=TokenEncoder)


def build(**keys: Any) -> SupervisedTokenizer:
    return spread_codes(replace(CONFIG, **keys).build(TEXT).eval())


def spread_codes(model: M) -> M:
    """Codes that are pooled vectors of noise, so that neighbouring tokens differ."""
    wav_S = noise(1, 20.0)
    with torch.no_grad():
        pooled_BTD, _ = model._pooled(wav_S[None], torch.tensor([len(wav_S)]))
    num_codes = model.vocab_size
    model.quantizer.codebook_KD.copy_(pooled_BTD[0, :: pooled_BTD.shape[1] // num_codes][:num_codes])
    return model
