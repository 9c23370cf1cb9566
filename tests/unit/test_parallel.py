"""Parallel interleaving: which token belongs to which word, and the block rule of spec 2, 3.2."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechquilt.data.interleaving.parallel import (
    ParallelSource,
    draw_blocks,
    interleave_parallel,
    tokens_of_words,
)
from speechquilt.types import AlignedTokens, AlignedWord, UnitEnd


def words_at(*times: tuple[float, float]) -> list[AlignedWord]:
    return [AlignedWord(text=f"w{k}", start_s=a, end_s=b) for k, (a, b) in enumerate(times)]


def aligned(alignment: list[AlignedWord], num_tokens: int, frame_rate: float) -> AlignedTokens:
    word_T = tokens_of_words(alignment, num_tokens, frame_rate)
    words = tuple(word.text for word in alignment)
    return AlignedTokens(id="d", text=" ".join(words), words=words, ids_T=np.arange(num_tokens), word_T=word_T)


def encode(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


def test_a_token_belongs_to_the_word_that_holds_its_centre():
    # 10 Hz: centres at 0.05, 0.15, ...
    result = aligned(words_at((0.1, 0.3), (0.46, 0.8)), 10, 10.0)
    assert result.word_T.tolist() == [-1, 0, 0, -1, -1, 1, 1, 1, -1, -1]
    assert result.unit_end_T.tolist() == [2, 0, 1, 0, 2, 0, 0, 1, 0, 2]  # UnitEnd codes


def test_a_word_without_a_token_takes_the_nearest_silence_token():
    result = aligned(words_at((0.0, 0.2), (0.46, 0.54), (0.8, 1.0)), 10, 10.0)
    assert result.word_T.tolist() == [0, 0, -1, -1, 1, -1, -1, -1, 2, 2]  # 0.5 is as near to 0.45 as to 0.55: the first
    # never across a neighbour: the silence at 0.25 is nearer in number, but not between w0 and w2
    squeezed = aligned(words_at((0.0, 0.2), (0.2, 0.23), (0.23, 1.0)), 10, 10.0)
    assert squeezed.word_T.tolist() == [0, 0] + [2] * 8  # none free: it goes inside its neighbour
    ends = aligned(
        words_at(
            (0.96, 0.99),
        ),
        10,
        10.0,
    )
    assert ends.word_T.tolist() == [-1] * 9 + [0]


def test_no_words_and_no_tokens():
    assert aligned([], 3, 12.5).word_T.tolist() == [-1, -1, -1]
    assert aligned([], 3, 12.5).unit_end_T.tolist() == [UnitEnd.NONE, UnitEnd.NONE, UnitEnd.SILENCE]
    assert aligned(words_at((0, 1)), 0, 12.5).word_T.tolist() == []


def test_unsorted_words_are_an_error():
    with pytest.raises(ValueError, match="'w1' starts before"):
        aligned(words_at((0.5, 0.6), (0.1, 0.2)), 10, 10.0)


@st.composite
def alignments(draw):
    gaps = draw(st.lists(st.tuples(st.floats(0, 0.4), st.floats(0.01, 0.5)), max_size=30))
    times, now = [], 0.0
    for pause, length in gaps:
        times.append((now + pause, now + pause + length))
        now += pause + length
    return words_at(*times), int(now * 12.5) + draw(st.integers(0, 5))


@settings(max_examples=150, deadline=None)
@given(alignments())
def test_words_of_tokens_against_a_plain_loop(case):
    alignment, num_tokens = case
    result = aligned(alignment, num_tokens, 12.5)
    spoken = result.word_T[result.word_T >= 0]
    assert (np.diff(spoken) >= 0).all()
    for i in range(num_tokens):
        centre = (i + 0.5) / 12.5
        inside = [k for k, word in enumerate(alignment) if word.start_s <= centre < word.end_s]
        if inside:
            assert result.word_T[i] == inside[0]
        elif result.word_T[i] >= 0:  # lent to a word that had none, and only one
            assert (result.word_T == result.word_T[i]).sum() == 1
        last = i == num_tokens - 1
        kind = UnitEnd.SILENCE if result.word_T[i] < 0 else UnitEnd.WORD
        ends = last or result.word_T[i] != result.word_T[i + 1]
        assert result.unit_end_T[i] == (kind if ends else UnitEnd.NONE)
    for k in set(range(len(alignment))) - set(spoken.tolist()):  # left without: really no silence between neighbours
        before, after = np.flatnonzero(spoken_before(result.word_T, k)), np.flatnonzero(result.word_T > k)
        low = before[-1] + 1 if len(before) else 0
        assert low == (after[0] if len(after) else num_tokens)


def spoken_before(word_T: np.ndarray, k: int) -> np.ndarray:
    return (word_T >= 0) & (word_T < k)


@settings(max_examples=200, deadline=None)
@given(num_words=st.integers(0, 200), seed=st.integers(0, 2**32))
def test_blocks_follow_the_rule(num_words, seed):
    blocks = draw_blocks(num_words, np.random.default_rng(seed))
    assert [w for _, a, b in blocks for w in range(a, b)] == list(range(num_words))
    assert all(x[0] != y[0] for x, y in pairwise(blocks))
    most_text = max(2, min(30, int(0.6 * num_words)))
    for k, (modality, a, b) in enumerate(blocks[:-1]):
        length = b - a
        if modality == "text":
            assert min(5, most_text) <= length <= most_text
        elif k:
            previous = blocks[k - 1][2] - blocks[k - 1][1]
            assert length == max(2, previous // 2)
        else:
            assert 2 <= length <= 15
    if len(blocks) > 1:
        assert blocks[-1][2] - blocks[-1][1] >= 3


def test_first_modality_is_a_fair_coin_and_text_gets_two_thirds():
    rng = np.random.default_rng(0)
    drawn = [draw_blocks(400, rng) for _ in range(600)]
    assert 240 < sum(blocks[0][0] == "text" for blocks in drawn) < 360
    text = sum(b - a for blocks in drawn for modality, a, b in blocks if modality == "text")
    assert 0.64 < text / (400 * 600) < 0.69


@pytest.mark.parametrize("num_words", [25, 40, 60])
def test_micro_world_documents_get_several_blocks(num_words):
    rng = np.random.default_rng(0)
    counts = [len(draw_blocks(num_words, rng)) for _ in range(500)]
    assert np.mean(counts) > 2.5
    assert np.mean(np.array(counts) >= 2) > 0.97


def spoken_text(word_T: list[int]) -> AlignedTokens:
    num_words = max(word_T, default=-1) + 1
    words = tuple(f"w{k}" for k in range(num_words))
    return AlignedTokens(
        id="d",
        text=" ".join(words),
        words=words,
        ids_T=np.arange(len(word_T)),
        word_T=np.array(word_T, dtype=np.int32),
    )


@st.composite
def spoken_texts(draw):
    word_T: list[int] = [-1] * draw(st.integers(0, 3))
    for k in range(draw(st.integers(1, 60))):
        word_T += [k] * draw(st.integers(1, 5)) + [-1] * draw(st.integers(0, 5))
    return spoken_text(word_T)


@settings(max_examples=150, deadline=None)
@given(spoken=spoken_texts(), seed=st.integers(0, 2**32))
def test_every_word_once_and_silence_split_at_switches(spoken, seed):
    document = interleave_parallel(spoken, np.random.default_rng(seed), encode)
    blocks = draw_blocks(len(spoken.words), np.random.default_rng(seed))
    assert [s.modality for s in document.segments] == [m for m, _, _ in blocks]
    for (modality, a, b), segment in zip(blocks, document.segments):
        assert segment.ids_T.dtype == np.int32
        if modality == "text":
            assert segment.ids_T.tolist() == list(range(a, b))
            assert segment.unit_end_T is None
            continue
        kept = segment.ids_T  # the ids are the positions in the recording
        assert kept.tolist() == list(range(kept[0], kept[-1] + 1))
        word_T = spoken.word_T[kept]
        assert sorted(set(word_T[word_T >= 0].tolist())) == list(range(a, b))
        first, last = np.flatnonzero(word_T >= 0)[[0, -1]]
        places = np.flatnonzero(spoken.word_T >= 0)
        before = places[places < kept[first]]
        after = places[places > kept[last]]
        pause_before = kept[first] - (before[-1] + 1 if len(before) else 0)
        pause_after = (after[0] if len(after) else len(spoken.ids_T)) - kept[last] - 1
        assert first == (-(-pause_before // 2) if a else pause_before)
        assert len(kept) - 1 - last == (-(-pause_after // 2) if b < len(spoken.words) else pause_after)
        ends_T = np.append(word_T[1:] != word_T[:-1], True)
        expected = np.where(ends_T, np.where(word_T < 0, UnitEnd.SILENCE, UnitEnd.WORD), UnitEnd.NONE)
        assert segment.unit_end_T.dtype == np.uint8
        np.testing.assert_array_equal(segment.unit_end_T, expected)


def test_a_document_whose_words_have_no_tokens_is_text():
    spoken = spoken_text([])
    spoken = replace(spoken, text="w0 w1 w2 w3", words=("w0", "w1", "w2", "w3"))
    for seed in range(4):
        (segment,) = interleave_parallel(spoken, np.random.default_rng(seed), encode).segments
        assert segment.modality == "text"
        assert segment.ids_T.tolist() == [0, 1, 2, 3]


def test_words_without_tokens_break_nothing():
    word_T = np.array([-1, 0, 0, 2, 2, -1, -1, 5, 5, 6, -1, 9, 9, -1])
    for seed in range(100):
        document = interleave_parallel(spoken_text(word_T.tolist()), np.random.default_rng(seed), encode)
        assert all(x.modality != y.modality for x, y in pairwise(document.segments))
        written = [i for s in document.segments if s.modality == "text" for i in s.ids_T.tolist()]
        tokens = [i for s in document.segments if s.modality == "speech" for i in s.ids_T.tolist()]
        assert tokens == sorted(set(tokens))
        heard = sorted(set(word_T[tokens].tolist()) - {-1}) if tokens else []
        assert sorted({*written, *heard} & {0, 2, 5, 6, 9}) == [0, 2, 5, 6, 9]
        assert not set(written) & set(heard)
        for word in heard:  # whole words
            assert set(np.flatnonzero(word_T == word).tolist()) <= set(tokens)


def test_source_draws_anew_in_every_epoch():
    word_T = np.repeat(np.arange(60), 4).tolist()
    source = ParallelSource([spoken_text(word_T)], encode, seed=3)
    assert len(source) == 1

    def shape(epoch, source=source):
        return [(s.modality, len(s.ids_T)) for s in source.in_epoch(0, epoch).segments]

    assert shape(0) == shape(0)
    assert len({str(shape(epoch)) for epoch in range(8)}) == 8
    assert shape(0) == [(s.modality, len(s.ids_T)) for s in source[0].segments]
    assert shape(0) != shape(0, ParallelSource([spoken_text(word_T)], encode, seed=4))
    assert source[0].source == "parallel"


def test_bad_spoken_text_is_refused():
    with pytest.raises(ValueError, match="3 speech tokens but 2"):
        AlignedTokens(id="d", text="a", words=("a",), ids_T=np.arange(3), word_T=np.array([0, 0]))
    for wrong in ([0, 1], [-2, 0], [0, -1, 0, 1]):
        with pytest.raises(ValueError, match="must rise from 0 to 0"):
            AlignedTokens(id="d", text="a", words=("a",), ids_T=np.arange(len(wrong)), word_T=np.array(wrong))
