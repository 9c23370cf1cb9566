"""Who is understood: every group and reader has its rate, and the floors are what they say they are."""

import numpy as np
import pytest
import torch

from speechquilt import audio
from speechquilt.evals.error_rates import ErrorRate, error_rate, plain_words
from speechquilt.evals.results import Schema
from speechquilt.stages.encode import encode_all
from speechquilt.stages.heard import GROUPS, LIMITS, MEASURES, heard, readings
from speechquilt.stages.whisper_reader import WhisperReader
from speechquilt.types import Utterance, Waveform
from tests.contracts.tiny_tokenizer import build
from tests.parity import tiny_tokenizers


def recordings(number: int) -> list[Utterance]:
    waves = [
        Waveform(samples_S=tiny_tokenizers.noise(i, 1.0 + 0.3 * i).numpy(), sample_rate=16000) for i in range(number)
    ]
    return [Utterance(id=str(i), text="where does anna live", audio=wave) for i, wave in enumerate(waves)]


@pytest.fixture(scope="module")
def tokenizer():
    return build(seed=3)


def test_what_is_said_and_what_is_written_are_the_same_words():
    assert (
        plain_words("Mr. Dashwood's 3 ill-disposed men, in 1984!")
        == "mister dashwood's three ill disposed men in nineteen eighty four"
    )
    assert error_rate([("mister lee has three dogs", "Mr. Lee has 3 dogs.")]).value == 0
    assert error_rate([("mister lee has three dogs", "Mr. Lee has 4 dogs.")]).value == 1 / 5


def test_a_rate_is_over_words_and_its_interval_over_sentences():
    rate = error_rate([("one two three", "one two three"), ("four", "five"), ("six seven", "six")])
    assert (rate.value, rate.n, rate.words) == (2 / 6, 3, 6)
    assert rate.low < rate.value < rate.high
    sure = error_rate([("one two three", "one two three")] * 50)
    assert sure.value == 0
    assert 0 < sure.high < 0.12
    with pytest.raises(ValueError, match="have no error rate"):
        error_rate([("...", "word")])


def test_every_group_and_reader_has_its_rate(tokenizer):
    groups = dict.fromkeys(GROUPS, recordings(4))
    found = heard(tokenizer, groups)
    Schema(MEASURES).check(found)
    assert len(found) == len(GROUPS) * 2 * len(vars(ErrorRate(value=0, low=0, high=0, n=0, words=0)))
    verdicts = {v.name: v for v in Schema(MEASURES).verdicts(found)}
    assert len(verdicts) == len(LIMITS)
    assert verdicts["Tokens read back, people (LibriVox): word error rate"].target == "≤ 25 %"
    assert not any(v.met for v in verdicts.values())  # random weights understand nobody


def test_the_readers_read_tokens_and_what_stands_in_front_of_the_codebook(tokenizer):
    utterances = recordings(5)
    found = readings(tokenizer, utterances)
    ids = encode_all(tokenizer, [audio.resample(u.audio, 16000) for u in utterances])
    assert found["tokens"] == tokenizer.read_back(ids)
    assert found["no_codebook"] != found["tokens"]
    with torch.no_grad():  # a codebook of the very vectors changes nothing
        exact = build(seed=3)
        pooled_BTD, _ = exact._pooled(torch.from_numpy(utterances[0].audio.samples_S)[None], torch.tensor([16000]))
        exact.quantizer.codebook_KD[: pooled_BTD.shape[1]] = pooled_BTD[0]
    first = readings(exact, utterances[:1])
    assert first["tokens"] == first["no_codebook"] == found["no_codebook"][:1]


def test_the_original_whisper_is_asked_in_order_and_alone_as_in_a_batch(tmp_path):
    tiny_tokenizers.whisper(tmp_path, max_source_positions=150)  # hears 3 s
    reader = WhisperReader(tmp_path)
    utterances = recordings(3)
    together = reader.read(utterances)
    assert len(set(together)) > 1
    assert together == [reader.read([u])[0] for u in utterances]
    long = Utterance(id="long", text="x", audio=Waveform(samples_S=np.zeros(4 * 16000, np.float32), sample_rate=16000))
    with pytest.raises(ValueError, match=r"long lasts 4\.0 s, Whisper hears 3 s"):
        reader.read([long])
