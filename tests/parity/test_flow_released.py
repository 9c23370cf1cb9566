"""The released decoder's `flow.pt` is read, and its mel is that of a reference written from the facts alone.

The reference takes the weights under their names and uses plain tensor operations: one utterance, attention by loops over
tokens, norms by hand.

Once, outside the repository, all of it was compared with the official modules: GLM-4-Voice's `cosyvoice.flow` (commit
eb00ce9) and Matcha-TTS's components, diffusers 0.27.2 beside them, `omegaconf` and the logger replaced by stand-ins. Build
`MaskedDiffWithXvec` with random weights as `BlockConformerEncoder(input_layer="linear", pos_enc_layer_type="rel_pos_espnet",
selfattention_layer_type="block_rel_selfattn", use_cnn_module=False, macaron_style=False, block_size=10)`, save its state,
`read_released` it. Encoder, regulator, estimator (1, 2, 7, 68 and 69 frames), a whole inference with prompt and speaker over
64 tokens and the loss agreed to 4e-6; all 1,185 names and shapes of the real sizes fit, 111,166,208 parameters as
published. Two things differ on purpose: a frame takes its token by absolute time, theirs by the utterance's length, which is
the same for multiples of 64 tokens; and padding is masked, where theirs is heard.
"""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from speechquilt.decoder import flow as flow_module
from speechquilt.decoder import flow_folder
from speechquilt.decoder.flow import FlowConfig
from speechquilt.decoder.mel import MelConfig
from speechquilt.decoder.mel_stream import Window
from speechquilt.decoder.released_flow import convert, read_released
from speechquilt.decoder.token_states import TokenStatesConfig
from speechquilt.decoder.unet import UNetConfig

MELS, WIDTH, HEADS, BLOCK = 8, 12, 2, 10
UNET_HEADS, CHANNELS = 2, 16
CONFIG = FlowConfig(
    codebook_size=30,
    mel=MelConfig(num_mels=MELS),
    encoder=TokenStatesConfig(width=WIDTH, num_layers=2, num_heads=HEADS, ffn_width=20, block_tokens=BLOCK),
    unet=UNetConfig(channels=(CHANNELS, CHANNELS), blocks=1, mid_levels=2, num_heads=UNET_HEADS, head_width=8),
    speaker_width=6,
    euler_steps=3,
)
Weights = dict[str, Tensor]


