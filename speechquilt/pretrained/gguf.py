"""A Llama in one GGUF file, quantised or not, becomes a Hugging Face folder that transformers and `model.warm_start`
read. The file is parsed here; llama.cpp is not needed.

Traps. GGUF's Llama rotates neighbouring channels, Hugging Face's the two halves of a head: rows of query and key are put
in the other order. Dimensions are stored fastest first, so shapes are reversed. The rule that cuts text before merges
is named in the file and not described, so only tokenizers known here are read.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from speechquilt.files import write_json
from speechquilt.pretrained.byte_reader import ByteReader
from speechquilt.pretrained.model_files import Arrays, write_model
from speechquilt.pretrained.quantised_blocks import KINDS, dequantised

VERSIONS = (2, 3)
_INTEGERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 10: "Q", 11: "q"}  # struct's codes of metadata types
_REALS = {6: "f", 12: "d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_SPECIAL = 3  # type of tokens that text never spells: <|endoftext|> and the like
_WHOLE = {  # weights outside the layers
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert_llama(source: Path, out: Path) -> None:
    """The file `source` -> weights (float32), configs and tokenizer in the folder `out`.

    Raises FileNotFoundError or ValueError saying what of the file is not understood.
    """
    metadata, tensors = read_gguf(source)
    settings = _Metadata(metadata, source)
    config = _config(settings)
    weights = llama_weights(tensors, config, source)
    if len(weights["model.embed_tokens.weight"]) != config["vocab_size"]:
        raise ValueError(
            f"{source} lists {config['vocab_size']} tokens and has other rows; they do not belong together"
        )
    config["tie_word_embeddings"] = "lm_head.weight" not in weights
    write_model(out, weights, config, {})
    tokenizer = _tokenizer(settings)
    tokenizer.save(str(out / "tokenizer.json"))
    special = {f"{role}_token": tokenizer.id_to_token(config[f"{role}_token_id"]) for role in ("bos", "eos", "pad")}
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    if template := settings.get("tokenizer.chat_template", ""):
        tokenizer_config["chat_template"] = template
    write_json(out / "tokenizer_config.json", tokenizer_config)


def read_gguf(path: Path) -> tuple[dict[str, Any], Arrays]:
    """Metadata, and tensors as float32 in their usual shapes.

    Raises FileNotFoundError or ValueError: another format or version, an unknown type, a cut file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; give a GGUF file")
    file = ByteReader(path)
    if file.left < 4 or bytes(file.bytes(4)) != b"GGUF":
        raise ValueError(f"{path} does not begin with GGUF; give a file of llama.cpp's format")
    version = file.number("I")
    if version not in VERSIONS:
        raise ValueError(f"{path} is GGUF version {version}, not one of {VERSIONS}; convert the model again")
    num_tensors, num_keys = file.number("Q"), file.number("Q")
    metadata = {_string(file): _value(file, file.number("I")) for _ in range(num_keys)}
    listed = [_listed(file) for _ in range(num_tensors)]
    align = metadata.get("general.alignment", 32)
    start = -(-file.at // align) * align
    tensors = {}
    for name, shape, kind, offset in listed:
        if kind not in KINDS:
            known = ", ".join(kind.name for kind in KINDS.values())
            raise ValueError(f"{path}: {name} has the quantisation number {kind}; {known} are read, choose such a file")
        count, values_per_block = math.prod(shape), KINDS[kind].values
        if count % values_per_block:
            raise ValueError(f"{path}: {name} of shape {shape} is not made of blocks of {values_per_block} values")
        file.at = start + offset
        raw = np.frombuffer(file.bytes(count // values_per_block * KINDS[kind].bytes), np.uint8)
        tensors[name] = dequantised(raw, kind).reshape(shape)
    return metadata, tensors


def _string(file: ByteReader) -> str:
    return file.text(file.number("Q"))


def _value(file: ByteReader, kind: int) -> Any:
    if kind in _INTEGERS:
        return file.number(_INTEGERS[kind])
    if kind in _REALS:
        return file.real(_REALS[kind])
    if kind == _BOOL:
        return bool(file.number("B"))
    if kind == _STRING:
        return _string(file)
    if kind == _ARRAY:
        inner = file.number("I")
        return [_value(file, inner) for _ in range(file.number("Q"))]
    raise ValueError(f"{file.path} has a value of the unknown type {kind} before byte {file.at}; it is damaged")


def _listed(file: ByteReader) -> tuple[str, tuple[int, ...], int, int]:
    """(name, shape, quantisation, offset in bytes) of one tensor."""
    name = _string(file)
    shape = tuple(file.number("Q") for _ in range(file.number("I")))[::-1]
    return name, shape, file.number("I"), file.number("Q")


class _Metadata:
    """Values of the file by key; a missing one says so."""

    def __init__(self, values: dict[str, Any], path: Path) -> None:
        self.path = path
        self._values = values

    def __getitem__(self, key: str) -> Any:
        if key not in self._values:
            raise ValueError(f"{self.path} has no value {key}; convert the model again with a newer llama.cpp")
        return self._values[key]

    def get(self, key: str, default: Any) -> Any:
        return self._values.get(key, default)


def _config(settings: _Metadata) -> dict[str, Any]:
    family = settings["general.architecture"]
    if family != "llama":
        raise ValueError(f"{settings.path} holds the architecture {family!r}; give a llama")
    width, heads = settings["llama.embedding_length"], settings["llama.attention.head_count"]
    head_width = settings.get("llama.attention.key_length", width // heads)
    for key, rule in {
        "llama.rope.dimension_count": head_width,
        "llama.rope.scaling.type": "none",
        "llama.attention.value_length": head_width,
    }.items():
        if settings.get(key, rule) != rule:
            raise ValueError(f"{settings.path}: {key}={settings[key]!r} must be {rule!r}; give a model without it")
    bos, eos = settings["tokenizer.ggml.bos_token_id"], settings["tokenizer.ggml.eos_token_id"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "vocab_size": len(settings["tokenizer.ggml.tokens"]),
        "hidden_size": width,
        "head_dim": head_width,
        "intermediate_size": settings["llama.feed_forward_length"],
        "num_hidden_layers": settings["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": settings.get("llama.attention.head_count_kv", heads),
        "max_position_embeddings": settings["llama.context_length"],
        "rms_norm_eps": _shortest(settings["llama.attention.layer_norm_rms_epsilon"]),
        "rope_theta": _shortest(settings.get("llama.rope.freq_base", 10_000.0)),
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": settings.get("tokenizer.ggml.padding_token_id", eos),
    }


def _shortest(value: float) -> float:
    """1e-05 for the float32 that is nearest to it, which as a Python number is 9.99999974e-06."""
    return float(str(np.float32(value)))


def llama_weights(tensors: Arrays, config: dict[str, Any], source: Path) -> Arrays:
    """GGUF's names and order of rows -> those of LlamaForCausalLM. Raises ValueError for a tensor without a place."""
    rotated = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    for name, array in tensors.items():
        if name in _WHOLE:
            weights[_WHOLE[name]] = array
            continue
        block, _, rest = name.partition(".")
        layer, _, rest = rest.partition(".")
        part, _, kind = rest.partition(".")
        if block != "blk" or part not in _PARTS or kind != "weight":
            raise ValueError(f"{source}: {name} has no place in a Llama of Hugging Face; give a model without it")
        if part in rotated:
            array = in_halves(array, rotated[part])
        weights[f"model.layers.{layer}.{_PARTS[part]}.weight"] = array
    return weights


def in_halves(weight_OD: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of each head from neighbouring pairs (0 with 1) to halves (0 with half of the head's width)."""
    pairs_HPND = weight_OD.reshape(num_heads, -1, 2, weight_OD.shape[1])
    return pairs_HPND.swapaxes(1, 2).reshape(weight_OD.shape)


def _tokenizer(settings: _Metadata) -> Tokenizer:
    """Byte-level BPE with the file's tokens and merges. Raises ValueError for any other kind."""
    kind, rule = settings["tokenizer.ggml.model"], settings.get("tokenizer.ggml.pre", "")
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    rules = {
        "gpt-2": words,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words]),
    }
    if kind != "gpt2" or rule not in rules:
        raise ValueError(
            f"{settings.path} has the tokenizer {kind}/{rule}; gpt2 with one of {', '.join(rules)} is read, take the "
            "original folder of the model"
        )
    tokens, merges = settings["tokenizer.ggml.tokens"], settings["tokenizer.ggml.merges"]
    bpe = models.BPE(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[tuple(merge.split(" ")) for merge in merges]
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer, tokenizer.decoder = rules[rule], decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, settings["tokenizer.ggml.token_type"]) if kind == _SPECIAL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer
