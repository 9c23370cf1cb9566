"""Batches of utterances: bounded, complete, exact across epoch edges and ranks; bad recordings are counted, never fatal."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechquilt.data.feed.utterances import UtteranceLoader
from speechquilt.text import TextTokenizer
from speechquilt.types import IGNORE, AudioBatch, Utterance, Waveform

WORDS = ["cat", "dog", "sat", "mat", "the"]
TEXT = TextTokenizer.train([" ".join(WORDS)] * 5, 300)


def utterance(i: int, seconds: float, text: str | None = None, rate: int = 16000) -> Utterance:
    """Constant audio whose value is the utterance's number, so that a batch says which rows it holds."""
    samples_S = np.full(round(seconds * rate), (i + 1) / 1000, dtype=np.float32)
    text = WORDS[i % len(WORDS)] if text is None else text
    return Utterance(id=f"u{i}", text=text, audio=Waveform(samples_S=samples_S, sample_rate=rate))


def corpus(n: int, seed: int = 0) -> list[Utterance]:
    return [utterance(i, s) for i, s in enumerate(np.random.default_rng(seed).uniform(0.5, 3.0, n))]


def numbers(batch: AudioBatch) -> list[int]:
    return [round(float(x) * 1000) - 1 for x in batch.wav_BS[:, 0]]


def same(a: AudioBatch, b: AudioBatch) -> bool:
    return all(torch.equal(getattr(a, k), getattr(b, k)) for k in ("wav_BS", "num_samples_B", "text_BL"))


def epoch(loader: UtteranceLoader) -> list[AudioBatch]:
    """Batches until as many rows were seen as there are utterances."""
    batches: list[AudioBatch] = []
    while sum(len(b.wav_BS) for b in batches) < len(loader):
        batches.append(loader.next_batch())
    return batches


def test_a_batch_holds_audio_text_and_padding() -> None:
    utterances = [utterance(0, 1.0, "The cat sat!"), utterance(1, 2.0, "Dog.")]
    loader = UtteranceLoader(utterances, TEXT, batch_seconds=10)
    batch = loader.next_batch()
    assert batch.wav_BS.shape == (2, 32000)
    assert batch.wav_BS.dtype == torch.float32
    for row, i in enumerate(numbers(batch)):
        n = int(batch.num_samples_B[row])
        assert n == 16000 * (i + 1)
        assert torch.allclose(batch.wav_BS[row, :n], torch.tensor((i + 1) / 1000), atol=1e-4)
        assert not batch.wav_BS[row, n:].any()
        ids = [t for t in batch.text_BL[row].tolist() if t != IGNORE]
        assert TEXT.decode(ids) == ["the cat sat", "dog"][i]


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 40), batch_seconds=st.floats(3.0, 20.0), seed=st.integers(0, 9))
def test_an_epoch_holds_every_utterance_once_within_the_bound(n: int, batch_seconds: float, seed: int) -> None:
    loader = UtteranceLoader(corpus(n, seed), TEXT, batch_seconds=batch_seconds, seed=seed)
    for _ in range(3):
        batches = epoch(loader)
        assert sorted(i for b in batches for i in numbers(b)) == list(range(n))
        assert all(b.wav_BS.numel() <= batch_seconds * 16000 for b in batches)


def test_batches_are_bucketed_by_length_and_differ_between_epochs() -> None:
    loader = UtteranceLoader(corpus(200), TEXT, batch_seconds=20)
    first = epoch(loader)
    padding = 1 - sum(int(b.num_samples_B.sum()) for b in first) / sum(b.wav_BS.numel() for b in first)
    assert padding < 0.2
    second = epoch(loader)
    assert {tuple(numbers(b)) for b in first} != {tuple(numbers(b)) for b in second}


def test_sorted_epochs_go_from_short_to_long() -> None:
    loader = UtteranceLoader(corpus(100), TEXT, batch_seconds=10, sorted_epochs=1)
    first, second = ([float(b.num_samples_B.float().mean()) for b in epoch(loader)] for _ in range(2))
    assert first == pytest.approx(sorted(first), rel=0.2)  # lengths are sorted with a little noise
    assert second != pytest.approx(sorted(second), rel=0.2)


