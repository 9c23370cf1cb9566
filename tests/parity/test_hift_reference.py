"""HiFT is the released vocoder: a reference written from the spec's facts, whole utterance at once, and `hift.pt`'s names.

One-off (not in the repository): `HiFTGenerator` and `ConvRNNF0Predictor` of FunAudioLLM/CosyVoice in these sizes, their
state dict through `folded`, with `torch.randn_like` and the uniform draw of phases replaced by this vocoder's noise and
phases, give the same samples to 4e-6 of the loudest, all voiced or half of it. Their imports of `cosyvoice` are stubbed but
for `Snake`; `m_source.l_sin_gen` is set to their `SineGen`, which they take at 22,050 Hz alone.
"""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from speechquilt.decoder import vocoder_folder
from speechquilt.decoder.hift import Hift, HiftConfig
from speechquilt.decoder.mel import MelConfig
from speechquilt.decoder.released_hift import convert, read_released

MEL = MelConfig(sample_rate=8000, num_mels=20, fft_samples=128, hop=32, high_hz=4000.0)
CONFIG = HiftConfig(
    mel=MEL, width=16, pitch_width=8, num_harmonics=2, upsample_rates=(4, 4), upsample_kernels=(8, 8), short_points=8,
    short_hop=2, block_kernels=(3, 5), block_dilations=((1, 3), (1, 2)), source_kernels=(3, 5),
    source_dilations=((1, 2), (1, 3)),
)  # fmt: skip


@pytest.fixture(scope="module")
def vocoder() -> Hift:
    """With a pitch that is a voice in about half of the frames."""
    torch.manual_seed(3)
    made = CONFIG.build().eval()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "alpha" in name:
                weight.uniform_(0.3, 2.0)
        made.f0_predictor.classifier.weight.mul_(200.0)
        made.f0_predictor.classifier.bias.zero_()
    return made


def conv(x_DL: Tensor, w: dict[str, Tensor], name: str, padding: int, dilation: int = 1, stride: int = 1) -> Tensor:
    return F.conv1d(x_DL[None], w[f"{name}.weight"], w[f"{name}.bias"], stride, padding, dilation)[0]


def snake(x_DL: Tensor, alpha_D: Tensor) -> Tensor:
    return x_DL + torch.sin(alpha_D[:, None] * x_DL) ** 2 / alpha_D[:, None]


