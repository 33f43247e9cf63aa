"""Label noise on purpose: the paper's robustness experiment on anyone's data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sera_plugin.algorithm.dataset_scores import by_side


def swapped_rows(total: int, share: float, seed: int) -> npt.NDArray[np.bool_]:
    """(N,) bool: round(share N) rows at random, the same for the same seed."""
    swapped = np.zeros(total, dtype=bool)
    order = np.random.default_rng((seed, total)).permutation(total)
    swapped[order[: round(share * total)]] = True
    return swapped


def swap(
    columns: Mapping[str, Sequence[Any]], swapped: npt.NDArray[np.bool_]
) -> dict[str, Sequence[Any]]:
    """The columns with what belongs to an answer following it to the other side.

    Args:
        columns: (N,) each; two whose names differ in `chosen` and `rejected` are of two answers.
        swapped: (N,) which rows had their answers swapped.
    """
    found = dict(columns)
    rows = np.flatnonzero(swapped).tolist()
    for chosen, rejected in by_side(list(columns)).items():
        one, other = list(columns[chosen]), list(columns[rejected])
        for row in rows:
            one[row], other[row] = other[row], one[row]
        found[chosen], found[rejected] = one, other
    return found
