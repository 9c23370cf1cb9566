"""The text-to-token model as an aligner: its word ends on given speech tokens, and what may never happen to them."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechquilt.evals.results import Schema
from speechquilt.stages import train_text_to_token as recipes
from speechquilt.text_to_token import answer
from speechquilt.text_to_token.answer import CUE, EOS, KINDS, SPEECH, WORD_END, Position
from speechquilt.text_to_token.boundaries import Spoken, place_units, unit_ends_of
from speechquilt.text_to_token.examples import TextToTokenDataConfig
from speechquilt.text_to_token.generate import EngineConfig
from speechquilt.types import AlignedWord, UnitEnd, Utterance, Waveform
from tests.contracts.test_text_to_token import CONFIG, NUM_SPEECH, SOUND, TOKENIZER, WORDS, spoken, train


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained():
    """Random word orders, so that a word's sound is what is learned and not a sentence."""
    rng = np.random.default_rng(3)
    utterances = [spoken(tuple(rng.choice(WORDS, rng.integers(2, 6)).tolist())) for _ in range(60)]
    data = TextToTokenDataConfig(rows=4, row_tokens=128, spans_per_utterance=1)
    return train(data.build(utterances, TOKENIZER, CONFIG.vocab), steps=160)


def test_the_ends_of_unseen_sentences_are_found(trained):
    rng = np.random.default_rng(9)
    truths = [spoken(tuple(rng.choice(WORDS, 5).tolist())) for _ in range(30)]
    found = place_units(trained, TOKENIZER, [Spoken(words=t.words, ids_T=t.ids_T) for t in truths])
    right = [np.array_equal(unit_end_T, t.unit_end_T) for unit_end_T, t in zip(found, truths)]
    assert np.mean(right) > 0.9
    shifted = place_units(trained, TOKENIZER, [Spoken(words=t.words[::-1], ids_T=t.ids_T) for t in truths])
    assert np.mean([np.array_equal(u, t.unit_end_T) for u, t in zip(shifted, truths)]) < 0.5  # it does read the text


def test_aligning_what_was_generated_gives_the_ends_it_was_generated_with(trained):
    texts = [" ".join(np.random.default_rng(i).choice(WORDS, 4)) for i in range(12)]
    spans = EngineConfig(temperature=0).build(trained, TOKENIZER).generate(texts, range(12))
    same = [np.array_equal(unit_ends_of(trained, TOKENIZER, t, s.ids_T), s.unit_end_T) for t, s in zip(texts, spans)]
    assert np.mean(same) > 0.9


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_any_speech_gets_every_word_once_and_alone_as_in_company(seed):
    """From a model that knows nothing: the grammar and the counts hold by themselves."""
    rng = np.random.default_rng(seed)
    model = CONFIG.build(seed)
    items = []
    for _ in range(4):
        words = tuple(rng.choice([*WORDS, "zebra"], rng.integers(1, 6)).tolist())
        extra = int(rng.integers(0, 12)) * int(rng.integers(0, 2))  # half of them have no token to spare
        items.append(Spoken(words=words, ids_T=rng.integers(0, NUM_SPEECH, len(words) + extra)))
    together = place_units(model, TOKENIZER, items)
    for item, unit_end_T in zip(items, together):
        kinds = unit_end_T[unit_end_T != UnitEnd.NONE].tolist()
        assert kinds.count(UnitEnd.WORD) == len(item.words)
        assert set(kinds) <= {UnitEnd.WORD, UnitEnd.SILENCE}
        assert (UnitEnd.SILENCE, UnitEnd.SILENCE) not in itertools.pairwise(kinds)
        assert unit_end_T[-1] != UnitEnd.NONE
        assert len(unit_end_T) == len(item.ids_T)
        np.testing.assert_array_equal(unit_end_T, place_units(model, TOKENIZER, [item])[0])


