"""Steps of epochs of unequal length."""

from __future__ import annotations

import pytest

from sera_plugin.algorithm.method import Schedule


def walk(pairs, batch_size, accumulation, drop_last):
    """Optimizer steps as a data loader and an accumulating loop make them, one by one."""
    batches = []
    for _ in range(pairs):
        if not batches or batches[-1] == batch_size:
            batches.append(0)
        batches[-1] += 1
    if drop_last and batches and batches[-1] < batch_size:
        batches.pop()
    return len([i for i in range(len(batches)) if i % accumulation == 0])


@pytest.mark.parametrize("later", [10, 7, 27])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 16])
@pytest.mark.parametrize("accumulation", [1, 2, 3, 4])
@pytest.mark.parametrize("drop_last", [False, True])
def test_steps_and_places_equal_a_walk(later, batch_size, accumulation, drop_last):
    schedule = Schedule((10, later, later), batch_size, accumulation, drop_last)
    expected = [walk(n, batch_size, accumulation, drop_last) for n in schedule.pairs]
    assert [schedule.steps(t) for t in (1, 2, 3)] == expected
    assert schedule.total_steps == sum(expected)
    places = [(t, made) for t, steps in enumerate(expected, 1) for made in range(steps)]
    located = [schedule.locate(step) for step in range(schedule.total_steps + 1)]
    assert located == [*places, (4, 0)]


def test_fewer_pairs_than_planned_change_only_their_iteration():
    planned = Schedule((10, 10, 10), batch_size=2, accumulation=1, drop_last=True)
    known = planned.with_pairs(2, 7)
    assert known == Schedule((10, 7, 10), 2, 1, True)
    assert (known.batches(2), known.total_steps) == (3, 13)
    assert planned.pairs == (10, 10, 10)
