"""Length control: rewards less alpha nats per token, so that longer is not better by itself.

A summed implicit reward grows with length wherever a token's log-ratio is positive on average, and
a policy that ranks its own samples by it drifts towards long ones (DICE, Chen et al. 2024).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

#: Halvings of the interval that alpha is looked for in: to a millionth of its width.
_HALVINGS = 20


def regressed_alpha(rewards: npt.ArrayLike, lengths: npt.ArrayLike) -> float:
    """Slope of reward on length within groups, by least squares; 0 where no length differs.

    Args:
        rewards, lengths: (groups, members), nats and tokens. Rewards that are not finite are left
            out with their lengths.

    Returns:
        Nats per token.
    """
    reward, length = np.asarray(rewards, np.float64), np.asarray(lengths, np.float64)
    known = np.isfinite(reward)
    count = np.maximum(known.sum(axis=1, keepdims=True), 1)
    centred = [
        np.where(known, values - np.where(known, values, 0).sum(1, keepdims=True) / count, 0)
        for values in (np.where(known, reward, 0), length)
    ]
    variance = float((centred[1] ** 2).sum())
    return float((centred[0] * centred[1]).sum()) / variance if variance else 0.0


def equalizing_alpha(
    rewards: npt.ArrayLike, lengths: npt.ArrayLike, pair: Callable[[FloatArray], FloatArray]
) -> float:
    """The alpha with which chosen and rejected are equally long on average (DICE).

    The mean difference in length falls as alpha grows, so the interval in which it passes zero is
    halved, starting around the slope within prompts.

    Args:
        rewards, lengths: (prompts, R), nats and tokens.
        pair: given (prompts, R) controlled rewards, the (pairs,) differences in length, chosen less
            rejected.

    Returns:
        Nats per token: of those tried the one with the smallest mean difference, 0 among equals.
    """
    reward, length = np.asarray(rewards, np.float64), np.asarray(lengths, np.float64)

    def difference(alpha: float) -> float:
        found = pair(reward - alpha * length)
        return float(found.mean()) if len(found) else 0.0

    tried = {0.0: difference(0.0)}
    slope = regressed_alpha(reward, length)
    reach = 2 * abs(slope) or 1.0
    low, high = -reach, reach
    for bound in (low, high):
        tried[bound] = difference(bound)
    for _ in range(_HALVINGS):
        if tried[low] < 0:
            low *= 2
            tried[low] = difference(low)
        elif tried[high] > 0:
            high *= 2
            tried[high] = difference(high)
        else:
            break
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        tried[middle] = difference(middle)
        if tried[middle] > 0:
            low = middle
        else:
            high = middle
    return min(tried, key=lambda alpha: (abs(tried[alpha]), abs(alpha)))
