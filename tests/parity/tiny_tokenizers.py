"""Tiny random folders with the real layouts: Whisper, the released GLM-4-Voice tokenizer, HuBERT with k-means units."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

WHISPER_TOKENS = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
GLM4_CONFIG: dict[str, Any] = {  # the released keys; 1500 positions are 120 (2.4 s) and blocks of 200 frames 16
    "model_type": "whisper",
    "architectures": ["WhisperVQEncoder"],
    "num_mel_bins": 20,
    "d_model": 32,
    "encoder_layers": 4,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "activation_function": "gelu",
    "max_source_positions": 120,
    "pooling_kernel_size": 4,
    "pooling_type": "avg",
    "pooling_position": 2,
    "quantize_position": 2,
    "quantize_vocab_size": 24,
    "quantize_ema_decay": 0.99,
    "quantize_restart_interval": 100,
    "quantize_loss_scale": 10.0,
    "quantize_commit_coefficient": 0.25,
    "quantize_causal_block_size": 16,
    "quantize_causal_encoder": False,
    "encoder_causal_convolution": True,
    "encoder_causal_attention": False,
}


def noise(seed: int, seconds: float) -> Tensor:
    """Noise whose loudness and colour change every 50 ms."""
    draw = np.random.default_rng(seed)
    num_samples = round(seconds * 16000)
    loudness = np.exp(draw.uniform(-6, -1, num_samples // 800 + 1)).repeat(800)[:num_samples]
    white = draw.standard_normal(num_samples + 1)
    mix = draw.uniform(-1, 1, num_samples // 800 + 1).repeat(800)[:num_samples]
    return torch.tensor((white[1:] + mix * white[:-1]) * loudness, dtype=torch.float32)


def randomise(tensors: dict[str, Tensor], seed: int = 0) -> None:
    """Every tensor away from its neutral value, so that a forgotten bias or norm shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in sorted(tensors):
            tensor = tensors[name]
            scale = 1.5 * tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.3
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
            if "norm" in name and name.endswith("weight"):
                tensor += 1


def whisper(
    folder: Path, *, max_shard_size: str = "5GB", **changes: Any
) -> transformers.WhisperForConditionalGeneration:
    """What `save_pretrained` of a Whisper writes, and its tokenizer.json."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=270, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["the cat sat on the mat", "where does anna live"], trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in WHISPER_TOKENS])
    config = transformers.WhisperConfig(
        **{
            "vocab_size": tokenizer.get_vocab_size(),
            "num_mel_bins": 20,
            "d_model": 32,
            "encoder_layers": 4,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "max_source_positions": 120,
            "max_target_positions": 24,
            "decoder_start_token_id": tokenizer.token_to_id("<|startoftranscript|>"),
            "bos_token_id": tokenizer.token_to_id("<|endoftext|>"),
            "eos_token_id": tokenizer.token_to_id("<|endoftext|>"),
            "pad_token_id": tokenizer.token_to_id("<|endoftext|>"),
        }
        | changes
    )
    model = transformers.WhisperForConditionalGeneration(config).eval()
    table = "model.encoder.embed_positions.weight"
    randomise({k: v for k, v in model.state_dict().items() if k != table})
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save(str(folder / "tokenizer.json"))
    return model


def glm4_voice_weights(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Names and shapes of spec 1, 2.3, with all that a reader must drop: upper layers, final norm, the decoder."""
    width, ffn, codes = config["d_model"], config["encoder_ffn_dim"], config["quantize_vocab_size"]
    positions = config["max_source_positions"]
    shapes: dict[str, tuple[int, ...]] = {
        "conv1.weight": (width, config["num_mel_bins"], 3),
        "conv1.bias": (width,),
        "conv2.weight": (width, width, 3),
        "conv2.bias": (width,),
        "embed_positions.weight": (positions, width),
        "embed_positions2.weight": (-(-positions // config["pooling_kernel_size"]), width),
        "codebook.weight": (codes, width),
        "ema_count": (codes,),
        "ema_weight": (codes, width),
        "layer_norm.weight": (width,),
        "layer_norm.bias": (width,),
    }
    for i in range(config["encoder_layers"]):
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            shapes[f"layers.{i}.self_attn.{name}.weight"] = (width, width)
            if name != "k_proj":
                shapes[f"layers.{i}.self_attn.{name}.bias"] = (width,)
        for name, out, inside in (("fc1", ffn, width), ("fc2", width, ffn)):
            shapes |= {f"layers.{i}.{name}.weight": (out, inside), f"layers.{i}.{name}.bias": (out,)}
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            shapes |= {f"layers.{i}.{name}.weight": (width,), f"layers.{i}.{name}.bias": (width,)}
    weights = {f"model.encoder.{name}": torch.zeros(shape) for name, shape in shapes.items()}
    weights["model.decoder.embed_tokens.weight"] = torch.zeros(7, width)
    randomise(weights, seed)
    return weights


def write_glm4_voice(folder: Path, config: dict[str, Any], weights: dict[str, Tensor], *, shards: int = 1) -> Path:
    """config.json and safetensors, in one file or in shards with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    names, index = sorted(weights), {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: weights[name] for name in names[i::shards]}, folder / file)
        index |= dict.fromkeys(names[i::shards], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def hubert(folder: Path, *, num_codes: int = 24, units: dict[str, Any] | None = None, **changes: Any) -> Any:
    """A HuBERT folder with units; the centroids are what it hears in noise, so that neighbouring units differ."""
    config = transformers.HubertConfig(
        **{
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "conv_dim": (16,) * 7,
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
        }
        | changes
    )
    model = transformers.HubertModel(config).eval()
    randomise({k: v for k, v in model.state_dict().items() if "original0" not in k and "masked" not in k})
    model.save_pretrained(folder)
    settings = {"layer": 2, "core_s": 1.6, "margin_s": 0.4} | (units or {})
    (folder / "units.json").write_text(json.dumps(settings))
    with torch.no_grad():
        states = model(noise(1, 6.0)[None], output_hidden_states=True).hidden_states[settings["layer"]][0]
    chosen = torch.linspace(0, len(states) - 1, num_codes).long()
    save_file({"centroids": states[chosen].clone()}, folder / "centroids.safetensors")
    return model
