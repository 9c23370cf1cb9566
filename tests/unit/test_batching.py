"""Batches of known items: each item once, the longest first, never above the limits unless alone."""

from hypothesis import given
from hypothesis import strategies as st

from speechquilt.nn.batching import longest_first


@given(
    lengths=st.lists(st.integers(0, 50), max_size=40),
    budget=st.integers(1, 200),
    rows=st.one_of(st.none(), st.integers(1, 9)),
)
def test_batches_against_a_plain_loop(lengths, budget, rows):
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    expected: list[list[int]] = []
    for i in order:
        longest = lengths[expected[-1][0]] if expected else 0
        fits = expected and (len(expected[-1]) + 1) * longest <= budget and len(expected[-1]) != rows
        if fits:
            expected[-1].append(i)
        else:
            expected.append([i])
    options = {} if rows is None else {"rows": rows}
    assert list(longest_first(lengths, budget=budget, **options)) == expected


def test_without_a_budget_only_rows_count():
    assert list(longest_first([3, 9, 1, 9], rows=3)) == [[1, 3, 0], [2]]
    assert list(longest_first([], rows=3)) == []
