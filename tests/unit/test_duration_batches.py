"""What an epoch holds: exact shares, and every row of every source equally often over the epochs."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from speechquilt.data.feed.duration_batches import epoch_rows

SOURCES = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 6)), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(sources=SOURCES, epochs=st.integers(1, 4), seed=st.integers(0, 99))
def test_shares_are_exact_and_no_row_comes_twice_before_all_have_come(sources, epochs, seed):
    num_rows, ratio = zip(*sources)
    shown = [epoch_rows(num_rows, ratio, seed, epoch) for epoch in range(epochs)]
    ends = np.cumsum(num_rows)
    for rows_N in shown:
        count_S = np.bincount(np.searchsorted(ends, rows_N, side="right"), minlength=len(num_rows))
        assert (count_S * sum(ratio) == len(rows_N) * np.array(ratio)).all()
        assert (count_S >= num_rows).all()
    for times_N in np.split(np.bincount(np.concatenate(shown), minlength=ends[-1]), ends[:-1]):
        assert times_N.max() - times_N.min() <= 1


@given(num_rows=st.integers(1, 20), ratio=st.integers(1, 5), epoch=st.integers(0, 5))
def test_one_source_alone_comes_exactly_once(num_rows, ratio, epoch):
    assert epoch_rows([num_rows], [ratio], 0, epoch).tolist() == list(range(num_rows))
