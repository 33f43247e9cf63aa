"""Label noise on purpose: the paper's robustness experiment on anyone's data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sera_plugin.facts import by_side


def swapped_rows(total: int, share: float, seed: int) -> npt.NDArray[np.bool_]:
    """(N,) bool: round(share N) rows at random, the same for the same seed."""
    swapped = np.zeros(total, dtype=bool)
    order = np.random.default_rng((seed, total)).permutation(total)
    swapped[order[: round(share * total)]] = True
    return swapped


def swap(
    columns: Mapping[str, Sequence[Any]], swapped: npt.NDArray[np.bool_]
) -> dict[str, list[Any]]:
    """The columns with what belongs to an answer following it to the other side.

    Args:
        columns: (N,) each.
        swapped: (N,) which rows had their answers swapped.
    """
    found = {name: list(values) for name, values in columns.items()}
    for chosen, rejected in by_side(list(columns)).items():
        for row in np.flatnonzero(swapped).tolist():
            one, other = found[chosen][row], found[rejected][row]
            found[chosen][row], found[rejected][row] = other, one
    return found
