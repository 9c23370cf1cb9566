"""The vocoder's objective: each loss reaches its own half, one backward pass gives both gradients, sums add up.

Planted and caught: made sound that is not detached before it is judged; discriminators that are not frozen while the
vocoder learns; the recorded rows taken for made ones; a mel in bfloat16.
"""

import pytest
import torch
from torch import nn

from speechquilt.train.objectives.vocoder_gan import GanConfig, VocoderGAN, vocoder_objective
from speechquilt.types import WaveBatch
from tests.unit.tiny_vocoder import JUDGES, MEL, RECIPE, tone


def batch(rows: int = 4, number: int = 0) -> WaveBatch:
    waves = [torch.from_numpy(tone(i, 0.3).samples_S[:1024]) for i in range(rows)]
    return WaveBatch(wav_BS=torch.stack(waves), number=number)


def part(whole: WaveBatch, rows: slice) -> WaveBatch:
    return WaveBatch(wav_BS=whole.wav_BS[rows], number=whole.number)


def model() -> VocoderGAN:
    """Scores far from 0, as discriminators that have learnt something give: near 0 all hinges are straight."""
    built = RECIPE.build()
    assert built.discriminators is not None
    torch.manual_seed(5)
    with torch.no_grad():
        for p in built.discriminators.parameters():
            p += 0.3 * torch.randn(p.shape) * (1 if p.ndim == 1 else 0.3)
    return built


def with_gradient(module: nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters() if p.grad is not None and bool(p.grad.any())}


def test_each_loss_reaches_its_own_half() -> None:
    built, wav_BS = model(), batch().wav_BS
    losses = built.gan_losses(built(wav_BS), wav_BS)
    losses.judging.backward(retain_graph=True)
    assert with_gradient(built) == {f"discriminators.{name}" for name, _ in built.discriminators.named_parameters()}  # type: ignore[union-attr]
    for loss in (losses.fooling, losses.matching):
        built.zero_grad()
        loss.backward(retain_graph=True)
        assert with_gradient(built)
        assert all(name.startswith("generator.") for name in with_gradient(built))
    assert not losses.told_apart.requires_grad


def test_one_backward_pass_is_the_two_of_a_run_that_takes_turns() -> None:
    built, heard = model(), batch()
    loss, _, _ = vocoder_objective(built, heard)
    loss.backward()
    ours = {name: p.grad for name, p in built.named_parameters()}
    gan, wav_BS = built.gan, heard.wav_BS
    assert gan is not None
    assert built.discriminators is not None
    shares = [0.5, 0.5, 0.05, 0.05]  # two by period, two by window at 0.1

    made_BS = built(wav_BS)
    real, made = built.discriminators(wav_BS), built.discriminators(made_BS)
    fooling = sum(w * (1 - j.score_BN).clamp(min=0).mean(1).sum() for w, j in zip(shares, made))
    matching = sum(
        w * len(wav_BS) * sum((a - b.detach()).abs().mean() for a, b in zip(j.features, r.features))
        for w, j, r in zip(shares, made, real)
    )
    of_vocoder = built.mel_distance(made_BS, wav_BS).sum() + gan.weight * (fooling + matching)
    weights = dict(built.generator.named_parameters())
    for name, grad in zip(weights, torch.autograd.grad(of_vocoder, list(weights.values()))):
        assert torch.allclose(ours[f"generator.{name}"], grad, rtol=1e-4, atol=1e-6), name  # type: ignore[arg-type]

    with torch.no_grad():
        made_BS = built(wav_BS)
    made = built.discriminators(made_BS)
    judging = sum(
        w * ((1 - r.score_BN).clamp(min=0) + (1 + j.score_BN).clamp(min=0)).mean(1).sum()
        for w, j, r in zip(shares, made, built.discriminators(wav_BS))
    )
    weights = dict(built.discriminators.named_parameters())
    grads = torch.autograd.grad(gan.discriminator_weight * judging, list(weights.values()))
    for name, grad in zip(weights, grads):
        assert torch.allclose(ours[f"discriminators.{name}"], grad, rtol=1e-4, atol=1e-6), name  # type: ignore[arg-type]