def shapes() -> dict[str, tuple[int, ...]]:
    """Their names, in small sizes."""
    found: dict[str, tuple[int, ...]] = {"input_embedding.weight": (30, WIDTH)}

    def layer(name: str, *shape: int, bias: bool = True) -> None:
        found[f"{name}.weight"] = shape
        if bias:
            found[f"{name}.bias"] = shape[:1]

    layer("spk_embed_affine_layer", MELS, 6)
    layer("encoder.embed.out.0", WIDTH, WIDTH)
    for name in ("encoder.embed.out.1", "encoder.after_norm"):
        layer(name, WIDTH)
    for i in range(2):
        own = f"encoder.encoders.{i}"
        for part in ("q", "k", "v", "out"):
            layer(f"{own}.self_attn.linear_{part}", WIDTH, WIDTH)
        layer(f"{own}.self_attn.linear_pos", WIDTH, WIDTH, bias=False)
        for part in ("u", "v"):
            found[f"{own}.self_attn.pos_bias_{part}"] = (HEADS, WIDTH // HEADS)
        layer(f"{own}.feed_forward.w_1", 20, WIDTH)
        layer(f"{own}.feed_forward.w_2", WIDTH, 20)
        for part in ("norm_ff", "norm_mha"):
            layer(f"{own}.{part}", WIDTH)
    layer("encoder_proj", MELS, WIDTH)
    for i in range(4):
        layer(f"length_regulator.model.{3 * i}", MELS, MELS, 3)
        layer(f"length_regulator.model.{3 * i + 1}", MELS)
    layer("length_regulator.model.12", MELS, MELS, 1)
    unet, time = "decoder.estimator", 4 * CHANNELS
    layer(f"{unet}.time_mlp.linear_1", time, 4 * MELS)
    layer(f"{unet}.time_mlp.linear_2", time, time)
    levels = [("down_blocks.0", 4 * MELS), ("down_blocks.1", CHANNELS), ("mid_blocks.0", CHANNELS)]
    levels += [("mid_blocks.1", CHANNELS), ("up_blocks.0", 2 * CHANNELS), ("up_blocks.1", 2 * CHANNELS)]
    for name, channels_in in levels:
        residual, block = f"{unet}.{name}.0", f"{unet}.{name}.1.0"
        layer(f"{residual}.mlp.1", CHANNELS, time)
        layer(f"{residual}.res_conv", CHANNELS, channels_in, 1)
        for part, before in (("block1", channels_in), ("block2", CHANNELS)):
            layer(f"{residual}.{part}.block.0", CHANNELS, before, 3)
            layer(f"{residual}.{part}.block.1", CHANNELS)
        for part in ("q", "k", "v"):
            layer(f"{block}.attn1.to_{part}", UNET_HEADS * 8, CHANNELS, bias=False)
        layer(f"{block}.attn1.to_out.0", CHANNELS, UNET_HEADS * 8)
        layer(f"{block}.ff.net.0.proj", 4 * CHANNELS, CHANNELS)
        layer(f"{block}.ff.net.2", CHANNELS, 4 * CHANNELS)
        for part in ("norm1", "norm3"):
            layer(f"{block}.{part}", CHANNELS)
    layer(f"{unet}.down_blocks.0.2.conv", CHANNELS, CHANNELS, 3)
    layer(f"{unet}.down_blocks.1.2", CHANNELS, CHANNELS, 3)
    layer(f"{unet}.up_blocks.0.2.conv", CHANNELS, CHANNELS, 4)
    layer(f"{unet}.up_blocks.1.2", CHANNELS, CHANNELS, 3)
    layer(f"{unet}.final_block.block.0", CHANNELS, CHANNELS, 3)
    layer(f"{unet}.final_block.block.1", CHANNELS)
    layer(f"{unet}.final_proj", MELS, CHANNELS, 1)
    return found


@pytest.fixture(scope="module")
def weights() -> Weights:
    """Random, of a size that keeps what passes through them at about its own."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, shape in shapes().items():
        scale = 0.5 if len(shape) == 1 else (2 / math.prod(shape[1:])) ** 0.5
        is_norm = len(shape) == 1 and name.endswith("weight")
        made[name] = scale * torch.randn(shape, generator=generator) + is_norm
    return made


def linear(x: Tensor, w: Weights, name: str) -> Tensor:
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def normed(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    centred = x - x.mean(dims, keepdim=True)
    return centred / (centred.square().mean(dims, keepdim=True) + 1e-5).sqrt()


def layer_norm(x_TD: Tensor, w: Weights, name: str) -> Tensor:
    return normed(x_TD, (1,)) * w[f"{name}.weight"] + w[f"{name}.bias"]


def group_norm(x_CF: Tensor, w: Weights, name: str, groups: int) -> Tensor:
    y_CF = normed(x_CF.view(groups, -1, x_CF.shape[1]), (1, 2)).view_as(x_CF)
    return y_CF * w[f"{name}.weight"][:, None] + w[f"{name}.bias"][:, None]


def conv(x_CF: Tensor, w: Weights, name: str, stride: int = 1) -> Tensor:
    weight = w[f"{name}.weight"]
    return F.conv1d(x_CF[None], weight, w[f"{name}.bias"], stride, padding=weight.shape[2] // 2)[0]


def relative_attention(x_TD: Tensor, w: Weights, name: str) -> Tensor:
    """Transformer-XL's scores, pair by pair: (q + u) k + (q + v) r, r the sines of how far the key lies back."""
    q, k, v = (linear(x_TD, w, f"{name}.linear_{part}").view(-1, HEADS, WIDTH // HEADS) for part in ("q", "k", "v"))
    T = len(x_TD)
    score_HTT = torch.full((HEADS, T, T), -1e9)
    for i in range(T):
        for j in range(T):
            if j <= i or j // BLOCK == i // BLOCK:
                angle_C = (i - j) * 10_000.0 ** -(torch.arange(0, WIDTH, 2) / WIDTH)
                sines_D = torch.stack([angle_C.sin(), angle_C.cos()], 1).flatten()
                r_HK = linear(sines_D[None], w, f"{name}.linear_pos").view(HEADS, -1)
                content = ((q[i] + w[f"{name}.pos_bias_u"]) * k[j]).sum(1)
                distance = ((q[i] + w[f"{name}.pos_bias_v"]) * r_HK).sum(1)
                score_HTT[:, i, j] = (content + distance) * (WIDTH // HEADS) ** -0.5
    y_THK = torch.einsum("hts,shk->thk", score_HTT.softmax(-1), v)
    return linear(y_THK.flatten(1), w, f"{name}.linear_out")


def token_states(ids_T: Tensor, w: Weights) -> Tensor:
    x_TD = linear(w["input_embedding.weight"][ids_T], w, "encoder.embed.out.0")
    x_TD = layer_norm(x_TD, w, "encoder.embed.out.1") * WIDTH**0.5
    for i in range(2):
        own = f"encoder.encoders.{i}"
        x_TD = x_TD + relative_attention(layer_norm(x_TD, w, f"{own}.norm_mha"), w, f"{own}.self_attn")
        hidden = linear(layer_norm(x_TD, w, f"{own}.norm_ff"), w, f"{own}.feed_forward.w_1")
        x_TD = x_TD + linear(hidden * hidden.sigmoid(), w, f"{own}.feed_forward.w_2")
    return linear(layer_norm(x_TD, w, "encoder.after_norm"), w, "encoder_proj")


def regulated(states_TM: Tensor, num_frames: int, w: Weights) -> Tensor:
    x_MF = states_TM[[int(frame * 256 / 22050 * 12.5 + 1e-9) for frame in range(num_frames)]].T
    for i in range(4):
        x_MF = conv(x_MF, w, f"length_regulator.model.{3 * i}")
        x_MF = F.mish(group_norm(x_MF, w, f"length_regulator.model.{3 * i + 1}", 1))
    return conv(x_MF, w, "length_regulator.model.12")


def level(x_CF: Tensor, time_E: Tensor, w: Weights, name: str) -> Tensor:
    def block1d(x: Tensor, part: str) -> Tensor:
        return F.mish(group_norm(conv(x, w, f"{name}.0.{part}.block.0"), w, f"{name}.0.{part}.block.1", 8))

    y_CF = block1d(x_CF, "block1") + linear(F.mish(time_E), w, f"{name}.0.mlp.1")[:, None]
    x_FC = (block1d(y_CF, "block2") + conv(x_CF, w, f"{name}.0.res_conv")).T
    own = f"{name}.1.0"
    norm_FC = layer_norm(x_FC, w, f"{own}.norm1")
    q, k, v = (linear(norm_FC, w, f"{own}.attn1.to_{part}").view(-1, UNET_HEADS, 8) for part in ("q", "k", "v"))
    share_HFF = (torch.einsum("fhk,ghk->hfg", q, k) * 8**-0.5).softmax(-1)
    x_FC = x_FC + linear(torch.einsum("hfg,ghk->fhk", share_HFF, v).flatten(1), w, f"{own}.attn1.to_out.0")
    hidden = F.gelu(linear(layer_norm(x_FC, w, f"{own}.norm3"), w, f"{own}.ff.net.0.proj"))
    return (x_FC + linear(hidden, w, f"{own}.ff.net.2")).T


def velocity(x_CF: Tensor, time: float, w: Weights) -> Tensor:
    unet = "decoder.estimator"
    angle_C = 1000 * time * 10_000.0 ** -(torch.arange(2 * MELS) / (2 * MELS - 1))
    hidden = linear(torch.cat([angle_C.sin(), angle_C.cos()]), w, f"{unet}.time_mlp.linear_1")
    time_E = linear(hidden * hidden.sigmoid(), w, f"{unet}.time_mlp.linear_2")
    first_CF = level(x_CF, time_E, w, f"{unet}.down_blocks.0")
    second_CF = level(conv(first_CF, w, f"{unet}.down_blocks.0.2.conv", stride=2), time_E, w, f"{unet}.down_blocks.1")
    x_CF = conv(second_CF, w, f"{unet}.down_blocks.1.2")
    for i in range(2):
        x_CF = level(x_CF, time_E, w, f"{unet}.mid_blocks.{i}")
    x_CF = level(torch.cat([x_CF, second_CF]), time_E, w, f"{unet}.up_blocks.0")
    grown = f"{unet}.up_blocks.0.2.conv"
    x_CF = F.conv_transpose1d(x_CF[None], w[f"{grown}.weight"], w[f"{grown}.bias"], stride=2, padding=1)[0]
    x_CF = torch.cat([x_CF[:, : first_CF.shape[1]], first_CF])
    x_CF = conv(level(x_CF, time_E, w, f"{unet}.up_blocks.1"), w, f"{unet}.up_blocks.1.2")
    x_CF = F.mish(group_norm(conv(x_CF, w, f"{unet}.final_block.block.0"), w, f"{unet}.final_block.block.1", 8))
    return conv(x_CF, w, f"{unet}.final_proj")


def reference(ids_T: Tensor, prompt_MF: Tensor, speaker_E: Tensor, noise_MF: Tensor, w: Weights) -> Tensor:
    """Three Euler steps with guidance 0.7 (spec 1, 3.1)."""
    num_frames = noise_MF.shape[1]
    speaker_M = linear(speaker_E / speaker_E.square().sum().sqrt(), w, "spk_embed_affine_layer")
    prompt_MF = F.pad(prompt_MF, (0, num_frames - prompt_MF.shape[1]))
    states_MF = regulated(token_states(ids_T, w), num_frames, w)
    given_CF = torch.cat([states_MF, speaker_M[:, None].expand(-1, num_frames), prompt_MF])
    x_MF = noise_MF
    times = [1 - torch.cos(torch.tensor(n / 3 * torch.pi / 2)).item() for n in range(4)]
    for now, then in pairwise(times):
        with_MF = velocity(torch.cat([x_MF, given_CF]), now, w)
        without_MF = velocity(torch.cat([x_MF, 0 * given_CF]), now, w)
        x_MF = x_MF + (then - now) * (1.7 * with_MF - 0.7 * without_MF)
    return x_MF


@pytest.mark.parametrize(("num_tokens", "num_known"), [(1, 0), (10, 0), (13, 20), (24, 137)])
def test_the_mel_is_the_references(
    tmp_path: Path, weights: Weights, num_tokens: int, num_known: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(weights, tmp_path / "flow.pt")
    model = read_released(tmp_path / "flow.pt", CONFIG)
    generator = torch.Generator().manual_seed(1)
    ids_T = torch.randint(0, 30, (num_tokens,), generator=generator)
    num_frames = num_tokens * 441 // 64
    prompt_MF, speaker_E = torch.randn(MELS, num_known, generator=generator), torch.randn(6, generator=generator)
    noise_MF = torch.randn(MELS, num_frames, generator=generator)
    monkeypatch.setattr(flow_module, "frame_noise", lambda seed, first, stop, num_mels: noise_MF[:, first:stop])
    mel_MF = model.generate([Window(ids_T, 0, prompt_MF, 0, speaker_E)])[0]
    expected_MF = reference(ids_T, prompt_MF, speaker_E, noise_MF, weights)
    assert expected_MF.std() > 0.3
    torch.testing.assert_close(mel_MF, expected_MF, rtol=1e-4, atol=1e-4)
    with torch.no_grad():  # small mistakes in attention hardly show in the mel
        states_BTM = model.tokens(ids_T[None], torch.tensor([num_tokens]))
    torch.testing.assert_close(states_BTM[0], token_states(ids_T, weights), rtol=1e-5, atol=1e-5)


def test_the_released_sizes_are_the_defaults() -> None:
    with torch.device("meta"):
        model = FlowConfig().build()
    assert sum(p.numel() for p in model.parameters()) == 111_166_208  # spec 1, 3.1: 111.17 M
    assert model.unet.channels_in == 320


def test_it_is_converted_once(tmp_path: Path, weights: Weights) -> None:
    torch.save(weights, tmp_path / "flow.pt")
    model = convert(tmp_path / "flow.pt", tmp_path / "ours", CONFIG)
    again = flow_folder.load(tmp_path / "ours")
    assert again.config == CONFIG
    ids_T = torch.arange(12)
    assert torch.equal(model.decode([ids_T], [0])[0], again.decode([ids_T], [0])[0])
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == ["config.json", "model.safetensors"]


class Runs:
    """What a pickle could do: call anything."""

    def __reduce__(self) -> tuple:
        return (print, ("this ran",))


def test_other_files_are_refused(tmp_path: Path, weights: Weights, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "flow.pt"
    with pytest.raises(
        FileNotFoundError, match=r"flow\.pt is missing; give flow\.pt of the folder glm-4-voice-decoder"
    ):
        read_released(path, CONFIG)
    torch.save({"weights": Runs()}, path)
    with pytest.raises(ValueError, match="holds more than tensors, which could run code and is not read"):
        read_released(path, CONFIG)
    assert "this ran" not in capsys.readouterr().out
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="not a plain table of tensors"):
        read_released(path, CONFIG)
    torch.save({name: x for name, x in weights.items() if name != "encoder_proj.bias"}, path)
    with pytest.raises(ValueError, match=r"tokens\.to_mel\.bias missing or unknown"):
        read_released(path, CONFIG)
    torch.save(weights | {"decoder.estimator.something_new.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"unet\.something_new\.weight missing or unknown"):
        read_released(path, CONFIG)
    torch.save(weights, path)
    with pytest.raises(
        ValueError, match=r"tokens\.embedding\.weight has shape \(30, 12\), its config expects \(31, 12\)"
    ):
        read_released(path, replace(CONFIG, codebook_size=31))
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(ValueError, match="damaged"):
        read_released(path, CONFIG)