def block(x_DL: Tensor, w: dict[str, Tensor], name: str, kernel: int, dilations: tuple[int, ...]) -> Tensor:
    for i, dilation in enumerate(dilations):
        y_DL = snake(x_DL, w[f"{name}.activations1.{i}.alpha"])
        y_DL = conv(y_DL, w, f"{name}.convs1.{i}", dilation * (kernel - 1) // 2, dilation)
        y_DL = snake(y_DL, w[f"{name}.activations2.{i}.alpha"])
        x_DL = x_DL + conv(y_DL, w, f"{name}.convs2.{i}", (kernel - 1) // 2)
    return x_DL


def pitch(w: dict[str, Tensor], mel_MF: Tensor) -> Tensor:
    x_DF = mel_MF
    for i in range(5):
        x_DF = F.elu(conv(x_DF, w, f"f0_predictor.condnet.{2 * i}", 1))
    return (w["f0_predictor.classifier.weight"] @ x_DF + w["f0_predictor.classifier.bias"][:, None])[0].abs()


def source(w: dict[str, Tensor], hz_F: Tensor, vocoder: Hift) -> Tensor:
    hz_S = hz_F.double().repeat_interleave(MEL.hop)
    turns_S = (hz_S / MEL.sample_rate).cumsum(0)
    noise_HS = torch.cat([vocoder._noise(f) for f in range(len(hz_F))], 1)
    merged_S = w["m_source.l_linear.bias"].expand(len(hz_S)).clone()
    for h in range(3):
        sine_S = 0.1 * torch.sin(2 * math.pi * (h + 1) * turns_S + vocoder.phase_H[h]).float()
        voiced_S = torch.where(hz_S > 10, sine_S + 0.003 * noise_HS[h], 0.1 / 3 * noise_HS[h])
        merged_S = merged_S + w["m_source.l_linear.weight"][0, h] * voiced_S
    return merged_S.tanh()


def reference(vocoder: Hift, mel_MF: Tensor) -> Tensor:
    w, window_N = vocoder.state_dict(), torch.hann_window(8)
    source_KL = torch.stft(source(w, pitch(w, mel_MF), vocoder), 8, 2, window=window_N, return_complex=True)
    source_CL = torch.cat([source_KL.real, source_KL.imag])
    x_DL = conv(mel_MF, w, "conv_pre", 3)
    for i in range(2):
        x_DL = F.leaky_relu(x_DL, 0.1)[None]
        x_DL = F.conv_transpose1d(x_DL, w[f"ups.{i}.weight"], w[f"ups.{i}.bias"], stride=4, padding=2)[0]
        if i == 1:
            x_DL = torch.cat([x_DL[:, 1:2], x_DL], 1)
        down_DL = conv(source_CL, w, f"source_downs.{i}", *((2, 1, 4) if i == 0 else (0,)))
        x_DL = x_DL + block(down_DL, w, f"source_resblocks.{i}", (3, 5)[i], ((1, 2), (1, 3))[i])
        first_DL = block(x_DL, w, f"resblocks.{2 * i}", 3, (1, 3))
        x_DL = (first_DL + block(x_DL, w, f"resblocks.{2 * i + 1}", 5, (1, 2))) / 2
    x_DL = conv(F.leaky_relu(x_DL, 0.01), w, "conv_post", 3)
    magnitude_KL, phase_KL = x_DL[:5].exp().clamp(max=100), x_DL[5:].sin()
    spectrum_KL = torch.complex(magnitude_KL * phase_KL.cos(), magnitude_KL * phase_KL.sin())
    return torch.istft(spectrum_KL, 8, 2, window=window_N).clamp(-0.99, 0.99)


@torch.no_grad()
def sound(vocoder: Hift, mel_MF: Tensor) -> Tensor:
    return vocoder(mel_MF[None], torch.tensor([mel_MF.shape[1]]))[0]


def test_the_sound_is_the_references(vocoder: Hift) -> None:
    mel_MF = torch.randn(20, 40, generator=torch.Generator().manual_seed(4)).cumsum(1) / 3 - 2
    with torch.no_grad():
        hz_F, theirs_S = pitch(vocoder.state_dict(), mel_MF), reference(vocoder, mel_MF)
    assert 5 < int((hz_F > 10).sum()) < 35, "voice and none must both occur"
    ours_S = sound(vocoder, mel_MF)
    assert ours_S.shape == theirs_S.shape == (40 * 32,)
    assert (ours_S - theirs_S).abs().max() <= 1e-4 * theirs_S.abs().max()


@pytest.mark.parametrize(
    "pair", [("weight_g", "weight_v"), tuple(f"parametrizations.weight.original{i}" for i in (0, 1))]
)
def test_released_weights_are_read(vocoder: Hift, pair: tuple[str, str], tmp_path: Path) -> None:
    """As the checkpoints hold them: length and direction of each weight, but of the layers without weight norm."""
    theirs: dict[str, Tensor] = {"stft_window": torch.hann_window(8)} if pair[0] == "weight_g" else {}
    for name, tensor in vocoder.state_dict().items():
        plain = name.startswith(("m_source", "source_downs", "f0_predictor.classifier")) or not name.endswith(".weight")
        if plain:
            theirs[name] = tensor
            continue
        layer = name.removesuffix(".weight")
        theirs[f"{layer}.{pair[0]}"] = tensor.flatten(1).norm(dim=1)[:, None, None]
        theirs[f"{layer}.{pair[1]}"] = tensor * torch.rand(len(tensor), 1, 1).add(0.5)
    torch.save(theirs, tmp_path / "hift.pt")
    mel_MF = torch.randn(20, 9) - 2
    assert (sound(read_released(tmp_path / "hift.pt", CONFIG), mel_MF) - sound(vocoder, mel_MF)).abs().max() < 1e-4
    made = convert(tmp_path / "hift.pt", tmp_path / "ours", CONFIG)
    assert torch.equal(sound(made, mel_MF), sound(vocoder_folder.load(tmp_path / "ours"), mel_MF))


def test_pickles_that_are_not_tensors_and_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "hift.pt"
    with pytest.raises(FileNotFoundError, match=r"give hift\.pt"):
        read_released(path, CONFIG)
    torch.save({"a": CONFIG}, path)
    with pytest.raises(ValueError, match="could run code"):
        read_released(path, CONFIG)
    torch.save([torch.zeros(1)], path)
    with pytest.raises(ValueError, match="not a plain table of tensors"):
        read_released(path, CONFIG)
    torch.save({"conv_pre.bias": torch.zeros(16)}, path)
    with pytest.raises(ValueError, match="missing or unknown"):
        read_released(path, CONFIG)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged"):
        read_released(path, CONFIG)


def test_the_released_sizes_are_the_default() -> None:
    """Spec 1, 3.1: 512 channels, upsampling by 8 and 8, short windows of 16 samples every 4."""
    with torch.device("meta"):
        model = Hift(HiftConfig())
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes["conv_pre.weight"] == (512, 80, 7)
    assert shapes["ups.1.weight"] == (256, 128, 16)
    assert shapes["source_downs.0.weight"] == (256, 18, 16)
    assert shapes["source_downs.1.weight"] == (128, 18, 1)
    assert shapes["conv_post.weight"] == (18, 128, 7)
    assert shapes["m_source.l_linear.weight"] == (1, 9)
    assert len(model.resblocks) == 6