def test_sums_of_parts_are_the_sums_of_the_whole() -> None:
    built, whole = model(), batch(5)
    loss, rows, scalars = vocoder_objective(built, whole)
    parts = [vocoder_objective(built, part(whole, rows)) for rows in (slice(0, 2), slice(2, 5))]
    assert rows == 5 == sum(p[1] for p in parts)
    assert loss.item() == pytest.approx(sum(p[0].item() for p in parts), rel=1e-5)
    assert set(scalars) >= {"mel", "fooling", "matching", "judging", "told_apart", "total_samples"}
    for key in scalars:
        assert scalars[key].item() == pytest.approx(sum(p[2][key].item() for p in parts), rel=1e-4), key


def test_sound_that_is_as_recorded_cannot_be_told_apart() -> None:
    """Whatever discriminators say of it, they say it of both: right once and wrong once."""
    built, wav_BS = RECIPE.build(), batch().wav_BS
    losses = built.gan_losses(wav_BS.clone(), wav_BS)
    assert losses.matching == losses.told_apart == 0
    assert losses.judging.item() == pytest.approx(2 * 1.1 * len(wav_BS), rel=1e-4)  # new ones score within -1..1
    assert built.mel_distance(wav_BS, wav_BS).tolist() == [0.0] * len(wav_BS)


def test_discriminators_wait_for_their_batch() -> None:
    built = model()
    for number, waits in ((2, True), (3, False)):
        built.zero_grad()
        loss, _, scalars = vocoder_objective(built, batch(number=number), batches_before_gan=3)
        loss.backward()
        assert any(name.startswith("discriminators.") for name in with_gradient(built)) is not waits
        assert ("fooling" in scalars) is not waits
        assert (loss.item() == scalars["mel"].item()) is waits


def test_without_a_gan_there_are_no_discriminators() -> None:
    built = VocoderGAN(RECIPE.vocoder, RECIPE.loss_mels, None)
    assert all(name.startswith("generator.") for name, _ in built.named_parameters())
    loss, _, scalars = vocoder_objective(built, batch())
    assert set(scalars) == {"mel", "total_samples"}
    loss.backward()
    assert with_gradient(built) == {name for name, _ in built.named_parameters()}


def test_spectra_stay_float32_in_bfloat16() -> None:
    built, heard = model(), batch()
    exact, _, _ = vocoder_objective(built, heard)
    made_BS = built(heard.wav_BS).detach()
    distance_B = built.mel_distance(made_BS, heard.wav_BS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough, _, _ = vocoder_objective(built, heard)
        assert built(heard.wav_BS).dtype == torch.float32
        assert torch.equal(built.mel_distance(made_BS, heard.wav_BS), distance_B)
    rough.backward()
    assert rough.item() == pytest.approx(exact.item(), rel=0.02)
    assert all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in built.parameters())


def test_both_halves_learn() -> None:
    """In turns: discriminators tell recorded from made sound, then the vocoder comes nearer to it."""
    built, heard = RECIPE.build(), batch()
    assert built.discriminators is not None
    told, distance = [], []
    for half, into, rate in ((built.discriminators, told, 1e-2), (built.generator, distance, 3e-3)):
        optimizer = torch.optim.AdamW(half.parameters(), lr=rate)
        for _ in range(40):
            loss, rows, scalars = vocoder_objective(built, heard)
            built.zero_grad()
            (loss / rows).backward()
            optimizer.step()
            into.append(float(scalars["told_apart" if into is told else "mel"] / rows))
    assert abs(told[0]) < 0.1
    assert told[-1] > 0.5
    assert distance[-1] < 0.7 * distance[0]


@pytest.mark.parametrize(
    "wrong", [{"after": -1}, {"weight": 0.0}, {"window_weight": 0.0}, {"discriminator_weight": -1.0}]
)
def test_what_is_none_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GanConfig(discriminators=JUDGES, **wrong)  # type: ignore[arg-type]


def test_the_generator_hears_its_own_mel() -> None:
    built, heard = model(), batch()
    mel_BMF = MEL.build()(heard.wav_BS)
    num_frames_B = torch.full((4,), mel_BMF.shape[2])
    assert torch.allclose(built(heard.wav_BS), built.generator(mel_BMF, num_frames_B), atol=1e-6)
