"""The id space: disjoint ranges, an exact round trip, and labels that know which side of a pair is scored."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from speechquilt.types import Document, Segment
from speechquilt.vocab import Special, Vocab

VOCAB = Vocab(num_text=30, num_speech=20)


@st.composite
def documents(draw):
    segments = []
    for _ in range(draw(st.integers(0, 4))):
        modality = draw(st.sampled_from(["text", "speech"]))
        limit = 30 if modality == "text" else 20
        ids = draw(st.lists(st.integers(0, limit - 1), max_size=8))
        segments.append(Segment(modality=modality, ids_T=np.array(ids, dtype=np.int32), loss=draw(st.booleans())))
    return Document(id="d", segments=tuple(segments), source="s")


@given(documents())
def test_layout_round_trips(document):
    back = VOCAB.read_back(VOCAB.lay_out(document).ids_T)
    assert [(s.modality, s.ids_T.tolist()) for s in back] == [(s.modality, s.ids_T.tolist()) for s in document.segments]


BARE = Vocab(num_text=30, num_speech=20, opening_marker=False)


@given(documents())
def test_without_the_opening_marker_only_that_marker_is_gone(document):
    marked, bare = VOCAB.lay_out(document), BARE.lay_out(document)
    opens_bare = bool(document.segments) and document.segments[0].modality == "text"
    kept_T = np.arange(len(marked.ids_T)) != (1 if opens_bare else -1)
    for key in ("ids_T", "is_speech_T", "loss_T", "unit_end_T"):
        a, b = getattr(marked, key), getattr(bare, key)
        assert (a is None) == (b is None)
        if a is not None:
            assert a[kept_T].tolist() == b.tolist()
    untold = opens_bare and not len(document.segments[0].ids_T)
    expected = [(s.modality, s.ids_T.tolist()) for s in document.segments[1 if untold else 0 :]]
    assert [(s.modality, s.ids_T.tolist()) for s in BARE.read_back(bare.ids_T)] == expected
    for vocab, laid_out in ((VOCAB, marked), (BARE, bare)):
        assert vocab.num_laid_out(document) == len(laid_out.ids_T)


@given(documents())
def test_layout_marks_speech_and_targets(document):
    out = VOCAB.lay_out(document)
    assert out.ids_T[0] == VOCAB.bos
    assert out.ids_T[-1] == VOCAB.eos
    assert (out.is_speech_T == VOCAB.is_speech(out.ids_T)).all()
    wanted = sum(len(s.ids_T) for s in document.segments if s.loss)
    ordinary = VOCAB.is_speech(out.ids_T) | VOCAB.is_text(out.ids_T)
    assert (out.loss_T & ordinary).sum() == wanted
    assert out.ids_T.max() < VOCAB.size


def test_ranges_are_disjoint_and_complete():
    ids = np.arange(VOCAB.size)
    kinds = VOCAB.is_text(ids).astype(int) + VOCAB.is_speech(ids)
    assert kinds.max() == 1
    assert VOCAB.is_text(ids).sum() == 30
    assert VOCAB.is_speech(ids).sum() == 20
    assert {VOCAB.special(s) for s in Special}.isdisjoint(ids[kinds == 1])
    assert VOCAB.size % 64 == 0


def test_the_target_side_of_a_pair_alone_is_scored_and_its_marker_is_not():
    pair = Document(
        id="p",
        source="asr",
        segments=(
            Segment(modality="speech", ids_T=np.array([1, 2]), loss=False),
            Segment(modality="text", ids_T=np.array([3])),
        ),
    )
    out = VOCAB.lay_out(pair)
    assert out.loss_T.tolist() == [False, False, False, False, False, True, True]


def test_foreign_ids_are_refused():
    with pytest.raises(ValueError, match=r"speech id 20 is outside 0\.\.19.*another tokenizer"):
        VOCAB.to_model("speech", np.array([3, 20]))
    with pytest.raises(ValueError, match="text id -1"):
        VOCAB.to_model("text", np.array([-1]))


def test_word_ends_are_known_only_when_every_speech_segment_has_them():
    with_ends = Segment(modality="speech", ids_T=np.array([1, 2]), unit_end_T=np.array([False, True]))
    without = Segment(modality="speech", ids_T=np.array([1, 2]))
    assert VOCAB.lay_out(Document(id="a", source="s", segments=(with_ends,))).unit_end_T.tolist() == [
        False, False, False, True, False,
    ]  # fmt: skip
    assert VOCAB.lay_out(Document(id="b", source="s", segments=(with_ends, without))).unit_end_T is None
