"""Patchers: the spec's worked examples, step equals call, and what the two booleans must always satisfy."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechquilt import config
from speechquilt.model.entropy import EntropyConfig, EntropyPatcher
from speechquilt.model.patcher import (
    AlignedPatcher,
    BoundaryNoise,
    CurriculumPatcher,
    MixedPatcher,
    NoPatcher,
    PatcherConfig,
    StaticPatcher,
    eval_patcher,
)
from speechquilt.model.plain import PlainLMConfig
from speechquilt.nn.llama import LlamaConfig
from speechquilt.protocols import Patcher
from speechquilt.types import Document, LaidOut, Segment, UnitEnd
from speechquilt.vocab import Vocab
from tests.dummies import VOCAB, random_laid_out, with_ids

TINY = PlainLMConfig(
    vocab_size=VOCAB.size, llama=LlamaConfig(width=16, num_layers=1, num_heads=2, num_kv_heads=1, ffn_width=16)
)
NOISE = BoundaryNoise(seconds=(0.02, 0.04), frame_rate=25.0)
ENTROPY = EntropyPatcher(TINY.build(3), EntropyConfig(model="", threshold=3.8, max_patch_size=5))
CAUSAL: dict[str, Patcher] = {
    "none": NoPatcher(),
    **{f"static {p}": StaticPatcher(p) for p in (1, 2, 4, 7)},
    "entropy": ENTROPY,
}
ALIGNED = {
    f"aligned, {silence}, {units}": PatcherConfig(kind="aligned", silence=silence, units=units)
    for silence in ("separate", "merged")
    for units in ("words", "pieces")
}
NOT_CAUSAL: dict[str, Patcher] = {
    **{name: made.build() for name, made in ALIGNED.items()},
    **{f"{name}, noise": replace(made, boundary_noise=NOISE).build() for name, made in ALIGNED.items()},
    "mixed": PatcherConfig(kind="mixed").build(),
    **{
        name.replace("aligned", "curriculum"): replace(made, kind="curriculum", boundary_noise=NOISE).build()
        for name, made in ALIGNED.items()
    },
}
ALL = CAUSAL | NOT_CAUSAL
every = pytest.mark.parametrize("patcher", ALL.values(), ids=ALL)
every_causal = pytest.mark.parametrize("patcher", CAUSAL.values(), ids=CAUSAL)


def laid_out_speech(*spans_ends: list[int], id: str = "x") -> LaidOut:
    """One span of speech per list of `UnitEnd` codes, with a text token between them."""
    segments: list[Segment] = []
    for codes in spans_ends:
        n = len(codes)
        if segments:
            segments.append(Segment(modality="text", ids_T=np.array([1])))
        segments.append(
            Segment(
                modality="speech",
                ids_T=np.arange(n) * 5 % VOCAB.num_speech,
                unit_end_T=np.array(codes, dtype=np.uint8),
            )
        )
    return VOCAB.lay_out(Document(id=id, segments=tuple(segments), source="test"))


def random_codes(seed: int) -> LaidOut:
    """A random document with codes of every sort in any order, more than a sane aligner makes."""
    rng = np.random.default_rng(seed)
    laid_out = random_laid_out(seed)
    codes_T = rng.choice(list(UnitEnd), len(laid_out.ids_T), p=[0.6, 0.15, 0.15, 0.1]).astype(np.uint8)
    return replace(laid_out, unit_end_T=np.where(laid_out.is_speech_T, codes_T, 0).astype(np.uint8))


def patch_sizes(patcher: Patcher, laid_out: LaidOut, draw: float = 0.0, progress: float = 0.0) -> list[list[int]]:
    """Sizes of the patches of each span of speech that is not empty."""
    opens_T, _ = patcher(laid_out, draw, progress)
    sizes: list[list[int]] = []
    before = False
    for opens, is_speech in zip(opens_T.tolist(), laid_out.is_speech_T.tolist()):
        if is_speech and not before:
            sizes.append([])
        if is_speech:
            sizes[-1] = [*sizes[-1], 1] if opens else [*sizes[-1][:-1], sizes[-1][-1] + 1]
        before = is_speech
    return sizes


def span_of_11() -> LaidOut:
    """Spec 2, section 5: `BOS <t> a b <s> s0..s10 <t> c EOS`; word 1 = [2, 4], word 2 = [6, 9] = pieces [6, 7], [8, 9]."""
    ends_T = np.zeros(11, dtype=np.uint8)
    ends_T[[1, 5, 10]], ends_T[[4, 9]], ends_T[7] = UnitEnd.SILENCE, UnitEnd.WORD, UnitEnd.PIECE
    segments = (
        Segment(modality="text", ids_T=np.array([0, 1])),
        Segment(modality="speech", ids_T=np.arange(11), unit_end_T=ends_T),
        Segment(modality="text", ids_T=np.array([2])),
    )
    return VOCAB.lay_out(Document(id="spec", segments=segments, source="spec"))


@pytest.mark.parametrize(
    ("made", "starts"),
    [
        (PatcherConfig(kind="none"), list(range(11))),
        (PatcherConfig(kind="static", patch_size=4), [0, 4, 8]),
        (PatcherConfig(kind="aligned"), [0, 2, 5, 6, 10]),
        (PatcherConfig(kind="aligned", silence="merged"), [0, 6]),
        (PatcherConfig(kind="aligned", units="pieces"), [0, 2, 5, 6, 8, 10]),
        (PatcherConfig(kind="aligned", units="pieces", silence="merged"), [0, 6, 8]),
    ],
)
def test_worked_example_of_the_spec(made: PatcherConfig, starts: list[int]) -> None:
    opens_T, closes_T = made.build()(span_of_11(), 0.0)
    assert (np.flatnonzero(opens_T[5:16])).tolist() == starts
    assert opens_T.sum() == 8 + len(starts)
    assert len(opens_T) == 19
    if made.kind == "aligned":  # the last token of every patch closes it, that of the span too
        assert (np.flatnonzero(closes_T[5:16])).tolist() == [start - 1 for start in starts[1:]] + [10]


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
    laid_out = laid_out_speech([0, UnitEnd.WORD, 0, 0])
    opens_T, closes_T = AlignedPatcher()(laid_out, 0.0)
    assert opens_T.tolist() == [True, True, True, False, True, False, True]
    assert closes_T.tolist() == [True, True, False, True, False, False, True]


@st.composite
def spoken(draw: st.DrawFn) -> tuple[list[int], list[tuple[str, list[int]]]]:
    """A span as an aligner gives it: codes, and its units: ("silence", [n]) or ("word", sizes of its pieces)."""
    units: list[tuple[str, list[int]]] = []
    for _ in range(draw(st.integers(1, 5))):
        if draw(st.booleans()) and (not units or units[-1][0] == "word"):
            units.append(("silence", [draw(st.integers(1, 4))]))
        else:
            units.append(("word", draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))))
    codes: list[int] = []
    for kind, sizes in units:
        for size in sizes:
            codes += [UnitEnd.NONE] * (size - 1) + [UnitEnd.PIECE]
        codes[-1] = UnitEnd.WORD if kind == "word" else UnitEnd.SILENCE
    return codes, units


def expected_sizes(units: list[tuple[str, list[int]]], silence: str, pieces: bool) -> list[int]:
    """Sizes of the patches, put together unit by unit."""
    found: list[int] = []
    leading = 0
    for kind, sizes in units:
        if kind == "word":
            parts = sizes if pieces else [sum(sizes)]
            found += [leading + parts[0], *parts[1:]]
            leading = 0
        elif silence == "separate":
            found += sizes
        elif found:
            found[-1] += sizes[0]
        else:
            leading = sizes[0]
    return found + [leading] * (leading > 0)


@pytest.mark.parametrize(("name", "made"), ALIGNED.items(), ids=ALIGNED)
@settings(max_examples=40, deadline=None)
@given(spans=st.lists(spoken(), min_size=1, max_size=3))
def test_aligned_patches_are_the_units_of_the_speech(name: str, made: PatcherConfig, spans: list) -> None:
    laid_out = laid_out_speech(*(codes for codes, _ in spans))
    patcher = made.build()
    expected = [expected_sizes(units, made.silence, made.units == "pieces") for _, units in spans]
    assert patch_sizes(patcher, laid_out) == expected
    opens_T, closes_T = patcher(laid_out, 0.0)
    np.testing.assert_array_equal(closes_T[:-1], opens_T[1:])  # word ends are known: nothing stays open


@every
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), draw=st.floats(0, 0.999), progress=st.floats(0, 1))
def test_the_two_booleans(patcher: Patcher, seed: int, draw: float, progress: float) -> None:
    laid_out = random_codes(seed)
    opens_T, closes_T = patcher(laid_out, draw, progress)
    text_T = ~laid_out.is_speech_T
    assert opens_T.dtype == closes_T.dtype == bool
    assert opens_T[text_T].all()
    assert closes_T[text_T].all()
    assert not (closes_T[:-1] & ~opens_T[1:]).any(), "a closed unit goes on"
    after_text_T = np.append(False, text_T[:-1])
    assert opens_T[after_text_T].all(), "a unit crosses a span"
    again_opens_T, again_closes_T = patcher(laid_out, draw, progress)
    np.testing.assert_array_equal(opens_T, again_opens_T)
    np.testing.assert_array_equal(closes_T, again_closes_T)


def check_step(patcher: Patcher, laid_out: LaidOut) -> None:
    opens_T, closes_T = patcher(laid_out, 0.0)
    state = patcher.init_state()
    for t, (i, is_speech) in enumerate(zip(laid_out.ids_T.tolist(), laid_out.is_speech_T.tolist())):
        opens, closes, state = patcher.step(i, is_speech, state)
        assert (opens, closes) == (opens_T[t], closes_T[t]), t


@every_causal
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_step_equals_call(patcher: Patcher, seed: int) -> None:
    check_step(patcher, random_laid_out(seed))


@every_causal
def test_step_equals_call_for_spans_of_every_length(patcher: Patcher) -> None:
    check_step(patcher, laid_out_speech(*([0] * n for n in range(18))))


@every_causal
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_what_follows_changes_nothing(patcher: Patcher, seed: int) -> None:
    """The closure-leak rule: whether `<t>`, EOS or more speech follows, the booleans so far stay what they are."""
    laid_out = random_laid_out(seed)
    whole = patcher(laid_out, 0.0)
    rng = np.random.default_rng(seed)
    for t in range(len(laid_out.ids_T)):
        ids_T = laid_out.ids_T.copy()
        ids_T[t + 1 :] = rng.integers(0, VOCAB.speech_start + VOCAB.num_speech, len(ids_T) - t - 1)
        for before, after in zip(whole, patcher(with_ids(laid_out, ids_T), 0.0)):
            np.testing.assert_array_equal(before[: t + 1], after[: t + 1])


@every_causal
def test_a_document_without_word_ends_is_fine_where_none_are_needed(patcher: Patcher) -> None:
    laid_out = laid_out_speech([0] * 9)
    for with_ends, without in zip(patcher(laid_out, 0.0), patcher(replace(laid_out, unit_end_T=None), 0.0)):
        np.testing.assert_array_equal(with_ends, without)


@pytest.mark.parametrize("seconds", [(0.0, 0.0), (0.02, 0.04), (0.04, 0.04), (0.1, 0.5)])
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), draw=st.floats(0, 0.999))
def test_noise_moves_boundaries_a_little(seconds: tuple[float, float], seed: int, draw: float) -> None:
    """As many patches as before in each span, in order, none moved by more than the largest move, rounded up."""
    laid_out = random_codes(seed)
    noisy = AlignedPatcher(noise=BoundaryNoise(seconds=seconds, frame_rate=25.0))
    before, after = patch_sizes(AlignedPatcher(), laid_out), patch_sizes(noisy, laid_out, draw)
    assert [len(x) for x in before] == [len(x) for x in after]
    for x, y in zip(before, after):
        assert min(y) >= 1
        assert sum(y) == sum(x)
        assert np.abs(np.cumsum(y) - np.cumsum(x)).max() <= np.ceil(seconds[1] * 25.0)
    for patcher in (AlignedPatcher(), noisy):  # the end of a span is known, or not known, as before
        closes_T = patcher(laid_out, draw)[1]
        last_T = laid_out.is_speech_T & ~np.append(laid_out.is_speech_T[1:], False)
        np.testing.assert_array_equal(closes_T[last_T], laid_out.unit_end_T[last_T] % UnitEnd.PIECE > 0)


def test_noise_has_the_size_that_was_asked_for() -> None:
    """Far-apart boundaries: the mean move is the middle of the range, both ways alike, and below one token too."""
    laid_out = laid_out_speech(([0] * 19 + [UnitEnd.WORD]) * 400)
    for seconds, expected in (((0.02, 0.04), 0.75), ((0.04, 0.08), 1.5), ((0.01, 0.01), 0.25)):
        noisy = AlignedPatcher(noise=BoundaryNoise(seconds=seconds, frame_rate=25.0))
        moves = np.cumsum(patch_sizes(noisy, laid_out, 0.123)[0])[:-1] - np.arange(20, 8000, 20)
        assert np.abs(moves).mean() == pytest.approx(expected, abs=0.1)
        assert abs(moves.mean()) < 0.2
    first, second = (patch_sizes(noisy, laid_out, draw) for draw in (0.3, 0.3 + 1e-12))
    assert first != second  # neighbouring draws share nothing


CURRICULUM = PatcherConfig(kind="curriculum")


def share_aligned(patcher: Patcher, laid_out: LaidOut, draws: np.ndarray, progress: float) -> float:
    """How often the patches are the aligned ones; each call must give one of the two."""
    aligned, static = (patch_sizes(p, laid_out) for p in (AlignedPatcher(), StaticPatcher(4)))
    found = [patch_sizes(patcher, laid_out, float(draw), progress) for draw in draws]
    assert all(x in (aligned, static) for x in found)
    return float(np.mean([x == aligned for x in found]))


@pytest.mark.parametrize("progress", [0.0, 0.2, 1 / 3, 0.4, 0.5, 0.6, 2 / 3, 0.8, 1.0])
def test_curriculum_follows_the_papers_probability(progress: float) -> None:
    """P(u) = 1 before tau1, 1 - (u - tau1) / (tau2 - tau1) up to tau2, 0 from there on (spec 2, 5)."""
    draws = np.random.default_rng(0).random(600)
    expected = np.clip(1 - (progress - 1 / 3) * 3, 0, 1)
    found = share_aligned(CURRICULUM.build(), span_of_11(), draws, progress)
    assert found == pytest.approx(expected, abs=0 if expected in (0, 1) else 0.06)


def test_mixed_does_not_depend_on_progress() -> None:
    draws = np.random.default_rng(0).random(600)
    for probability in (0.0, 0.5, 0.8, 1.0):
        made = PatcherConfig(kind="mixed", aligned_probability=probability).build()
        shares = [share_aligned(made, span_of_11(), draws, progress) for progress in (0.0, 1.0)]
        assert shares[0] == shares[1] == pytest.approx(probability, abs=0.06)


def test_curriculum_may_switch_at_once() -> None:
    sharp = PatcherConfig(kind="curriculum", tau1=0.5, tau2=0.5).build()
    assert isinstance(sharp, CurriculumPatcher)
    assert [sharp.aligned_probability(u) for u in (0.0, 0.49, 0.5, 1.0)] == [1, 1, 0, 0]
    never = PatcherConfig(kind="curriculum", tau1=0.0, tau2=0.0).build()
    assert patch_sizes(never, span_of_11(), 0.0, 0.0) == [[4, 4, 3]]


def test_every_aligned_variant_has_a_curriculum() -> None:
    for made in ALIGNED.values():
        curriculum = replace(made, kind="curriculum").build()
        assert patch_sizes(curriculum, span_of_11()) == patch_sizes(made.build(), span_of_11())
        assert patch_sizes(curriculum, span_of_11(), 0.0, 1.0) == [[4, 4, 3]]


def test_errors_say_what_to_do() -> None:
    segment = Segment(modality="speech", ids_T=np.arange(3))
    unaligned = Vocab(num_text=4, num_speech=4).lay_out(Document(id="doc7", segments=(segment,), source="mls"))
    for patcher in (AlignedPatcher(), CURRICULUM.build()):
        with pytest.raises(ValueError, match=r"doc7.*mls.*unit_end_T.*static"):
            patcher(unaligned, 0.0)
    for patcher in NOT_CAUSAL.values():
        assert not patcher.causal
        with pytest.raises(ValueError, match="eval_patcher"):
            patcher.init_state()
        with pytest.raises(ValueError, match="eval_patcher"):
            patcher.step(1, True, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "curriculum", "tau1": 0.9}, "tau1"),
        ({"kind": "static", "patch_size": 0}, "at least 1"),
        ({"kind": "mixed", "aligned_probability": 1.5}, r"aligned_probability=1\.5"),
        ({"kind": "static", "boundary_noise": {"seconds": [0.02, 0.04], "frame_rate": 25}}, "kind='static' has none"),
        ({"kind": "aligned", "boundary_noise": {"seconds": [0.04, 0.02], "frame_rate": 25}}, "least <= largest"),
        ({"kind": "aligned", "boundary_noise": {"seconds": [0.02, 0.04], "frame_rate": 0}}, "frame_rate=0"),
        ({"kind": "entropy"}, "give the entropy model"),
        ({"kind": "none", "entropy": {"model": "m", "threshold": 1, "max_patch_size": 4}}, "only with it"),
        ({"kind": "aligned", "silence": "join"}, "silence='join'"),
    ],
)
def test_bad_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.from_dict(PatcherConfig, settings).build()


def test_config_builds_every_kind_and_what_to_test_with() -> None:
    aligned = AlignedPatcher(silence="merged", units="pieces", noise=NOISE)
    changes = {"silence": "merged", "units": "pieces", "boundary_noise": NOISE, "patch_size": 2}
    expected = {
        "aligned": aligned,
        "mixed": MixedPatcher(aligned=aligned, static=StaticPatcher(2), aligned_probability=0.5),
        "curriculum": CurriculumPatcher(aligned=aligned, static=StaticPatcher(2), tau1=1 / 3, tau2=2 / 3),
    }
    for kind, patcher in expected.items():
        made = config.from_dict(PatcherConfig, config.to_dict(PatcherConfig(kind=kind, **changes)))
        assert made.build() == patcher
        test_with = eval_patcher(made)
        assert test_with == (replace(aligned, noise=None) if kind == "aligned" else StaticPatcher(2))
    for made in (PatcherConfig(kind="none"), PatcherConfig(kind="static", patch_size=3)):
        assert eval_patcher(made) == made.build()
    assert {type(PatcherConfig(kind=k).build()) for k in ("none", "static")} == {NoPatcher, StaticPatcher}


def test_patch_ends_differ_between_kinds() -> None:
    """The parametrised kinds are really different patchers."""
    sizes = [patch_sizes(p, span_of_11(), 0.7, 0.5) for p in (StaticPatcher(4), *NOT_CAUSAL.values())]
    assert len({str(x) for x in sizes}) >= 6
    assert all(a == b for a, b in pairwise([sum(x[0]) for x in sizes]))
