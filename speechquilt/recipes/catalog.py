"""Every recipe by name: what `train NAME` trains and `plan NAME` prices. Names and words alone, so that listing them costs nothing.

A name tells the size that our reading of the paper's table gives: the LST paper's "1B" is `lst_1_4b`.
"""

from typing import Any, Literal, NamedTuple

from speechquilt.config import nearest


class Entry(NamedTuple):
    """`kind`: the command `train KIND` that trains it; `module`, `attribute`: where its object is, a dict by name."""

    kind: Literal["lm", "tokenizer", "text_to_token", "vocoder", "decoder"]
    module: str
    about: str


_LANGUAGE_MODELS, _TOKENIZERS, _SPEAKERS, _VOCODERS, _DECODERS = (
    f"speechquilt.recipes.{name}"
    for name in ("language_models", "tokenizers", "text_to_token_models", "vocoders", "decoders")
)
_LADDER = ("420m", "630m", "810m", "1_1b", "1_4b", "1_8b", "7b")
_KNOWN_AS = {"1_4b": 'the paper\'s "1B": 200k steps', "7b": "25k steps of 4M units"}

ENTRIES: dict[str, Entry] = {
    **{
        f"{family}_{size}": Entry("lm", _LANGUAGE_MODELS, f"{what}, {_KNOWN_AS.get(size, 'compute-optimal')}")
        for family, what in (("lst", "latent speech-text transformer"), ("baseline", "its token-level baseline"))
        for size in _LADDER
    },
    "interleaved_1_5b": Entry(
        "lm", _LANGUAGE_MODELS, "synthetic interleaved data at the size of the paper's ablations"
    ),
    "interleaved_9b": Entry("lm", _LANGUAGE_MODELS, "synthetic interleaved data, 1T tokens, the paper's model"),
    **{
        f"tokenizer_{size}": Entry("tokenizer", _TOKENIZERS, f"from Whisper {size}, one GPU, LibriSpeech")
        for size in ("tiny", "base", "small", "medium")
    },
    "tokenizer_large": Entry("tokenizer", _TOKENIZERS, "from Whisper large-v3, the paper's tokenizer"),
    "text_to_token_1_5b": Entry("text_to_token", _SPEAKERS, "the paper's size; everything else is our choice"),
    "decoder_111m": Entry(
        "decoder", _DECODERS, "speech decoder of the size that GLM-4-Voice released; schedule our choice"
    ),
    "vocoder_22khz": Entry("vocoder", _VOCODERS, "Vocos with discriminators for the speech decoder's mel, one GPU"),
}


def load(name: str) -> Any:
    """The recipe's object. Raises ValueError naming the nearest known recipes."""
    if name not in ENTRIES:
        raise ValueError(f"recipe {name!r} is unknown; {nearest(name, list(ENTRIES))}")
    import importlib

    return importlib.import_module(ENTRIES[name].module).RECIPES[name]
