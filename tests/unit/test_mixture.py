"""The mixture: exact weights by tokens, every document once per epoch, bounds on epochs, exact resume."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechquilt.data.feed.mixture import Exhausted, Mixture, MixtureConfig, num_laid_out
from speechquilt.recipes.defaults import WEIGHTS
from speechquilt.recipes.mixtures import MIXTURES, shares, weights_of
from speechquilt.types import Document, Segment
from speechquilt.vocab import Vocab


def documents(source: str, count: int, low: int = 0, high: int = 40, seed: int = 0) -> list[Document]:
    rng = np.random.default_rng(seed)
    return [
        Document(
            id=f"{source}{i}",
            source=source,
            segments=(Segment(modality="text", ids_T=rng.integers(0, 9, rng.integers(low, high))),),
        )
        for i in range(count)
    ]


def sources(**counts: int) -> dict[str, list[Document]]:
    return {name: documents(name, count) for name, count in counts.items()}


def test_token_count_is_that_of_the_layout():
    speech = Segment(modality="speech", ids_T=np.arange(5))
    document = Document(id="x", source="a", segments=(*documents("a", 1)[0].segments, speech))
    assert num_laid_out(document) == len(Vocab(num_text=9, num_speech=5).lay_out(document).ids_T)


@settings(max_examples=30, deadline=None)
@given(
    counts=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.01, 10), min_size=4, max_size=4),
    draws=st.integers(1, 300),
)
def test_token_shares_are_right_to_within_a_document(counts, weights, draws):
    names = [f"s{k}" for k in range(len(counts))]
    mixture = Mixture(sources(**dict(zip(names, counts))), dict(zip(names, weights)), seed=1)
    for _ in range(draws):
        mixture.draw()
    total, longest = sum(mixture.tokens.values()), 42
    for name, weight in zip(names, weights):
        wanted = total * weight / sum(weights[: len(names)])
        assert abs(mixture.tokens[name] - wanted) <= longest * len(names)


def test_long_documents_do_not_get_more_tokens():
    mixture = Mixture(
        {"short": documents("short", 50, 4, 8), "long": documents("long", 50, 200, 400)}, {"short": 2, "long": 1}
    )
    drawn = Counter(mixture.draw()[0].source for _ in range(20000))
    assert drawn["short"] > 40 * drawn["long"]
    assert mixture.tokens["short"] / mixture.tokens["long"] == pytest.approx(2, abs=0.02)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 5))
def test_every_document_once_per_epoch(a, b, seed):
    mixture = Mixture(sources(a=a, b=b), {"a": 1, "b": 3}, seed=seed)
    seen: dict[tuple[str, int], list[int]] = {}
    for number in range(60):
        sample, document = mixture.draw()
        assert sample.number == number
        assert document.id == f"{sample.source}{sample.index}"
        assert document is mixture.document(sample)
        seen.setdefault((sample.source, sample.epoch), []).append(sample.index)
    for (source, epoch), indices in seen.items():
        size = len(mixture.sources[source])
        assert len(set(indices)) == len(indices)
        if (source, epoch + 1) in seen:
            assert sorted(indices) == list(range(size))
    for source, epochs in mixture.epochs.items():
        assert epochs == pytest.approx(
            sum(len(v) for (s, _), v in seen.items() if s == source) / len(mixture.sources[source])
        )


def test_orders_differ_by_epoch_source_and_seed():
    def order(name, epoch, seed):
        mixture = Mixture({name: documents(name, 30)}, {name: 1}, seed=seed)
        return tuple([mixture.draw()[0].index for _ in range(30 * (epoch + 1))][-30:])

    assert order("a", 0, 0) == order("a", 0, 0)
    assert len({order("a", 0, 0), order("a", 1, 0), order("b", 0, 0), order("a", 0, 1)}) == 4


def test_order_of_the_dicts_does_not_matter():
    first = Mixture(sources(a=5, b=5), {"a": 1, "b": 1})
    second = Mixture(sources(b=5, a=5), {"b": 1, "a": 1})
    assert [first.draw()[0] for _ in range(30)] == [second.draw()[0] for _ in range(30)]


@settings(max_examples=20, deadline=None)
@given(before=st.integers(0, 60), seed=st.integers(0, 3))
def test_resume_is_exact_also_across_epochs(before, seed):
    mixture = Mixture(sources(a=7, b=11), {"a": 2, "b": 1}, seed=seed)
    for _ in range(before):
        mixture.draw()
    state = json.loads(json.dumps(mixture.state_dict()))
    expected = [mixture.draw()[0] for _ in range(40)]
    again = Mixture(sources(a=7, b=11), {"a": 2, "b": 1}, seed=seed)
    again.load_state_dict(state)
    assert [again.draw()[0] for _ in range(40)] == expected
    assert again.state_dict() == mixture.state_dict()


@pytest.mark.parametrize(
    "other",
    [
        Mixture(sources(a=4), {"a": 1}, seed=1),
        Mixture(sources(a=5), {"a": 1}, seed=0),
        Mixture(sources(a=4, b=1), {"a": 1, "b": 1}, seed=0),
    ],
)
def test_a_foreign_state_is_refused(other):
    mixture = Mixture(sources(a=4), {"a": 1}, seed=0)
    with pytest.raises(ValueError, match="state was saved with"):
        mixture.load_state_dict(other.state_dict())


class Redrawn:
    def __len__(self):
        return 3

    def __getitem__(self, index):
        raise AssertionError("must be asked by epoch")

    def in_epoch(self, index, epoch):
        return Document(id=f"{index}@{epoch}", source="r", segments=())


def test_redrawn_sources_are_asked_by_epoch():
    mixture = Mixture({"r": Redrawn()}, {"r": 1})
    ids = [mixture.draw()[1].id for _ in range(9)]
    assert sorted(ids) == [f"{i}@{e}" for i in range(3) for e in range(3)]
    assert [id[-1] for id in ids] == list("000111222")


def test_bad_mixtures_are_refused():
    with pytest.raises(ValueError, match="source 'speech', the sources are a"):
        Mixture(sources(a=1), {"a": 1, "speech": 1})
    with pytest.raises(ValueError, match="source 'a' has no documents"):
        Mixture(sources(a=0), {"a": 1})
    for weights in ({"a": -1.0}, {"a": float("nan")}, {"a": float("inf")}):
        with pytest.raises(ValueError, match=r"weights\.a="):
            MixtureConfig(weights=weights)
    with pytest.raises(ValueError, match="nothing to mix"):
        MixtureConfig(weights={"a": 0})
    config = MixtureConfig(weights={"a": 1.0, "missing": 0.0}, seed=3)
    assert config.build(sources(a=2)).draw()[0].source == "a"


def draw_until(mixture: Mixture, num_left: int) -> list:
    """Samples until so many sources have left."""
    samples = []
    while len(mixture.left) < num_left:
        samples.append(mixture.draw()[0])
        assert len(samples) <= 1000
    return samples


@settings(max_examples=25, deadline=None)
@given(
    a=st.integers(1, 12), b=st.integers(1, 12), of_a=st.floats(0.1, 3), of_b=st.floats(0.1, 3), seed=st.integers(0, 3)
)
def test_bounded_sources_give_their_epochs_and_leave(a, b, of_a, of_b, seed):
    mixture = Mixture(sources(a=a, b=b), {"a": 1, "b": 2}, seed, max_epochs={"a": of_a, "b": of_b})
    drawn = Counter(sample.source for sample in draw_until(mixture, 2))
    assert drawn == {"a": max(1, round(of_a * a)), "b": max(1, round(of_b * b))}
    assert mixture.left == ("a", "b")
    state = mixture.state_dict()
    with pytest.raises(Exhausted, match=r"every source has given its max_epochs=.*raise or remove a bound"):
        mixture.draw()
    assert mixture.state_dict() == state


def test_the_others_go_on_by_their_weights():
    data = {name: documents(name, 60, 10, 30, seed) for seed, name in enumerate("abc")}
    mixture = Mixture(data, {"a": 1, "b": 2, "c": 1}, max_epochs={"a": 0.5})
    draw_until(mixture, 1)
    assert mixture.left == ("a",)
    before = mixture.tokens
    after = [mixture.draw()[0].source for _ in range(1000)]
    assert set(after) == {"b", "c"}
    gained = {name: n - before[name] for name, n in mixture.tokens.items()}
    assert gained["a"] == 0
    assert gained["b"] / gained["c"] == pytest.approx(2, abs=0.02)
    assert mixture.epochs["a"] == 0.5


def test_a_bound_changes_nothing_before_it_is_reached():
    free = Mixture(sources(a=20, b=20), {"a": 1, "b": 2}, seed=3)
    bound = Mixture(sources(a=20, b=20), {"a": 1, "b": 2}, seed=3, max_epochs={"a": 2})
    until = draw_until(bound, 1)
    assert len(until) > 40
    assert until == [free.draw()[0] for _ in until]


@settings(max_examples=20, deadline=None)
@given(before=st.integers(0, 60), seed=st.integers(0, 3))
def test_resume_is_exact_also_where_a_source_leaves(before, seed):
    def make():
        return Mixture(sources(a=7, b=11), {"a": 2, "b": 1}, seed=seed, max_epochs={"a": 1.5, "b": 5})

    mixture = make()
    for _ in range(before):
        mixture.draw()
    state = json.loads(json.dumps(mixture.state_dict()))
    again = make()
    draw_until(again, 2)  # a used mixture forgets what has left
    again.load_state_dict(state)
    assert again.left == mixture.left
    assert draw_until(again, 2) == draw_until(mixture, 2)


def test_other_bounds_are_another_stream():
    bounded = Mixture(sources(a=4), {"a": 1}, max_epochs={"a": 2})
    with pytest.raises(ValueError, match="max_epochs"):
        Mixture(sources(a=4), {"a": 1}).load_state_dict(bounded.state_dict())
    unbounded = Mixture(sources(a=4), {"a": 1}).state_dict()
    assert unbounded["made_for"].keys() == {"seed", "weights", "documents"}  # as before there were bounds


def test_bad_bounds_are_refused():
    with pytest.raises(ValueError, match=r"max_epochs names 'txt'; did you mean text"):
        MixtureConfig(weights={"text": 1}, max_epochs={"txt": 1})
    for epochs in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"max_epochs\.a="):
            MixtureConfig(weights={"a": 1}, max_epochs={"a": epochs})


def test_presets_hold_the_papers_numbers():
    """Spec synthetic-interleaved 6.1: the shares follow from the printed token counts; latent-speech-text 3.3: 1 to 2."""
    for mixture, epochs in (("interleaved_paper", (2.10, 2.07)), ("interleaved_paper_b", (1, 1))):
        speech, pairs = 31 * epochs[0], 14.5 * epochs[1]
        weights = MIXTURES[mixture]
        assert sum(weights.values()) == pytest.approx(1)
        assert weights["text"] == 0.30
        assert weights["speech"] == pytest.approx(speech / 1000, abs=0.001)
        assert weights["asr"] + weights["tts"] == pytest.approx(pairs / 1000, abs=0.001)
    assert MIXTURES["lst_paper"]["parallel"] / MIXTURES["lst_paper"]["text"] == pytest.approx(0.5)


def test_a_preset_weighs_the_sources_that_are_there():
    found = weights_of("interleaved_paper", WEIGHTS, ["text", "interleaved"])
    assert found == {"text": 0.30, "interleaved": 0.605}
    assert shares(found) == "interleaved 66.9%, text 33.1%"
    assert weights_of("", {"text": 9.0}, ["text", "mine"]) == {"text": 9.0, "mine": 1.0}
    with pytest.raises(ValueError, match=r"no share for the source 'mine', only for text, parallel"):
        weights_of("lst_paper", WEIGHTS, ["text", "mine"])
    with pytest.raises(ValueError, match="did you mean lst_paper"):
        weights_of("lst_papr", WEIGHTS, ["text"])


def test_shares_that_would_be_ignored_are_refused():
    with pytest.raises(ValueError, match=r"mixture='lst_paper' and weights=\{'text': 9\.0\} both say the shares"):
        weights_of("lst_paper", {"text": 9.0}, ["text"])
    with pytest.raises(ValueError, match=r"weights names 'speach'.* did you mean speech"):
        weights_of("", {"text": 0.3, "speach": 0.7}, ["text", "speech"])
    assert weights_of("", WEIGHTS, ["text"]) == {"text": WEIGHTS["text"]}
