"""Masks: bands of the asked number and width, drawn anew per row, seeded, only in training, resumed exactly."""

from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechquilt.data.feed.utterances import UtteranceLoader
from speechquilt.tokenizer.supervised import SupervisedTokenizerConfig
from speechquilt.train.metrics import TIMING, read_metrics
from speechquilt.train.objectives.asr import asr_objective
from speechquilt.train.spec_augment import HIDDEN, SpecAugmentConfig
from speechquilt.train.trainer import TrainConfig, Trainer
from tests.unit.test_asr_objective import CONFIG, tones
from tests.unit.test_speech_corpora import TEXT, CountingCorpus


def runs(hidden_L: torch.Tensor) -> list[int]:
    """Lengths of the runs of True."""
    values, counts = torch.unique_consecutive(hidden_L, return_counts=True)
    return counts[values].tolist()


@settings(max_examples=30, deadline=None)
@given(
    frames=st.integers(1, 60),
    bins=st.integers(1, 20),
    widths=st.tuples(st.integers(0, 30), st.integers(0, 10)),
    share=st.floats(0.1, 1.0),
    seed=st.integers(0, 99),
)
def test_one_mask_each_way_hides_one_band_of_bounded_width(
    frames: int, bins: int, widths: tuple[int, int], share: float, seed: int
) -> None:
    torch.manual_seed(seed)
    config = SpecAugmentConfig(time_masks=1, time_frames=widths[0], time_share=share, mel_masks=1, mel_bins=widths[1])
    mel_BMF = torch.rand(3, bins, frames) + 1  # never HIDDEN by itself
    masked_BMF = config.build()(mel_BMF)
    hidden_BMF = masked_BMF == HIDDEN
    assert torch.equal(masked_BMF[~hidden_BMF], mel_BMF[~hidden_BMF])
    for hidden_MF in hidden_BMF:
        frames_F, bins_M = hidden_MF.all(0), hidden_MF.all(1)
        if not frames_F.all() and not bins_M.all():
            assert torch.equal(hidden_MF, frames_F[None] | bins_M[:, None])  # bands reach from edge to edge
            for band, widest in ((frames_F, min(widths[0], int(share * frames))), (bins_M, min(widths[1], bins))):
                assert len(runs(band)) <= 1
                assert band.sum() <= widest


def test_rows_differ_and_every_place_is_reached() -> None:
    torch.manual_seed(0)
    augment = SpecAugmentConfig(time_masks=2, time_frames=4, mel_masks=1, mel_bins=3).build()
    hidden_BMF = augment(torch.ones(2000, 8, 12)) == HIDDEN
    assert len(hidden_BMF.flatten(1).unique(dim=0)) > 500
    often_F, often_M = hidden_BMF.all(1).float().mean(0), hidden_BMF.all(2).float().mean(0)
    for often in (often_F, often_M):
        assert often.min() > 0.05  # the first and the last too
    assert max(len(runs(row.all(0))) for row in hidden_BMF) == 2


def test_places_move_from_call_to_call() -> None:
    """A width of one leaves the place as the only difference between two calls."""
    torch.manual_seed(0)
    augment = SpecAugmentConfig(time_masks=1, time_frames=1, mel_masks=0).build()
    mel_BMF = torch.ones(1, 4, 50)
    places = {
        int(hidden_F.nonzero()) for hidden_F in (augment(mel_BMF)[0, 0] == HIDDEN for _ in range(40)) if hidden_F.any()
    }
    assert len(places) > 5


def test_same_seed_same_masks_and_the_generator_moves_on() -> None:
    augment = SpecAugmentConfig().build()
    mel_BMF = torch.ones(2, 80, 300)
    torch.manual_seed(7)
    first, second = augment(mel_BMF), augment(mel_BMF)
    torch.manual_seed(7)
    assert torch.equal(augment(mel_BMF), first)
    assert not torch.equal(first, second)


def test_only_training_hears_masks_and_the_model_is_left_as_it_was() -> None:
    batch = tones(4, 0)
    augment = SpecAugmentConfig(time_frames=40, mel_bins=8).build()
    model = SupervisedTokenizerConfig(**CONFIG, vq_warmup_updates=1000).build().eval()
    plain = asr_objective(model, batch)[0].item()
    assert asr_objective(model, batch, [augment])[0].item() == plain
    model.train()
    masked = asr_objective(model, batch, [augment])[0].item()
    assert masked != plain
    assert asr_objective(model, batch)[0].item() == pytest.approx(plain, rel=1e-5)  # no hook stays behind


def test_a_run_with_masks_resumes_exactly(tmp_path: Path) -> None:
    def trainer(run_dir: Path) -> Trainer:
        config = TrainConfig(steps=6, lr=1e-3, log_every=1, checkpoint_every=100, num_threads=1, device="cpu")
        model = SupervisedTokenizerConfig(**CONFIG | {"text_vocab_size": TEXT.size}, vq_warmup_updates=2).build()
        loader = UtteranceLoader(CountingCorpus(9), TEXT, batch_seconds=3, threads=1)
        objective = partial(asr_objective, augments=[SpecAugmentConfig().build()])
        return Trainer(config, model, objective, loader, run_dir)

    whole = trainer(tmp_path / "whole")
    whole.train()
    trainer(tmp_path / "parts").train(stop_after=3)
    torch.rand(5)  # something else draws in between
    resumed = trainer(tmp_path / "parts")
    resumed.train()
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name
    lines = [
        [{k: v for k, v in line.items() if k not in TIMING} for line in read_metrics(tmp_path / run)]
        for run in ("whole", "parts")
    ]
    assert lines[0] == lines[1]
    assert lines[0][-1]["codes"] > 0


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [({"time_masks": -1}, "at least 0"), ({"mel_bins": -2}, "at least 0"), ({"time_share": 0.0}, "0..1")],
)
def test_settings_are_checked(wrong: dict, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        SpecAugmentConfig(**wrong)
