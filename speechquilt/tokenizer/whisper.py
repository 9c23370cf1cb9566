"""Start from Whisper: a Hugging Face folder becomes a speech tokenizer that is ready to be trained (spec 1, 2.1, 2.5).

It reads config.json, safetensors and tokenizer.json, nothing that runs code.
The start keeps what Whisper computes: without pooling, causality and codebook the states are Whisper's, whichever
way positions pass the bottleneck, except the paper's.
Trap: pooling, the causal stem, the block mask and the streaming features are new to these weights and cost words at
once; the codebook and the CTC head are empty, so tokens mean nothing before training.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from speechquilt.config import from_dict
from speechquilt.nn.hub import local_folder
from speechquilt.nn.hugging_face import read_json
from speechquilt.text import TextTokenizer
from speechquilt.tokenizer.heads import CTCHead
from speechquilt.tokenizer.saved_weights import filled, read_folder
from speechquilt.tokenizer.supervised import SupervisedTokenizer, SupervisedTokenizerConfig
from speechquilt.tokenizer.whisper_sizes import RATES, WARMUP_UPDATES, rate_fields

START, END, TASK, NO_TIMES = "<|startoftranscript|>", "<|endoftext|>", "<|transcribe|>", "<|notimestamps|>"
_PARTS = {"model.encoder.": "encoder.", "model.decoder.": "decoder."}
_SIZES = {  # our fields that the checkpoint alone decides, and their keys in config.json
    "num_mels": "num_mel_bins",
    "width": "d_model",
    "num_heads": "encoder_attention_heads",
    "ffn_width": "encoder_ffn_dim",
    "decoder_layers": "decoder_layers",
    "text_vocab_size": "vocab_size",
}
Positions = Literal["out", "kept", "twice"]
_DERIVED = ("layers_above", "decoder_prompt", "decoder_end", "max_text_ids")


def whisper_start(
    folder: Path, *, language: str | None = "en", positions: Positions = "out", **fields: Any
) -> SupervisedTokenizer:
    """A tokenizer with Whisper's encoder, decoder and text tokenizer; codebook and CTC head are new, drawn from `seed`.

    `language`: the language token of the decoder's prompt; None for the English-only checkpoints, which have none.
    `positions` of Whisper's table on their way through the bottleneck. "out": taken out of the pooled vectors and put back
    behind the codebook by the second table. "kept": they stay in the vectors, and the second table starts with zeros.
    Both keep what Whisper computes. "twice": they stay, and the second table is the first rows of the first, as the
    released tokenizers start; it adds to every token the positions of another time.
    `fields`: any field of `SupervisedTokenizerConfig` that the checkpoint does not decide. Defaults: the bottleneck in
    the middle of the encoder, 12.5 Hz with 16,384 codes (other poolings: the paper's codebook), read back by the
    attention decoder.

    The text tokenizer is Whisper's, which puts no space before a first word: write texts with one, as its authors do.
    Raises FileNotFoundError or ValueError naming the file or key, the rule and the remedy.
    """
    folder = local_folder(folder)
    hf = read_json(folder / "config.json")
    text = _text_tokenizer(folder)
    config = _config(hf, text, language, {"positions_out": positions == "out"} | fields)
    weights = _weights(read_folder(folder), config, positions) | _new_weights(config)
    return filled(lambda: SupervisedTokenizer(config, TextTokenizer(text)), weights, folder)


def _config(
    hf: dict[str, Any], text: Tokenizer, language: str | None, fields: dict[str, Any]
) -> SupervisedTokenizerConfig:
    _check(hf)
    for key in (*_SIZES, *_DERIVED):
        if key in fields:
            raise ValueError(f"{key}={fields[key]!r}: the checkpoint decides {key}; leave it out")
    num_layers = hf["encoder_layers"]
    below = fields.get("layers_below", num_layers // 2)
    if not isinstance(below, int) or not 0 < below < num_layers:
        raise ValueError(
            f"layers_below={below} must lie in 1..{num_layers - 1}, below the last of the encoder's layers"
        )
    pooling = fields.get("pooling", RATES[12.5].pooling)
    own_rate = {"codebook_size", "block_frames", "max_frames"} <= fields.keys()
    prompt = _prompt(text, language)
    if fields.get("max_frames", 0) > hf["max_source_positions"]:
        raise ValueError(
            f"max_frames={fields['max_frames']} exceeds the checkpoint's max_source_positions={hf['max_source_positions']}"
        )
    defaults = {
        "layers_below": below,
        "layers_above": num_layers - below,
        "decoder_prompt": prompt,
        "decoder_end": _id(text, END),
        "max_text_ids": hf["max_target_positions"] - len(prompt),
        "read_back_head": "attention",
        "ctc_weight": 0.0,
        "vq_warmup_updates": WARMUP_UPDATES,
        **{ours: hf[theirs] for ours, theirs in _SIZES.items()},
        **({} if own_rate else rate_fields(pooling, hf["max_source_positions"])),
    }
    return from_dict(SupervisedTokenizerConfig, defaults | fields)


def _check(hf: dict[str, Any]) -> None:
    """ValueError unless config.json is of a Whisper that our encoder and decoder compute."""
    keys = (*_SIZES.values(), "encoder_layers", "max_source_positions", "max_target_positions")
    rules = {
        "model_type": (hf.get("model_type"), "whisper"),
        "activation_function": (hf.get("activation_function", "gelu"), "gelu"),
        "scale_embedding": (bool(hf.get("scale_embedding")), False),
        "decoder_attention_heads": (hf.get("decoder_attention_heads"), hf.get("encoder_attention_heads")),
        "decoder_ffn_dim": (hf.get("decoder_ffn_dim"), hf.get("encoder_ffn_dim")),
    }
    for key, (value, rule) in rules.items():
        if value != rule:
            raise ValueError(
                f"{key}={value!r} in config.json must be {rule!r}; start from one of OpenAI's Whisper models"
            )
    for key in keys:
        if not isinstance(hf.get(key), int):
            raise ValueError(f"config.json has {key}={hf.get(key)!r}; a whole number is expected, restore the file")


def _text_tokenizer(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; download it with the model, or save Whisper's fast tokenizer there"
        )
    return Tokenizer.from_file(str(path))


def _prompt(text: Tokenizer, language: str | None) -> tuple[int, ...]:
    middle = [] if language is None else [f"<|{language}|>", TASK]
    return tuple(_id(text, token) for token in (START, *middle, NO_TIMES))


def _id(text: Tokenizer, token: str) -> int:
    number = text.token_to_id(token)
    if number is None:
        raise ValueError(
            f"tokenizer.json has no token {token!r}; give a language that this Whisper knows, or language=None for an "
            "English-only one"
        )
    return number


def _weights(theirs: dict[str, Tensor], config: SupervisedTokenizerConfig, positions: Positions) -> dict[str, Tensor]:
    """Whisper's tensors under our names, and the second position table."""
    weights = {}
    for name, tensor in theirs.items():
        for prefix, ours in _PARTS.items():
            if name.startswith(prefix):
                weights[ours + name.removeprefix(prefix)] = tensor
    table = "encoder.embed_positions.weight"
    if table not in weights:
        raise ValueError(
            f"no tensor {table!r} under {', '.join(_PARTS)}; give a folder of WhisperForConditionalGeneration"
        )
    weights[table] = weights[table][: config.max_frames].clone()
    weights["encoder.embed_positions2.weight"] = _second_positions(weights[table], config.pooling, positions)
    return weights


def _second_positions(table_FD: Tensor, pooling: int, positions: Positions) -> Tensor:
    num_tokens = len(table_FD) // pooling
    if positions == "twice":
        return table_FD[:num_tokens].clone()
    pooled_TD = table_FD[: num_tokens * pooling].unflatten(0, (num_tokens, pooling)).mean(1)
    return pooled_TD if positions == "out" else torch.zeros_like(pooled_TD)


def _new_weights(config: SupervisedTokenizerConfig) -> dict[str, Tensor]:
    """What Whisper does not have."""
    parts: dict[str, nn.Module] = {"quantizer.": config.quantizer().build()}
    if config.ctc_weight:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            parts["ctc."] = CTCHead(config.width, config.text_vocab_size)
    return {
        prefix + name: tensor.detach() for prefix, part in parts.items() for name, tensor in part.state_dict().items()
    }