def test_what_cannot_be_aligned_says_why(trained):
    with pytest.raises(ValueError, match="2 words and 1 speech tokens"):
        unit_ends_of(trained, TOKENIZER, "Red dog!", np.array([3]))
    with pytest.raises(ValueError, match="at least one"):
        unit_ends_of(trained, TOKENIZER, "?!", SOUND["red"])
    with pytest.raises(ValueError, match='cue="text"'):
        unit_ends_of(replace(CONFIG, cue="text").build(), TOKENIZER, "red", SOUND["red"])
    assert place_units(trained, TOKENIZER, []) == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=4), st.integers(0, 10**6))
def test_any_walk_through_the_grammar_says_each_cue_once(lengths, seed):
    """And `move` refuses what `legal` does not list."""
    cues = [list(range(10 * n, 10 * n + length)) for n, length in enumerate(lengths)]
    rng = np.random.default_rng(seed)
    position, said, ends = Position(cues), [], 0
    while not position.finished:
        legal = position.legal()
        for kind in set(KINDS) - set(legal):
            with pytest.raises(ValueError, match="not legal"):
                position.move(kind)
        kind = int(rng.choice(legal))
        if kind == CUE:
            said.append(position.next_cue[0])
        ends += kind == WORD_END
        position.move(kind)
    assert said == [i for cue in cues for i in cue]
    assert ends >= len(cues)
    assert position.num_unbegun == 0
    assert {answer.kind_of(i, CONFIG.vocab) for i in (0, CONFIG.vocab.speech_start)} == {CUE, SPEECH}
    assert [answer.kind_of(i, CONFIG.vocab) for i in (CONFIG.vocab.word_end, CONFIG.vocab.eos)] == [WORD_END, EOS]


FRAME_RATE = 12.5


def recording(words: tuple[str, ...], late_s: float) -> Utterance:
    """An utterance of the language of `spoken` whose word times are its tokens' own, plus `late_s`."""
    word_T = spoken(words).word_T
    places = [np.flatnonzero(word_T == w) for w in range(len(words))]
    alignment = tuple(
        AlignedWord(text=word.upper() + ",", start_s=at[0] / FRAME_RATE, end_s=(at[-1] + 1) / FRAME_RATE + late_s)
        for word, at in zip(words, places)
    )
    audio = Waveform(samples_S=np.zeros(1, dtype=np.float32), sample_rate=1)
    return Utterance(id=" ".join(words), text=" ".join(words), audio=audio, alignment=alignment)


@pytest.mark.parametrize("late_s", [0.0, 0.03, -0.1])
def test_the_recipe_measures_the_distance_from_the_word_times(trained, monkeypatch, late_s):
    """The sound is the language's own, so no tokenizer has to hear it: `tokenize` looks it up."""
    rng = np.random.default_rng(9)
    held_out = [recording(tuple(rng.choice(WORDS, 5).tolist()), late_s) for _ in range(20)]
    monkeypatch.setattr(recipes, "encode_utterances", lambda _, us: [spoken(tuple(u.text.split())) for u in us])
    found = recipes.measure_boundaries(trained, TOKENIZER, SimpleNamespace(frame_rate=FRAME_RATE), held_out)
    Schema(recipes.MEASURES).check(found)
    assert found["text_to_token.boundary_n"] == 100
    assert found["text_to_token.boundary_ms"] == pytest.approx(abs(1000 * late_s))
    assert found["text_to_token.boundary_grid_ms"] == pytest.approx(abs(1000 * late_s))
    assert found["text_to_token.boundary_p90_ms"] >= found["text_to_token.boundary_ms"]
    assert (found["text_to_token.boundary_within_token"] > 0.9) == (abs(late_s) < 1 / FRAME_RATE)


def test_what_has_no_word_times_is_not_measured(trained):
    tokenizer = SimpleNamespace(frame_rate=FRAME_RATE)
    whole = replace(CONFIG, cue="text").build()
    timed = recording(("red", "dog"), 0.0)
    assert recipes.measure_boundaries(trained, TOKENIZER, tokenizer, [replace(timed, alignment=())]) == {}
    assert recipes.measure_boundaries(whole, TOKENIZER, tokenizer, [timed]) == {}
