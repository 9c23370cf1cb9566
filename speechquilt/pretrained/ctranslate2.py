"""A Whisper of CTranslate2 (a folder with model.bin) becomes a Hugging Face folder that transformers and
`tokenizer.whisper` read. The binary file is parsed here; CTranslate2 is not needed.

Trap: projections are fused. The first of self-attention holds query, key and value below each other, the second of
cross-attention key and value. Whisper's keys have no bias, so their rows of a fused bias must be zero.
"""

from pathlib import Path
from typing import Any

import numpy as np

from speechquilt.files import write_json
from speechquilt.nn.hugging_face import read_json
from speechquilt.pretrained.byte_reader import ByteReader
from speechquilt.pretrained.model_files import Arrays, bfloat16, write_model

VERSIONS = (5, 6)  # of the binary format
_TYPES = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2", 5: "<u2"}  # 5 is bfloat16
_BFLOAT16 = 5
_COMPUTED = {  # scalars that change what the model computes, and the values that Whisper has
    "activation": 3,  # the exact GELU
    "alibi": 0,
    "pre_norm": 1,
    "scale_embeddings": 0,
    "start_from_zero_embedding": 0,
}
_FEATURES = {  # how the log-mel spectrogram of every Whisper is made
    "feature_extractor_type": "WhisperFeatureExtractor",
    "processor_class": "WhisperProcessor",
    "sampling_rate": 16000,
    "n_fft": 400,
    "hop_length": 160,
    "chunk_length": 30,
    "padding_side": "right",
    "padding_value": 0.0,
    "return_attention_mask": False,
}


