"""Which pairs to keep: those with the largest implicit-reward margin."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def select_largest(margins: npt.ArrayLike, count: int) -> npt.NDArray[np.bool_]:
    """Mark the `count` pairs with the largest margin (paper Algorithm 1, lines 5 and 8).

    Margins may be negative: a pair on which the policy disagrees with its label least is still
    kept when the ratio asks for it. Equal margins are kept in row order.

    Args:
        margins: (n,) margins in nats.
        count: how many to keep; more than n keeps all.

    Returns:
        (n,) bool, True where kept.

    Raises:
        ValueError: naming the first row whose margin is not finite.
    """
    values = np.asarray(margins, dtype=np.float64)
    broken = np.flatnonzero(~np.isfinite(values))
    if broken.size:
        raise ValueError(
            f"the margin of row {broken[0]} is {values[broken[0]]} ({broken.size} such rows): the "
            "policy's log-probabilities are not finite. Lower learning_rate, or train with "
            "bf16 or float32 instead of fp16."
        )
    selected = np.zeros(len(values), dtype=bool)
    selected[np.argsort(-values, kind="stable")[:count]] = True
    return selected
