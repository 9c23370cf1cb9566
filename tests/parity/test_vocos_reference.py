"""Vocos with all its frames ahead is the published network: a reference written from the paper's facts, frame by frame.

One-off (not in the repository, which has no gemelo-ai code): `VocosBackbone(20, 16, 32, 2)` and `ISTFTHead(16, 128, 32,
padding="same")` of gemelo-ai/vocos, weights drawn at random and copied by name without `backbone.` and `head.`, give the
same samples to 1e-6 of the loudest. Its import of torchaudio is stubbed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from speechquilt.decoder.mel import MelConfig
from speechquilt.decoder.vocos import VocosConfig

MEL = MelConfig(sample_rate=8000, num_mels=20, fft_samples=128, hop=32, high_hz=4000.0)


def centred(x_FD: Tensor, w: dict[str, Tensor], name: str, groups: int) -> Tensor:
    return F.conv1d(x_FD.T[None], w[f"{name}.weight"], w[f"{name}.bias"], padding=3, groups=groups)[0].T


def normed(x_FD: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    centred_FD = x_FD - x_FD.mean(1, keepdim=True)
    std_F1 = (centred_FD.square().mean(1, keepdim=True) + 1e-6).sqrt()
    return centred_FD / std_F1 * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(x_FD: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    return x_FD @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def reference(w: dict[str, Tensor], mel_MF: Tensor, num_layers: int) -> Tensor:
    x_FD = normed(centred(mel_MF.T, w, "embed", 1), w, "norm")
    for i in range(num_layers):
        y_FD = normed(centred(x_FD, w, f"convnext.{i}.dwconv", x_FD.shape[1]), w, f"convnext.{i}.norm")
        y_FD = linear(F.gelu(linear(y_FD, w, f"convnext.{i}.pwconv1")), w, f"convnext.{i}.pwconv2")
        x_FD = x_FD + w[f"convnext.{i}.gamma"] * y_FD
    head_FH = linear(normed(x_FD, w, "final_layer_norm"), w, "out")
    num_frames, half, window_N = len(head_FH), MEL.fft_samples // 2 + 1, torch.hann_window(MEL.fft_samples)
    sum_S = torch.zeros((num_frames - 1) * MEL.hop + MEL.fft_samples)
    weight_S = torch.zeros_like(sum_S)
    for f in range(num_frames):
        magnitude_H, phase_H = head_FH[f, :half].exp().clamp(max=100.0), head_FH[f, half:]
        spectrum_H = torch.complex(magnitude_H * phase_H.cos(), magnitude_H * phase_H.sin())
        place = slice(f * MEL.hop, f * MEL.hop + MEL.fft_samples)
        sum_S[place] += torch.fft.irfft(spectrum_H) * window_N
        weight_S[place] += window_N.square()
    edge = (MEL.fft_samples - MEL.hop) // 2
    return (sum_S / weight_S)[edge:-edge]


def test_it_is_the_published_network() -> None:
    torch.manual_seed(0)
    vocoder = VocosConfig(mel=MEL, width=16, ffn_width=32, num_layers=2, frames_ahead=9).build().eval()
    with torch.no_grad():
        for weight in vocoder.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
        vocoder.out.bias[: MEL.fft_samples // 2 + 1].add_(4.0)  # some magnitudes reach the limit
        mel_MF = torch.randn(20, 25) - 3.0
        ours_S = vocoder(mel_MF[None], torch.tensor([25]))[0]
        theirs_S = reference(vocoder.state_dict(), mel_MF, 2)
    assert ours_S.shape == theirs_S.shape
    assert (ours_S - theirs_S).abs().max() <= 1e-5 * theirs_S.abs().max()


def test_it_learns() -> None:
    """The gradient arrives everywhere."""
    vocoder = VocosConfig(mel=MEL, width=16, ffn_width=32, num_layers=2).build()
    wav_BS = vocoder(torch.randn(2, 20, 12), torch.tensor([12, 7]))
    wav_BS.square().sum().backward()
    for name, weight in vocoder.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name
        assert weight.grad.abs().sum() > 0, name
