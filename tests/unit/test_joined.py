"""Joined recordings: nothing lost, sessions never mixed, never longer than asked, as long as possible."""

import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechquilt.data.feed.spoken_documents import JoinConfig, JoinedTexts
from speechquilt.data.interleaving.parallel import interleave_parallel
from speechquilt.types import SILENCE, AlignedTokens

SESSION = re.compile(r"(.+)[-_/]\d+")


def spoken(id: str, num_words: int, rng: np.random.Generator) -> AlignedTokens:
    """Words of 0 to 4 tokens with silences; some recordings are silence alone, or empty."""
    runs = [(w, int(rng.integers(0, 5))) for k in range(num_words) for w in (SILENCE, k)] + [(SILENCE, 2)]
    word_T = np.repeat([w for w, _ in runs], [n for _, n in runs]).astype(np.int32)
    ids_T = rng.integers(0, 99, len(word_T)).astype(np.int32)
    words = tuple(f"{id}.{k}" for k in range(num_words))
    return AlignedTokens(id=id, text=" ".join(words), words=words, ids_T=ids_T, word_T=word_T)


def words_of_tokens(texts: list[AlignedTokens]) -> list[str]:
    return [text.words[w] if w != SILENCE else "" for text in texts for w in text.word_T.tolist()]


@settings(max_examples=40, deadline=None)
@given(
    sessions=st.lists(st.sampled_from(["1-a", "1-b", "book/2", ""]), max_size=25),
    max_tokens=st.integers(1, 120),
    seed=st.integers(0, 99),
)
def test_joined_recordings(sessions, max_tokens, seed):
    rng = np.random.default_rng(seed)
    parts = [
        spoken(f"{session}-{i:04d}" if session else f"alone{i}", int(rng.integers(0, 9)), rng)
        for i, session in enumerate(sessions)
    ]
    joined = JoinedTexts(parts, JoinConfig(max_tokens=max_tokens))
    made = [joined[i] for i in range(len(joined))]
    assert words_of_tokens(made) == words_of_tokens(parts)
    assert [i for d in made for i in d.ids_T.tolist()] == [i for p in parts for i in p.ids_T.tolist()]
    assert [w for d in made for w in d.words] == [w for p in parts for w in p.words]
    counts = [1 + int(d.id.partition("+")[2] or 0) for d in made]
    starts = np.cumsum([0, *counts])
    assert starts[-1] == len(parts)
    for k, (a, b) in enumerate(pairwise(starts)):
        names = {(SESSION.fullmatch(p.id) or [p.id, p.id])[1] for p in parts[a:b]}
        assert len(names) == 1
        assert b - a == 1 or len(made[k].ids_T) <= max_tokens
        after = SESSION.fullmatch(parts[b].id) if b < len(parts) else None
        if after and after[1] in names:  # it would not have fitted
            assert len(made[k].ids_T) + len(parts[b].ids_T) > max_tokens


def test_a_joined_recording_is_cut_into_more_blocks():
    rng = np.random.default_rng(0)
    parts = [spoken(f"a-{i}", 20, rng) for i in range(8)]
    joined = JoinedTexts(parts, JoinConfig(max_tokens=10_000))
    assert len(joined) == 1

    def spell(text: str) -> list[int]:
        return [0] * len(text.split())

    blocks = [len(interleave_parallel(joined[0], np.random.default_rng(s), spell).segments) for s in range(20)]
    apart = [len(interleave_parallel(parts[0], np.random.default_rng(s), spell).segments) for s in range(20)]
    assert np.mean(blocks) > 3 * np.mean(apart)
    with pytest.raises(IndexError):
        joined[1]


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match=r"max_tokens=-1"):
        JoinConfig(max_tokens=-1)
    with pytest.raises(ValueError, match="not a regular expression"):
        JoinConfig(session="(")
    with pytest.raises(ValueError, match="needs a group"):
        JoinConfig(session="abc")
