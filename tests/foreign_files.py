"""Model files of other engines, written byte by byte: a model.bin of CTranslate2, a GGUF file, and tiny models in them."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch

Arrays = dict[str, np.ndarray]
CT2_TYPES = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4, "bfloat16": 5}


def bfloat16_bits(array: np.ndarray) -> np.ndarray:
    return torch.from_numpy(np.ascontiguousarray(array, np.float32)).bfloat16().view(torch.int16).numpy()


def write_ct2(
    path: Path,
    variables: dict[str, tuple[str, np.ndarray]],
    *,
    version: int = 6,
    spec: str = "WhisperSpec",
    aliases: tuple[tuple[str, str], ...] = (("decoder/projection/weight", "decoder/embeddings/weight"),),
) -> None:
    """`variables`: name -> (type, array); bfloat16 as its bits."""

    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    out = [struct.pack("<I", version), text(spec), struct.pack("<II", 3, len(variables))]
    for name, (kind, array) in variables.items():
        raw = array.tobytes()
        out += [text(name), struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)]
        out += [struct.pack("<BI", CT2_TYPES[kind], len(raw)), raw]
    out += [struct.pack("<I", len(aliases)), *(text(part) for alias in aliases for part in alias)]
    path.write_bytes(b"".join(out))


def ct2_variables(whisper: Any) -> Arrays:
    """The float32 variables of a transformers Whisper, fused as CTranslate2 fuses them."""
    theirs = {name: tensor.detach().numpy() for name, tensor in whisper.model.state_dict().items()}
    out: Arrays = {}

    def linear(name: str, *parts: str) -> None:
        weights = [theirs[f"{part}.weight"] for part in parts]
        out[f"{name}/weight"] = np.concatenate(weights)
        biases = [theirs.get(f"{part}.bias", np.zeros(len(w), np.float32)) for part, w in zip(parts, weights)]
        out[f"{name}/bias"] = np.concatenate(biases)

    def norm(name: str, part: str) -> None:
        out[f"{name}/gamma"], out[f"{name}/beta"] = theirs[f"{part}.weight"], theirs[f"{part}.bias"]

    config = whisper.config
    for side, count in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        for i in range(count):
            a, b = f"{side}/layer_{i}", f"{side}.layers.{i}"
            norm(f"{a}/self_attention/layer_norm", f"{b}.self_attn_layer_norm")
            linear(f"{a}/self_attention/linear_0", *(f"{b}.self_attn.{p}_proj" for p in "qkv"))
            linear(f"{a}/self_attention/linear_1", f"{b}.self_attn.out_proj")
            if side == "decoder":
                norm(f"{a}/attention/layer_norm", f"{b}.encoder_attn_layer_norm")
                linear(f"{a}/attention/linear_0", f"{b}.encoder_attn.q_proj")
                linear(f"{a}/attention/linear_1", *(f"{b}.encoder_attn.{p}_proj" for p in "kv"))
                linear(f"{a}/attention/linear_2", f"{b}.encoder_attn.out_proj")
            norm(f"{a}/ffn/layer_norm", f"{b}.final_layer_norm")
            linear(f"{a}/ffn/linear_0", f"{b}.fc1")
            linear(f"{a}/ffn/linear_1", f"{b}.fc2")
        norm(f"{side}/layer_norm", f"{side}.layer_norm")
        out[f"{side}/position_encodings/encodings"] = theirs[f"{side}.embed_positions.weight"]
    linear("encoder/conv1", "encoder.conv1")
    linear("encoder/conv2", "encoder.conv2")
    out["decoder/embeddings/weight"] = theirs["decoder.embed_tokens.weight"]
    return out


def ct2_settings(whisper: Any, **changes: int) -> dict[str, tuple[str, np.ndarray]]:
    """The scalars that a converted Whisper has."""
    config = whisper.config
    values = {
        "decoder/activation": 3,
        "decoder/alibi": 0,
        "decoder/pre_norm": 1,
        "decoder/scale_embeddings": 0,
        "decoder/num_heads": config.decoder_attention_heads,
        "encoder/num_heads": config.encoder_attention_heads,
    }
    return {name: ("int16", np.array(value, np.int16)) for name, value in (values | changes).items()}


def ct2_folder(folder: Path, whisper: Any, kind: str = "float32", **changes: int) -> Path:
    """model.bin with weights of this type and config.json; tokenizer.json is there already."""
    variables = {name: _stored(name, array, kind) for name, array in ct2_variables(whisper).items()}
    scaled = {f"{name}_scale": scale for name, (_, _, scale) in variables.items() if scale is not None}
    floats = {name: ("float32", scale.astype(np.float32)) for name, scale in scaled.items()}
    kept = {name: (kind, array) for name, (kind, array, _) in variables.items()}
    write_ct2(folder / "model.bin", kept | floats | ct2_settings(whisper, **changes))
    (folder / "config.json").write_text(json.dumps({"suppress_ids": [1, 2], "alignment_heads": [[0, 0]]}))
    return folder


def _stored(name: str, array: np.ndarray, kind: str) -> tuple[str, np.ndarray, np.ndarray | None]:
    """(type, values, scale): integers for matrices alone, int8 with a scale per row and int16 with one for all."""
    if kind in ("float32", "float16"):
        return kind, array.astype(kind), None
    if kind == "bfloat16":
        return kind, bfloat16_bits(array), None
    if array.ndim < 2 or "position" in name or "conv" in name:
        return "float32", array, None
    if kind == "int8":
        scale = 127 / np.abs(array).max(1)
        return kind, np.rint(array * scale[:, None]).astype(np.int8), scale
    scale = np.array(1024.0)
    return kind, np.rint(array * scale).astype(np.int16), scale


def write_gguf(
    path: Path,
    metadata: dict[str, Any],
    tensors: dict[str, tuple[int, tuple[int, ...], bytes]],
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
) -> None:
    """`tensors`: name -> (number of the quantisation, shape as numpy writes it, bytes)."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    def typed(value: Any) -> tuple[int, bytes]:
        if isinstance(value, bool):
            return 7, struct.pack("<?", value)
        if isinstance(value, int):
            return 4, struct.pack("<I", value)
        if isinstance(value, float):
            return 6, struct.pack("<f", value)
        if isinstance(value, str):
            return 8, text(value)
        inner = [typed(v) for v in value]
        return 9, struct.pack("<IQ", inner[0][0], len(inner)) + b"".join(raw for _, raw in inner)

    head = [magic, struct.pack("<IQQ", version, len(tensors), len(metadata))]
    for key, value in metadata.items():
        kind, raw = typed(value)
        head += [text(key), struct.pack("<I", kind), raw]
    body = b""
    for name, (kind, shape, raw) in tensors.items():
        body += bytes(-len(body) % 32)
        head += [text(name), struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, len(body))]
        body += raw
    start = b"".join(head)
    path.write_bytes(start + bytes(-len(start) % 32) + body)


