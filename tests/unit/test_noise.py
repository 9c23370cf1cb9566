"""Noise of synthetic speech: exact tokens read back without errors, wrong ones do not, and counts of shards add up."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechquilt.counts import add_counts
from speechquilt.evals import noise
from speechquilt.evals.intervals import rate_interval, rate_sums
from speechquilt.evals.noise import KINDS, NoiseMeter, kind_of, report, sorted_kinds
from speechquilt.evals.wer import wer
from speechquilt.text import spoken_form
from tests.contracts.tiny_tokenizer import build

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokenizer():
    return build(seed=3)


@pytest.fixture(scope="module")
def spans(tokenizer):
    """Token runs of many lengths and what the tokenizer reads in them, those with words."""
    rng = np.random.default_rng(0)
    tokens = [rng.integers(0, tokenizer.vocab_size, n).astype(np.int32) for n in rng.integers(2, 60, 90)]
    read = [(text, ids_T) for text, ids_T in zip(tokenizer.read_back(tokens), tokens) if spoken_form(text)]
    assert len(read) > 20
    return read


def measured(tokenizer, triples):
    meter = NoiseMeter(tokenizer)
    for written, spoken, ids_T in triples:
        meter.add(written, spoken, ids_T)
    return meter.counts()


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("the quick brown fox, it said, was asleep", "prose"),
        ("He came home. Then he slept; I'm sure I did too.", "prose"),
        ("THE SOFTWARE IS PROVIDED WITHOUT WARRANTY OF ANY KIND", "prose"),
        ("", "prose"),
        ("in the year 1984 it was cold", "numbers"),
        ("about € and nothing else", "numbers"),
        ("where does Anna live", "names"),
        ("the rules of NASA, in short", "names"),
        ("see https://example.org for more", "markup"),
        ("it was <em>very</em> good", "markup"),
        ("it was **very** good", "markup"),
        (r"where \alpha is small", "markup"),
        ("call read_back() on the tokens", "code"),
        ("set num_tokens to four", "code"),
        ("then self.run(x, y) is called", "code"),
        ("found in /usr/share/doc today", "code"),
        ("an iPhone with macOS was lost", "prose"),
        ("salt and/or pepper (or none)", "prose"),
    ],
)
def test_kind_of_a_written_text(text, kind):
    assert kind_of(text) == kind


def test_tokens_that_read_back_exactly_have_no_noise(tokenizer, spans):
    counts = measured(tokenizer, [(text, text, ids_T) for text, ids_T in spans])
    assert sum(c["spans"] for c in counts.values()) == len(spans)
    assert sum(c["words"] for c in counts.values()) == sum(len(spoken_form(t).split()) for t, _ in spans)
    assert all(c["errors"] == 0 for c in counts.values())
    assert report(counts)["all"]["wer"] == 0
    assert report(counts)["all"]["high"] > 0  # a sample without errors does not prove that there are none


def test_shuffled_tokens_have_noise_that_is_the_plain_word_error_rate(tokenizer, spans):
    rng = np.random.default_rng(1)
    shuffled = [(text, rng.permutation(ids_T)) for text, ids_T in spans]
    heard = tokenizer.read_back([ids_T for _, ids_T in shuffled])
    expected = wer(zip([text for text, _ in shuffled], heard))
    got = report(measured(tokenizer, [("Hi Anna", text, ids_T) for text, ids_T in shuffled]))["names"]
    assert got["wer"] == expected.rate > 0
    assert got["low"] < got["wer"] < got["high"]


def test_errors_are_counted_on_what_was_spoken_and_kinds_on_what_was_written(tokenizer, spans):
    text, ids_T = spans[0]
    counts = measured(tokenizer, [("42", text, ids_T), ("f(x)", text, ids_T)])
    assert list(counts) == ["numbers", "code"]
    assert [c["errors"] for c in counts.values()] == [0, 0]


def test_nothing_heard_is_every_word_missed(tokenizer):
    counts = measured(tokenizer, [("five words", "five words that are lost", np.zeros(0, np.int32))])
    assert (counts["prose"]["words"], counts["prose"]["errors"]) == (5, 5)


def test_a_character_of_a_script_without_spaces_is_a_word(tokenizer):
    counts = measured(tokenizer, [("東京です", "東京です", np.zeros(0, np.int32))])
    assert (counts["prose"]["words"], counts["prose"]["errors"]) == (4, 4)


def test_spans_are_read_in_parts_and_counts_can_be_asked_for_at_any_time(tokenizer, spans, monkeypatch):
    triples = [(text, text[::-1], ids_T) for text, ids_T in spans]
    whole = measured(tokenizer, triples)
    monkeypatch.setattr(noise, "WAITING", 7)
    meter = NoiseMeter(tokenizer)
    for triple in triples:
        meter.add(*triple)
        assert len(meter._waiting) < 7
    assert meter.counts() == whole
    assert meter.counts() == whole  # asking changes nothing
    assert NoiseMeter(tokenizer).counts() == {}


def test_shards_add_up_to_the_whole(tokenizer, spans):
    triples = [(w, text[::-1], ids_T) for (text, ids_T), w in zip(spans, ["plain", "12", "a **b**"] * len(spans))]
    parts = [measured(tokenizer, triples[:9]), measured(tokenizer, triples[9:])]
    assert add_counts(*parts) == add_counts(*reversed(parts)) == measured(tokenizer, triples)
    assert list(sorted_kinds(add_counts(*parts))) == [kind for kind in KINDS if kind in ("prose", "numbers", "markup")]


def test_a_tokenizer_that_cannot_read_is_refused_at_once():
    mute = build()
    mute.text_tokenizer = None
    with pytest.raises(ValueError, match="cannot spell"):
        NoiseMeter(mute)


def test_kinds_without_a_word_have_no_rate(tokenizer):
    assert report(measured(tokenizer, [("...", "...", np.zeros(0, np.int32))])) == {}
    assert report({}) == {}


def counted(words_N: np.ndarray, errors_N: np.ndarray) -> dict[str, int]:
    return rate_sums(zip(words_N.astype(int).tolist(), errors_N.astype(int).tolist()))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 40)), min_size=1, max_size=30))
def test_the_interval_holds_the_rate_and_is_never_empty(spans):
    words_N, errors_N = np.array(spans).T
    low, high = rate_interval(counted(words_N, errors_N))
    rate = errors_N.sum() / words_N.sum()
    assert 0 <= low <= rate < high


@pytest.mark.parametrize("whole_spans", [False, True])
def test_the_interval_covers_the_true_rate(whole_spans):
    """95 % of intervals hold the true rate, also when a failing span loses all of its words together."""
    rng = np.random.default_rng(2)
    true, inside, trials = 0.15, 0, 400
    for _ in range(trials):
        words_N = rng.integers(4, 16, 120)
        errors_N = words_N * (rng.random(120) < true) if whole_spans else rng.binomial(words_N, true)
        low, high = rate_interval(counted(words_N, errors_N))
        inside += low <= true <= high
    assert 0.92 <= inside / trials <= 0.99
