"""Which pairs are kept."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sera_plugin.algorithm.selection import select_largest

MARGINS = st.lists(st.floats(-50, 50), min_size=1, max_size=40)


def kept(margins, count):
    return np.flatnonzero(select_largest(margins, count)).tolist()


def test_the_largest_margins_are_kept_even_negative_ones():
    assert kept([0.5, -1.0, 2.0, -0.2], 3) == [0, 2, 3]


def test_ties_are_kept_in_row_order():
    assert kept([1.0, 2.0, 1.0, 1.0], 2) == [0, 1]


@pytest.mark.parametrize(("count", "rows"), [(0, []), (2, [0, 1]), (9, [0, 1])])
def test_none_all_and_more_than_all(count, rows):
    assert kept([1.0, 2.0], count) == rows


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_a_margin_that_is_not_finite_is_named(broken):
    with pytest.raises(ValueError, match="row 2 is"):
        select_largest([1.0, 2.0, broken, broken], 1)


@given(MARGINS, st.data())
def test_selected_margins_do_not_depend_on_the_order(margins, data):
    count = data.draw(st.integers(0, len(margins)))
    shuffled = data.draw(st.permutations(margins))
    one = np.asarray(margins)[select_largest(margins, count)]
    other = np.asarray(shuffled)[select_largest(shuffled, count)]
    assert sorted(one) == sorted(other)


@given(MARGINS, st.data())
def test_a_larger_ratio_keeps_a_superset(margins, data):
    few = data.draw(st.integers(0, len(margins)))
    many = data.draw(st.integers(few, len(margins)))
    assert not (select_largest(margins, few) & ~select_largest(margins, many)).any()


@given(MARGINS, st.data())
def test_no_dropped_margin_beats_a_kept_one(margins, data):
    count = data.draw(st.integers(1, len(margins)))
    selected = select_largest(margins, count)
    assert selected.sum() == count
    if count < len(margins):
        assert np.asarray(margins)[selected].min() >= np.asarray(margins)[~selected].max()


def test_several_broken_margins_are_counted():
    with pytest.raises(ValueError, match=r"row 1 is inf \(2 such rows\).*learning_rate"):
        select_largest([0.0, np.inf, np.nan], 1)


def test_nothing_to_select_from():
    assert select_largest([], 3).shape == (0,)


@given(st.lists(st.floats(-50, 50), max_size=40, unique=True), st.data())
def test_distinct_margins_keep_the_same_rows_in_any_order(margins, data):
    count = data.draw(st.integers(0, 45))
    order = data.draw(st.permutations(range(len(margins))))
    moved = kept([margins[i] for i in order], count)
    assert sorted(order[i] for i in moved) == kept(margins, count)
