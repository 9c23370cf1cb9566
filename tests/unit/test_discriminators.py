"""Discriminators: what each of them hears, and what a frozen one passes on.

Planted and caught: `frozen` that detaches the bias alone; columns made by `unflatten` the other way round.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechquilt.decoder.discriminators import Discriminators, DiscriminatorsConfig
from tests.unit.tiny_vocoder import JUDGES


def sound(seed: int = 0, num_samples: int = 600, rows: int = 2) -> torch.Tensor:
    return 0.3 * torch.randn(rows, num_samples, generator=torch.Generator().manual_seed(seed))


def built(**changes: Any) -> Discriminators:
    torch.manual_seed(1)
    return DiscriminatorsConfig(**{key: getattr(JUDGES, key) for key in JUDGES.__dataclass_fields__} | changes).build()


def test_frozen_ones_judge_alike_and_pass_the_gradient_on() -> None:
    judges = built()
    open_BS, frozen_BS = sound().requires_grad_(), sound().requires_grad_()
    both = judges(open_BS), judges(frozen_BS, frozen=True)
    for ours, theirs in zip(*both, strict=True):
        assert torch.equal(ours.score_BN, theirs.score_BN)
        assert all(torch.equal(a, b) for a, b in zip(ours.features, theirs.features, strict=True))
    sum(j.score_BN.sum() + sum(f.sum() for f in j.features) for j in both[1]).backward()  # type: ignore[union-attr]
    assert [name for name, p in judges.named_parameters() if p.grad is not None] == []
    sum(j.score_BN.sum() + sum(f.sum() for f in j.features) for j in both[0]).backward()  # type: ignore[union-attr]
    assert [name for name, p in judges.named_parameters() if p.grad is None] == []
    assert frozen_BS.grad is not None
    assert torch.allclose(open_BS.grad, frozen_BS.grad, rtol=1e-5, atol=1e-7)  # type: ignore[arg-type]


@settings(max_examples=20, deadline=None)
@given(period=st.integers(2, 7), place=st.integers(0, 599), num_samples=st.integers(600, 640))
def test_a_column_hears_its_own_samples_alone(period: int, place: int, num_samples: int) -> None:
    judges = built(periods=(period,), windows=())
    wav_BS = sound(num_samples=num_samples)
    other_BS = wav_BS.clone()
    other_BS[0, place] += 0.5
    (before,), (after,) = judges(wav_BS), judges(other_BS)
    changed_BNP = (before.score_BN != after.score_BN).unflatten(1, (-1, period))
    columns = set(changed_BNP[0].any(0).nonzero().flatten().tolist())
    mirrored = 2 * (num_samples - 1) - place  # padding at the end repeats the last samples backwards
    heard = {place % period} | ({mirrored % period} if num_samples <= mirrored < num_samples + period else set())
    assert columns == heard
    assert not changed_BNP[1].any()


def test_one_by_window_hears_a_place_and_not_the_whole() -> None:
    judges = built(periods=(), windows=(64,))
    wav_BS = sound(num_samples=4096)
    other_BS = wav_BS.clone()
    other_BS[0, 2048] += 1.0
    before_BF, after_BF = (judges(x)[0].score_BN.unflatten(1, (4096 // 16 + 1, -1)) for x in (wav_BS, other_BS))
    frames = (before_BF != after_BF).any(2)[0].nonzero().flatten()
    assert 128 - 10 <= int(frames.min()) <= 128 <= int(frames.max()) <= 128 + 10


def test_silence_is_judged_without_nan() -> None:
    judges = built()
    wav_BS = torch.zeros(1, 600, requires_grad=True)
    sum(j.score_BN.sum() for j in judges(wav_BS)).backward()  # type: ignore[union-attr]
    assert wav_BS.grad is not None
    assert torch.isfinite(wav_BS.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in judges.parameters() if p.grad is not None)


def test_the_default_has_the_size_of_hifi_gans() -> None:
    """41.1 million weights by period: the figure of its released multi-period discriminator."""
    with torch.device("meta"):
        judges = DiscriminatorsConfig().build()
    assert sum(p.numel() for p in judges.by_period.parameters()) == pytest.approx(41.1e6, rel=0.005)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"periods": (), "windows": ()}, "both empty"),
        ({"periods": (0,)}, "periods"),
        ({"period_channels": ()}, "period_channels"),
        ({"windows": (66,)}, "multiples of 4"),
        ({"window_channels": 0}, "window_channels"),
    ],
)
def test_what_is_none_is_refused(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        built(**wrong)
