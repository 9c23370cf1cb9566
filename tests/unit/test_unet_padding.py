"""The estimator and its convolutions: a row in a batch is what it is alone, at every length."""

import pytest
import torch
from torch import nn

from speechquilt.decoder.conv_blocks import ConvBlock, MaskedGroupNorm
from speechquilt.decoder.unet import UNet, UNetConfig, time_embedding
from speechquilt.nn.batching import valid_places

LENGTHS = [1, 2, 5, 8, 13]


def padded(lengths: list[int], channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows with garbage in the padding, and 1 where they are real."""
    x_BCF = torch.randn(len(lengths), channels, max(lengths), generator=torch.Generator().manual_seed(0)) + 1.0
    return x_BCF, valid_places(torch.tensor(lengths), max(lengths))[:, None].float()


def test_a_masked_group_norm_is_the_norm_of_each_row_alone() -> None:
    x_BCF, valid_B1F = padded(LENGTHS, 8)
    norm = MaskedGroupNorm(2, 8)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    y_BCF = norm(x_BCF, valid_B1F)
    for b, length in enumerate(LENGTHS):
        alone_BCF = torch.group_norm(x_BCF[b : b + 1, :, :length], 2, norm.weight, norm.bias)
        torch.testing.assert_close(y_BCF[b : b + 1, :, :length], alone_BCF, rtol=1e-5, atol=1e-5)


def test_a_conv_block_neither_reads_nor_writes_padding() -> None:
    x_BCF, valid_B1F = padded(LENGTHS, 4)
    block = ConvBlock(4, 8, groups=2)
    y_BCF = block(x_BCF, valid_B1F)
    assert (y_BCF * (1 - valid_B1F)).abs().max() == 0
    for b, length in enumerate(LENGTHS):
        torch.testing.assert_close(
            y_BCF[b : b + 1, :, :length], block(x_BCF[b : b + 1, :, :length], None), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("channels", [(16,), (32, 16), (16, 32, 16)])
def test_a_row_of_the_estimator_is_the_row_alone(channels: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    unet = UNet(UNetConfig(channels=channels, blocks=1, mid_levels=2, num_heads=2, head_width=4), 12, 3)
    nn.init.normal_(unet.out.weight)
    x_BCF, valid_B1F = padded(LENGTHS, 12)
    time_B = torch.linspace(0, 0.9, len(LENGTHS))
    with torch.no_grad():
        y_BMF = unet(x_BCF, time_B, valid_B1F)
        for b, length in enumerate(LENGTHS):
            alone_BMF = unet(x_BCF[b : b + 1, :, :length], time_B[b : b + 1], None)
            assert alone_BMF.shape == (1, 3, length)
            assert alone_BMF.abs().max() > 0.1
            torch.testing.assert_close(y_BMF[b : b + 1, :, :length], alone_BMF, rtol=1e-4, atol=1e-5)
    assert (y_BMF * (1 - valid_B1F)).abs().max() == 0


def test_the_estimator_hears_time_and_every_frame() -> None:
    torch.manual_seed(1)
    unet = UNet(UNetConfig(channels=(8, 8), blocks=1, mid_levels=1, num_heads=1, head_width=8), 8, 2)
    nn.init.normal_(unet.out.weight)
    x_BCF = torch.randn(1, 8, 40, requires_grad=True)
    unet(x_BCF, torch.tensor([0.5]), None)[0, :, 0].sum().backward()
    assert x_BCF.grad is not None
    assert bool((x_BCF.grad.abs().sum((0, 1)) > 0).all())
    with torch.no_grad():
        early, late = (unet(x_BCF, torch.tensor([time]), None) for time in (0.1, 0.11))
    assert (early - late).abs().max() > 1e-3


def test_a_new_estimator_says_zero_and_keeps_its_scale_inside() -> None:
    """64 transformer blocks: what reaches the last layer is of the size of what came in, and gradients reach the first."""
    torch.manual_seed(0)
    unet = UNet(UNetConfig(channels=(32, 32), blocks=4, mid_levels=12, num_heads=2, head_width=16), 16, 4)
    seen: list[torch.Tensor] = []
    unet.final.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    assert unet(torch.randn(2, 16, 24), torch.rand(2), None).abs().max() == 0
    assert 0.5 < seen[0].std() < 4
    seen[0].square().mean().backward()
    gradients = [block.query.weight.grad for level in unet.mid for block in level.blocks]
    norms = torch.stack([g.norm() for g in gradients if g is not None])
    assert len(norms) == 48
    assert norms.max() < 100 * norms.min()


def test_the_time_is_spread_over_sines_and_cosines() -> None:
    embedded_BC = time_embedding(torch.tensor([0.0, 0.25]), 6)
    angles_C = 250 * 10_000.0 ** -(torch.arange(3) / 2)
    torch.testing.assert_close(embedded_BC[0], torch.tensor([0.0, 0, 0, 1, 1, 1]))
    torch.testing.assert_close(embedded_BC[1], torch.cat([angles_C.sin(), angles_C.cos()]), rtol=1e-4, atol=1e-4)


def test_channels_must_fit_the_norms() -> None:
    for channels in ((), (12,), (8, 0)):
        with pytest.raises(ValueError, match="multiples of 8"):
            UNetConfig(channels=channels)
