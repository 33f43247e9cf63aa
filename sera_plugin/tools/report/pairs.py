"""Pairs of a run one by one: what every table says of a pair, with its answers as token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sera_plugin.tools.report.data import SIDES, Iteration, Run


@dataclass(frozen=True)
class Pair:
    """A pair of one iteration, offline or sampled.

    Attributes:
        row: of the dataset; of a sampled pair its prompt's.
        margins: by iteration, where it has one.
        kept: whether the iteration trains on it.
        ids: token ids of `prompt`, `chosen`, `rejected`; empty where they cannot be read.
        facts: what is special about it: of an offline pair the dataset's own columns.
    """

    row: int
    margins: Mapping[int, float]
    kept: bool
    ids: Mapping[str, Sequence[int]]
    facts: Mapping[str, Any]


def offline_pair(run: Run, one: Iteration, row: int) -> Pair:
    """A pair of the dataset, and what each policy up to the newest thought of it."""
    assert one.selected is not None
    return Pair(
        row,
        {
            each.number: float(each.margin[row])
            for each in run.iterations
            if each.margin is not None
        },
        bool(one.selected[row]),
        {name: run.tokens[f"{name}_ids"][row] for name in ("prompt", *SIDES)} if run.tokens else {},
        {name: values[row] for name, values in run.scores.items()},
    )


def swapped(run: Run, row: int) -> dict[str, str]:
    """Says of a pair whose label was swapped on purpose that it was."""
    return {"label": "swapped on purpose"} if run.swapped is not None and run.swapped[row] else {}


def sampled_pair(run: Run, one: Iteration, index: int) -> Pair:
    """A bootstrapped pair, by its place in bootstrapped.parquet."""
    pairs, candidates = one.bootstrapped, one.candidates
    assert pairs is not None
    assert candidates is not None
    assert run.tokens is not None
    row, at = int(pairs["row"][index]), {side: int(one.sampled[side][index]) for side in SIDES}
    facts = {
        "cut at the longest length": [side for side in SIDES if candidates.unfinished[at[side]]],
        "the dataset's": [side for side in SIDES if candidates.from_dataset[at[side]]],
    }
    return Pair(
        row,
        {one.number: float(pairs["margin"][index])},
        bool(pairs["selected"][index]),
        {"prompt": run.tokens["prompt_ids"][row]}
        | {side: candidates.tokens[at[side]] for side in SIDES},
        {name: " and ".join(sides) for name, sides in facts.items() if sides},
    )


def mislabelled(run: Run, most: int) -> tuple[Iteration, npt.NDArray[np.intp]]:
    """The newest iteration with margins, and its rows of negative margin, lowest first.

    Raises:
        ValueError: if no iteration has margins yet.
    """
    for one in reversed(run.iterations):
        if one.margin is not None:
            order = np.argsort(one.margin, kind="stable")
            return one, order[one.margin[order] < 0][:most]
    raise ValueError(
        f"{run.root} has no margins yet: they exist from iteration 2 on, once its offline pairs "
        "are scored."
    )
