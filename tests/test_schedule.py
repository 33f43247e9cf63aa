"""Steps of epochs of unequal length."""

from __future__ import annotations

import pytest

from sera_plugin.algorithm.schedule import Schedule


@pytest.mark.parametrize(
    ("pairs", "steps"),
    [
        # 10 in micro-batches of 2, two a step: ceil(5 / 2) = 3 steps.
        ((10, 10, 10), (3, 3, 3)),
        ((10, 7, 7), (3, 2, 2)),
        ((10, 27, 27), (3, 7, 7)),
    ],
)
def test_iterations_have_their_own_length(pairs, steps):
    schedule = Schedule(pairs, batch_size=2, accumulation=2)
    assert tuple(schedule.steps(t) for t in (1, 2, 3)) == steps
    assert schedule.total_steps == sum(steps)


def test_drop_last_drops_the_incomplete_micro_batch():
    schedule = Schedule((7,), batch_size=2, accumulation=2, drop_last=True)
    assert (schedule.batches(1), schedule.steps(1)) == (3, 2)


def test_every_global_step_is_located():
    schedule = Schedule((10, 7, 27), batch_size=2, accumulation=2)
    expected = [(t, s) for t in (1, 2, 3) for s in range(schedule.steps(t))] + [(4, 0)]
    assert [schedule.locate(step) for step in range(schedule.total_steps + 1)] == expected


def test_fewer_pairs_than_planned_change_only_their_iteration():
    schedule = Schedule((10, 10, 10), batch_size=2, accumulation=1).with_pairs(2, 8)
    assert schedule.pairs == (10, 8, 10)
    assert schedule.total_steps == 14


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


def test_with_pairs_leaves_the_planned_schedule_alone():
    planned = Schedule((10, 10, 10), batch_size=2, accumulation=2, drop_last=True)
    known = planned.with_pairs(3, 8)
    assert planned.pairs == (10, 10, 10)
    assert (known.batch_size, known.accumulation, known.drop_last) == (2, 2, True)