def convert_whisper(source: Path, out: Path) -> None:
    """`source` with model.bin, config.json and tokenizer.json -> weights, configs and tokenizer in the folder `out`.

    Weights of any type are stored as float32. Raises FileNotFoundError or ValueError saying what is not understood.
    """
    variables = read_model(source / "model.bin")
    settings, tokenizer = read_json(source / "config.json"), read_json(source / "tokenizer.json")
    weights = whisper_weights(variables)
    ids = tokenizer["model"]["vocab"] | {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    config = _config(variables, weights, ids)
    write_model(out, weights, config, _generation(settings, ids, config))
    write_json(out / "tokenizer.json", tokenizer)
    end = "<|endoftext|>"
    special = {f"{role}_token": end for role in ("bos", "eos", "unk", "pad")}
    write_json(out / "tokenizer_config.json", {"tokenizer_class": "WhisperTokenizer", "errors": "replace", **special})
    write_json(out / "preprocessor_config.json", _FEATURES | {"feature_size": config["num_mel_bins"]})


def read_model(path: Path) -> Arrays:
    """The variables of a model.bin under CTranslate2's names, in their own types; bfloat16 as float32.

    Raises FileNotFoundError or ValueError: another version, another kind of model, a cut file, bytes left over.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; give the folder of a Whisper that CTranslate2 has converted")
    file = ByteReader(path)
    version = file.number("I")
    if version not in VERSIONS:
        raise ValueError(f"{path} begins with version {version}, not with one of {VERSIONS}; convert the model again")
    spec = _name(file)
    if spec != "WhisperSpec":
        raise ValueError(f"{path} holds a {spec!r}, not a WhisperSpec; give a Whisper")
    file.number("I")  # revision of the spec
    variables = dict(_variable(file) for _ in range(file.number("I")))
    for _ in range(file.number("I")):
        alias, target = _name(file), _name(file)
        if (alias, target) != ("decoder/projection/weight", "decoder/embeddings/weight"):
            raise ValueError(f"{path}: {alias} stands for {target}, which no Whisper of OpenAI's has")
    if file.left:
        raise ValueError(f"{path} has {file.left} bytes behind its last variable; it is damaged, fetch it again")
    return variables


def _name(file: ByteReader) -> str:
    """A string with its length in front, a zero byte at its end included."""
    return file.text(file.number("H")).removesuffix("\0")


def _variable(file: ByteReader) -> tuple[str, np.ndarray]:
    name = _name(file)
    shape = tuple(file.number("I") for _ in range(file.number("B")))
    kind = file.number("B")
    raw = file.bytes(file.number("I"))
    if kind not in _TYPES:
        raise ValueError(f"{file.path}: {name} has type {kind}, not one of {sorted(_TYPES)}; convert the model again")
    values = np.frombuffer(raw, _TYPES[kind])
    if values.size != int(np.prod(shape, dtype=object)):
        raise ValueError(f"{file.path}: {name} has {values.size} values for shape {shape}; fetch it again")
    return name, (bfloat16(values) if kind == _BFLOAT16 else values).reshape(shape)


def whisper_weights(variables: Arrays) -> Arrays:
    """Variables -> WhisperForConditionalGeneration's names and shapes, float32; integer weights times their scales.

    Raises ValueError for a variable that is missing or that no part of Whisper has.
    """
    source = _Taken(variables)
    for side in ("encoder", "decoder"):
        source.settings(side)
        for layer in range(source.num_layers(side)):
            _layer(source, f"{side}/layer_{layer}/", f"model.{side}.layers.{layer}.", crosses=side == "decoder")
        source.norm(f"{side}/layer_norm", f"model.{side}.layer_norm")
        source.plain(f"{side}/position_encodings/encodings", f"model.{side}.embed_positions.weight")
    for conv in ("conv1", "conv2"):
        source.linear(f"encoder/{conv}", f"model.encoder.{conv}")
    source.plain("decoder/embeddings/weight", "model.decoder.embed_tokens.weight")
    return source.finished()


def _layer(source: "_Taken", theirs: str, ours: str, *, crosses: bool) -> None:
    source.norm(f"{theirs}self_attention/layer_norm", f"{ours}self_attn_layer_norm")
    own = f"{ours}self_attn."
    source.linear(f"{theirs}self_attention/linear_0", f"{own}q_proj", f"{own}k_proj", f"{own}v_proj")
    source.linear(f"{theirs}self_attention/linear_1", f"{own}out_proj")
    if crosses:
        source.norm(f"{theirs}attention/layer_norm", f"{ours}encoder_attn_layer_norm")
        heard = f"{ours}encoder_attn."
        source.linear(f"{theirs}attention/linear_0", f"{heard}q_proj")
        source.linear(f"{theirs}attention/linear_1", f"{heard}k_proj", f"{heard}v_proj")
        source.linear(f"{theirs}attention/linear_2", f"{heard}out_proj")
    source.norm(f"{theirs}ffn/layer_norm", f"{ours}final_layer_norm")
    source.linear(f"{theirs}ffn/linear_0", f"{ours}fc1")
    source.linear(f"{theirs}ffn/linear_1", f"{ours}fc2")


class _Taken:
    """Variables that are taken one by one, each once, and what they became."""

    def __init__(self, variables: Arrays) -> None:
        self._left = dict(variables)
        self._weights: Arrays = {}

    def num_layers(self, side: str) -> int:
        prefix = f"{side}/layer_"
        found = {name.removeprefix(prefix).partition("/")[0] for name in self._left if name.startswith(prefix)}
        return len(found - {"norm"})

    def settings(self, side: str) -> None:
        """The scalars of one side: those that change what is computed must be as Whisper has them."""
        for name in [name for name in self._left if name.startswith(f"{side}/") and name.count("/") == 1]:
            value, key = int(self._left.pop(name)), name.removeprefix(f"{side}/")
            if value != _COMPUTED.get(key, value):
                raise ValueError(f"{name}={value} must be {_COMPUTED[key]}, as in OpenAI's Whisper; start from one")

    def plain(self, theirs: str, ours: str) -> None:
        self._weights[ours] = self._pop(theirs)

    def norm(self, theirs: str, ours: str) -> None:
        self.plain(f"{theirs}/gamma", f"{ours}.weight")
        self.plain(f"{theirs}/beta", f"{ours}.bias")

    def linear(self, theirs: str, *ours: str) -> None:
        """One projection, or several below each other."""
        weights, biases = self._pop(f"{theirs}/weight"), self._pop(f"{theirs}/bias")
        for name, weight, bias in zip(ours, np.split(weights, len(ours)), np.split(biases, len(ours))):
            self._weights[f"{name}.weight"] = weight
            if not name.endswith("k_proj"):
                self._weights[f"{name}.bias"] = bias
            elif bias.any():
                raise ValueError(f"{theirs}: the keys have a bias, in Whisper they have none; start from a Whisper")

    def finished(self) -> Arrays:
        if self._left:
            raise ValueError(f"{', '.join(sorted(self._left)[:3])} ({len(self._left)} such) is no part of a Whisper")
        return self._weights

    def _pop(self, name: str) -> np.ndarray:
        if name not in self._left:
            raise ValueError(f"{name} is missing; the file is no complete Whisper, convert the model again")
        values, scale = self._left.pop(name), self._left.pop(f"{name}_scale", None)
        if scale is None:
            return values.astype(np.float32)
        # integers are weight times scale, one scale per row or one for all
        return values.astype(np.float32) / scale.astype(np.float32).reshape(-1, *[1] * (values.ndim - 1))


def _config(variables: Arrays, weights: Arrays, ids: dict[str, int]) -> dict[str, Any]:
    encoder, decoder = "model.encoder.", "model.decoder."
    num_ids, width = weights[f"{decoder}embed_tokens.weight"].shape
    if max(ids.values()) >= num_ids:
        raise ValueError(
            f"tokenizer.json has ids up to {max(ids.values())}, model.bin has {num_ids} rows; they do not belong together"
        )
    end, start = _id(ids, "<|endoftext|>"), _id(ids, "<|startoftranscript|>")
    layers = {
        side: len({name.split(".")[3] for name in weights if name.startswith(f"model.{side}.layers.")})
        for side in ("encoder", "decoder")
    }
    return {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "activation_function": "gelu",
        "scale_embedding": False,
        "tie_word_embeddings": True,
        "vocab_size": num_ids,
        "d_model": width,
        "num_mel_bins": weights[f"{encoder}conv1.weight"].shape[1],
        "max_source_positions": len(weights[f"{encoder}embed_positions.weight"]),
        "max_target_positions": len(weights[f"{decoder}embed_positions.weight"]),
        **{f"{side}_layers": count for side, count in layers.items()},
        **{f"{side}_attention_heads": _num_heads(variables, side) for side in layers},
        **{f"{side}_ffn_dim": len(weights[f"model.{side}.layers.0.fc1.weight"]) for side in layers},
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "decoder_start_token_id": start,
    }


def _num_heads(variables: Arrays, side: str) -> int:
    name = f"{side}/num_heads"
    if name not in variables:
        raise ValueError(f"{name} is missing; convert the model again with a newer CTranslate2")
    return int(variables[name])


def _generation(settings: dict[str, Any], ids: dict[str, int], config: dict[str, Any]) -> dict[str, Any]:
    """What transformers' generate needs to know of this Whisper."""
    languages = set(settings.get("lang_ids", []))
    multilingual = config["vocab_size"] >= 51865  # the English-only vocabulary is one id smaller
    of_all = {
        "is_multilingual": multilingual,
        "no_timestamps_token_id": _id(ids, "<|notimestamps|>"),
        "prev_sot_token_id": _id(ids, "<|startofprev|>"),
        "max_length": config["max_target_positions"],
        "suppress_tokens": settings.get("suppress_ids", []),
        "begin_suppress_tokens": settings.get("suppress_ids_begin", []),
        "alignment_heads": settings.get("alignment_heads", []),
        "return_timestamps": False,
    }
    if not multilingual:
        return of_all
    return of_all | {
        "lang_to_id": {token: i for token, i in ids.items() if i in languages},
        "task_to_id": {task: _id(ids, f"<|{task}|>") for task in ("transcribe", "translate")},
    }


def _id(ids: dict[str, int], token: str) -> int:
    if token not in ids:
        raise ValueError(f"tokenizer.json has no token {token}; give Whisper's own")
    return ids[token]