def gguf_llama(llama: Any, tokens: list[str], merges: list[str]) -> tuple[dict[str, Any], Arrays]:
    """Metadata and float32 tensors of a transformers Llama, with query and key rows in llama.cpp's order."""
    config = llama.config
    metadata: dict[str, Any] = {
        "general.architecture": "llama",
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.freq_base": config.rope_parameters["rope_theta"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token.startswith("<|") else 1 for token in tokens],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": config.bos_token_id,
        "tokenizer.ggml.eos_token_id": config.eos_token_id,
        "tokenizer.ggml.add_bos_token": False,
    }
    names = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
    parts = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    parts |= {f"self_attn.{p}_proj": f"attn_{p}" for p in "qkv"} | {"self_attn.o_proj": "attn_output"}
    parts |= {f"mlp.{p}_proj": f"ffn_{p}" for p in ("gate", "up", "down")}
    tensors = {}
    for name, tensor in llama.state_dict().items():
        name = name.removeprefix("model.").removesuffix(".weight")
        array = tensor.detach().numpy()
        if name in names:
            tensors[f"{names[name]}.weight"] = array
            continue
        _, layer, part = name.split(".", 2)
        if part in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = config.num_attention_heads if "q_proj" in part else config.num_key_value_heads
            half = len(array) // heads // 2
            order = [h * 2 * half + k + half * odd for h in range(heads) for k in range(half) for odd in (0, 1)]
            array = array[order]
        tensors[f"blk.{layer}.{parts[part]}.weight"] = array
    return metadata, tensors


def as_floats(tensors: Arrays) -> dict[str, tuple[int, tuple[int, ...], bytes]]:
    return {name: (0, array.shape, array.astype("<f4").tobytes()) for name, array in tensors.items()}
