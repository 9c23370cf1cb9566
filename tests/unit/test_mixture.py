"""The mixture: exact weights by tokens, every document once per epoch, exact resume."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechquilt.data.mixture import Mixture, MixtureConfig, num_laid_out
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
