"""Patchers: the spec's worked examples, step equals call, and what the two booleans must always satisfy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechquilt.model.patcher import (
    AlignedPatcher,
    CurriculumPatcher,
    NoPatcher,
    PatcherConfig,
    StaticPatcher,
    eval_patcher,
)
from speechquilt.protocols import Patcher
from speechquilt.types import Document, LaidOut, Segment
from speechquilt.vocab import Vocab
from tests.dummies import VOCAB, random_laid_out

CAUSAL = [NoPatcher(), StaticPatcher(1), StaticPatcher(2), StaticPatcher(4), StaticPatcher(7)]
ALL = [*CAUSAL, AlignedPatcher(), CurriculumPatcher(4, 1 / 3, 2 / 3)]


def span_of_11() -> LaidOut:
    """Spec 2, section 5: `BOS <t> a b <s> s0..s10 <t> c EOS`, word 1 = [2, 4], word 2 = [6, 9]."""
    ends_T = np.isin(np.arange(11), [1, 4, 5, 9, 10])
    segments = (
        Segment(modality="text", ids_T=np.array([0, 1])),
        Segment(modality="speech", ids_T=np.arange(11), unit_end_T=ends_T),
        Segment(modality="text", ids_T=np.array([2])),
    )
    return VOCAB.lay_out(Document(id="spec", segments=segments, source="spec"))


@pytest.mark.parametrize(
    ("patcher", "starts"),
    [
        (NoPatcher(), list(range(11))),
        (StaticPatcher(4), [0, 4, 8]),
        (AlignedPatcher(), [0, 2, 5, 6, 10]),
    ],
)
def test_worked_example_of_the_spec(patcher: Patcher, starts: list[int]) -> None:
    opens_T, _ = patcher(span_of_11(), 0.0)
    assert (np.flatnonzero(opens_T[5:16])).tolist() == starts
    assert opens_T.sum() == 8 + len(starts)
    assert len(opens_T) == 19


def test_visible_of_the_spec_with_a_short_last_patch() -> None:
    """Spec 2, section 6.4: BOS, `<s>` s0..s5 `<t>`."""
    segments = (
        Segment(modality="speech", ids_T=np.arange(6)),
        Segment(modality="text", ids_T=np.array([], dtype=np.int32)),
    )
    opens_T, closes_T = StaticPatcher(4)(VOCAB.lay_out(Document(id="x", segments=segments, source="x")), 0.0)
    unit_T = opens_T.cumsum() - 1
    assert unit_T.tolist() == [0, 1, 2, 2, 2, 2, 3, 3, 4, 5]
    assert (unit_T + closes_T).tolist() == [1, 2, 2, 2, 2, 3, 3, 3, 5, 6]


def test_aligned_closes_words_but_not_a_word_that_was_cut() -> None:
    ends_T = np.array([False, True, False, False])
    segment = Segment(modality="speech", ids_T=np.arange(4), unit_end_T=ends_T)
    opens_T, closes_T = AlignedPatcher()(VOCAB.lay_out(Document(id="x", segments=(segment,), source="x")), 0.0)
    assert opens_T.tolist() == [True, True, True, False, True, False, True]
    assert closes_T.tolist() == [True, True, False, True, False, False, True]


@pytest.mark.parametrize("patcher", ALL, ids=repr)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), draw=st.floats(0, 0.999), progress=st.floats(0, 0.999))
def test_the_two_booleans(patcher: Patcher, seed: int, draw: float, progress: float) -> None:
    laid_out = random_laid_out(seed)
    opens_T, closes_T = patcher(laid_out, draw, progress)
    text_T = ~laid_out.is_speech_T
    assert opens_T.dtype == closes_T.dtype == bool
    assert opens_T[text_T].all()
    assert closes_T[text_T].all()
    assert not (closes_T[:-1] & ~opens_T[1:]).any(), "a closed unit goes on"
    after_text_T = np.append(False, text_T[:-1])
    assert opens_T[after_text_T].all(), "a unit crosses a span"


@pytest.mark.parametrize("patcher", CAUSAL, ids=repr)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_step_equals_call(patcher: Patcher, seed: int) -> None:
    laid_out = random_laid_out(seed)
    opens_T, closes_T = patcher(laid_out, 0.0)
    state = patcher.init_state()
    for t, is_speech in enumerate(laid_out.is_speech_T.tolist()):
        opens, closes, state = patcher.step(is_speech, state)
        assert (opens, closes) == (opens_T[t], closes_T[t]), t


def test_curriculum_goes_from_aligned_to_static() -> None:
    patcher, laid_out = CurriculumPatcher(4, 1 / 3, 2 / 3), span_of_11()
    probabilities = [patcher.aligned_probability(u) for u in (0, 0.333, 0.5, 0.667, 0.99)]
    assert probabilities == pytest.approx([1, 1, 0.5, 0, 0], abs=2e-3)
    aligned, static = (p(laid_out, 0.0)[0].tolist() for p in (AlignedPatcher(), StaticPatcher(4)))
    assert patcher(laid_out, 0.999, 0.0)[0].tolist() == aligned
    assert patcher(laid_out, 0.49, 0.5)[0].tolist() == aligned
    assert patcher(laid_out, 0.51, 0.5)[0].tolist() == static
    assert patcher(laid_out, 0.0, 0.999)[0].tolist() == static
    assert CurriculumPatcher(4, 0.5, 0.5).aligned_probability(0.5) == 0  # a sharp switch divides by nothing


def test_errors_say_what_to_do() -> None:
    segment = Segment(modality="speech", ids_T=np.arange(3))
    unaligned = Vocab(num_text=4, num_speech=4).lay_out(Document(id="doc7", segments=(segment,), source="mls"))
    with pytest.raises(ValueError, match=r"doc7.*mls.*unit_end_T.*static"):
        AlignedPatcher()(unaligned, 0.0)
    with pytest.raises(ValueError, match="eval_patcher"):
        CurriculumPatcher(4, 0.3, 0.6).init_state()
    with pytest.raises(ValueError, match="tau1"):
        PatcherConfig(kind="curriculum", tau1=0.9).build()
    with pytest.raises(ValueError, match="at least 1"):
        PatcherConfig(kind="static", patch_size=0).build()


def test_config_builds_every_kind_and_what_to_test_with() -> None:
    assert [PatcherConfig(kind=k).build() for k in ("none", "static", "aligned", "curriculum")] == [
        NoPatcher(),
        StaticPatcher(4),
        AlignedPatcher(),
        CurriculumPatcher(4, 1 / 3, 2 / 3),
    ]
    assert eval_patcher(PatcherConfig(kind="curriculum", patch_size=2)) == StaticPatcher(2)
    assert not eval_patcher(PatcherConfig(kind="aligned")).causal