@settings(max_examples=20, deadline=None)
@given(stop=st.integers(0, 40), gain_db=st.sampled_from([0.0, 6.0]))
def test_resume_is_exact_across_epoch_edges(stop: int, gain_db: float) -> None:
    def make() -> UtteranceLoader:
        return UtteranceLoader(corpus(30), TEXT, batch_seconds=8, seed=3, gain_db=gain_db)

    straight, resumed = make(), make()
    assert len(epoch(make())) < 20
    for _ in range(stop):
        straight.next_batch()
    resumed.load_state_dict(json.loads(json.dumps(straight.state_dict())))
    for _ in range(25):
        assert same(straight.next_batch(), resumed.next_batch())


def test_two_ranks_share_the_batches_of_one() -> None:
    one = UtteranceLoader(corpus(31), TEXT, batch_seconds=8, seed=1, gain_db=3)
    ranks = [
        UtteranceLoader(corpus(31), TEXT, batch_seconds=8, seed=1, gain_db=3, rank=r, world_size=2) for r in (0, 1)
    ]
    for step in range(30):
        if step == 13:  # all ranks go on from what rank 0 saved
            state = ranks[0].state_dict()
            for rank in ranks:
                rank.load_state_dict(state)
        for rank in ranks:
            assert same(one.next_batch(), rank.next_batch())


def test_gain_is_drawn_within_its_bound() -> None:
    plain = UtteranceLoader(corpus(30), TEXT, batch_seconds=8)
    loud = UtteranceLoader(corpus(30), TEXT, batch_seconds=8, gain_db=6)
    ratios = torch.cat([loud.next_batch().wav_BS[:, 0] / plain.next_batch().wav_BS[:, 0] for _ in range(8)])
    assert ratios.log10().abs().max() * 20 <= 6.01
    assert len(ratios.unique()) > 10


def test_other_rates_are_resampled() -> None:
    loader = UtteranceLoader([utterance(0, 1.0, rate=8000)], TEXT, batch_seconds=8)
    assert loader.next_batch().num_samples_B.tolist() == [16000]


def test_what_cannot_be_trained_on_is_counted_with_its_reason() -> None:
    nan = utterance(1, 1.0)
    nan.audio.samples_S[5] = np.nan
    stereo = Utterance(id="stereo", text="cat", audio=Waveform(samples_S=np.zeros((2, 9)), sample_rate=16000))
    bad = [
        (utterance(0, 0.0), "empty"),
        (nan, "NaN"),
        (stereo, "shape"),
        (utterance(2, 1.0, "!?"), "text is empty"),
        (utterance(3, 30.0, "cat"), "batch_seconds=20"),
        (utterance(4, 19.0, "the cat"), "too long for its text"),
        (utterance(5, 0.3, "cat dog sat mat the"), "too short for its text"),
        (utterance(6, 0.16, "cat cat"), "too short for its text"),  # CTC needs a blank between the two
    ]
    loader = UtteranceLoader([*[u for u, _ in bad], utterance(7, 1.0)], TEXT, batch_seconds=20)
    assert [r.id for r in loader.rejects] == [u.id for u, _ in bad]
    for reject, (_, reason) in zip(loader.rejects, bad):
        assert reason in reject.reason
    assert loader.reject_summary().startswith("2 x too short for its text")
    assert numbers(loader.next_batch()) == [7]
    with pytest.raises(ValueError, match="text is empty"):
        UtteranceLoader([utterance(0, 1.0, "")], TEXT, batch_seconds=20)


def test_a_state_of_other_data_is_refused() -> None:
    state = UtteranceLoader(corpus(9), TEXT, batch_seconds=8).state_dict()
    with pytest.raises(ValueError, match="other utterances"):
        UtteranceLoader(corpus(8), TEXT, batch_seconds=8).load_state_dict(state)
    with pytest.raises(ValueError, match="other utterances"):
        UtteranceLoader(corpus(9), TEXT, batch_seconds=9).load_state_dict(state)
