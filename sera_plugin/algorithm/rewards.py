"""Implicit rewards, and length control of rewards: pure functions of arrays.

With `log pi(y|x)` summed over the completion's tokens, in nats, iteration t's reward (Eq. 7) is

    t = 2 or gamma = 0:  r_t = log pi_{t-1} - log pi_{t-2}
    t >= 3:              r_t = (1 - gamma) [log pi_{t-1} - log pi_{t-2}]
                               + gamma     [log pi_{t-2} - log pi_{t-3}]

without beta, which scales every margin alike: one row of weights says all of it. A reference-free
loss (SimPO, Eq. 17; ORPO) has `r = log pi / |y|` and the same ensemble.

A summed reward grows with length wherever a token's log-ratio is positive on average, and a policy
that ranks its own samples by it drifts towards long ones (DICE, Chen et al. 2024). Length control
takes alpha nats per token off.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

#: Halvings of the interval that alpha is looked for in: to a millionth of its width.
_HALVINGS = 20


def reward_weights(iteration: int, gamma: float, reference_free: bool) -> tuple[float, ...]:
    """Weights of log pi_{t-1}, log pi_{t-2}, ... in iteration t's reward, t >= 2 (Eq. 7, Eq. 17).

    `gamma` is the weight of the previous reward in the ensemble, 0 to 1.
    """
    if iteration < 2:
        raise ValueError(f"iteration {iteration} has no implicit reward; selection starts at 2")
    ensemble = iteration >= 3 and gamma > 0
    if reference_free:
        return (1.0 - gamma, gamma) if ensemble else (1.0,)
    return (1.0 - gamma, 2.0 * gamma - 1.0, -gamma) if ensemble else (1.0, -1.0)


def implicit_reward(
    logps: npt.ArrayLike, weights: tuple[float, ...], lengths: npt.ArrayLike | None = None
) -> FloatArray:
    """(n,) sums of (policies, n) log-probabilities in nats, newest policy first, by `weights`.

    Per token with (n,) completion lengths; a loss that sums over tokens has None.
    """
    values = np.asarray(logps, dtype=np.float64)
    if len(values) != len(weights):
        raise ValueError(f"{len(values)} policies scored, but the reward weighs {len(weights)}")
    reward: FloatArray = np.einsum("pn,p->n", values, np.asarray(weights))
    return reward if lengths is None else reward / np.asarray(lengths, dtype=np.float64)


def require_finite(values: npt.NDArray[Any], what: str, rows: npt.NDArray[Any]) -> None:
    """Refuse (n,) numbers that are not finite: a ValueError that names the first one's row."""
    broken = np.flatnonzero(~np.isfinite(values))
    if broken.size:
        raise ValueError(
            f"the {what} in row {rows[broken[0]]} is {values[broken[0]]} ({broken.size} such "
            "values): the policy's log-probabilities are not finite. It has diverged or overflows: "
            "lower learning_rate, or train with bf16 or float32 instead of fp16."
        )


def regressed_alpha(rewards: npt.ArrayLike, lengths: npt.ArrayLike) -> float:
    """Slope of reward on length within groups, in nats per token; 0 where no length differs.

    Both are (groups, members). Rewards that are not finite are left out with their lengths.
    """
    reward, length = np.asarray(rewards, np.float64), np.asarray(lengths, np.float64)
    unknown = ~np.isfinite(reward)
    both = np.ma.masked_array([reward, length], [unknown, unknown])
    centred = (both - both.mean(axis=2, keepdims=True)).filled(0)
    variance = float((centred[1] ** 2).sum())
    return float((centred[0] * centred[1]).sum()) / variance if variance else 0.0


def equalizing_alpha(
    rewards: npt.ArrayLike, lengths: npt.ArrayLike, pair: Callable[[FloatArray], FloatArray]
) -> float:
    """The alpha with which chosen and rejected are equally long on average (DICE).

    Rewards and lengths are (prompts, R), nats and tokens; `pair` takes controlled rewards and gives
    the (pairs,) differences in length, chosen less rejected. Their mean falls as alpha grows, so
    the interval in which it passes zero is halved, starting around the slope within prompts; the
    alpha with the smallest mean is taken, the smallest among equals.
    """
    reward, length = np.asarray(rewards, np.float64), np.asarray(lengths, np.float64)
    tried: dict[float, float] = {}

    def difference(alpha: float) -> float:
        if alpha not in tried:
            found = pair(reward - alpha * length)
            tried[alpha] = float(found.mean()) if len(found) else 0.0
        return tried[alpha]

    difference(0.0)
    high = 2 * abs(regressed_alpha(reward, length)) or 1.0
    low = -high
    for _ in range(_HALVINGS):
        if difference(low) < 0:
            low *= 2
        elif difference(high) > 0:
            high *= 2
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if difference(middle) > 0 else (low, middle)
    return min(tried, key=lambda alpha: (abs(tried[alpha]), abs(alpha)))
