"""Packing a mixture whose sources leave: to its end, told once, resumed bit for bit."""

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechquilt.data.feed.mixture import Exhausted, Mixture
from speechquilt.data.feed.pack import PackedLoader
from speechquilt.types import Batch
from tests.unit.test_pack import CONFIG, SOURCES, VOCAB, Chunks, same


def bounded(rank: int = 0, world_size: int = 1) -> PackedLoader:
    """Source a leaves first, then b."""
    mixture = Mixture(SOURCES, {"a": 1.0, "b": 1.0}, max_epochs={"a": 2.0, "b": 4.0})
    return PackedLoader(mixture, VOCAB, Chunks(4), CONFIG, 0, 50, rank, world_size)


def keep_packing(made: PackedLoader, batches: list[Batch]) -> None:
    while len(batches) < 1000:
        batches.append(made.next_batch().validate())


def test_a_bounded_mixture_is_packed_to_its_end(recwarn):
    """Valid batches until less than one is left; nothing twice, and every source's departure is told once."""
    made, batches = bounded(), []
    with pytest.raises(Exhausted, match=r"batch \d+ of 50 cannot be filled: every source has given its max_epochs"):
        keep_packing(made, batches)
    seen, epochs = Counter(), Counter()
    for batch in batches:
        seen.update(id for ids in batch.meta["document_ids"] for id in ids)
        epochs.update(batch.meta["epochs"])
    assert [str(w.message).split("'")[1] for w in recwarn] == ["a", "b"]
    left = Counter(item.laid_out.id for item in made._buffer)
    assert sum(item.num_units for item in made._buffer) < CONFIG.rows * CONFIG.units_per_row
    assert seen + left == {d.id: bound for name, bound in (("a", 2), ("b", 4)) for d in SOURCES[name]}
    for name, bound in (("a", 2), ("b", 4)):
        unused = sum(item.sample.source == name for item in made._buffer) / len(SOURCES[name])
        assert epochs[name] == pytest.approx(bound - unused)


def test_only_one_rank_tells_that_a_source_left(recwarn):
    second = bounded(rank=1, world_size=2)
    while not second.mixture.left:
        second.next_batch()
    assert not recwarn


@settings(max_examples=10, deadline=None)
@given(before=st.integers(0, 12))
@pytest.mark.filterwarnings("ignore:source")
def test_resume_is_bit_identical_where_a_source_leaves(before):
    made = bounded()
    for _ in range(before):
        made.next_batch()
    state = json.loads(json.dumps(made.state_dict()))
    expected = [made.next_batch() for _ in range(5)]
    again = bounded()
    again.load_state_dict(state)
    assert all(same(again.next_batch(), batch) for batch in expected)
