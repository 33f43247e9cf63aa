"""Implicit rewards: pure functions of arrays.

A direct alignment loss defines a reward by the policies alone. With `log pi(y|x)` summed over the
completion's tokens, in nats, iteration t's reward (paper Eq. 7) is

    t = 2 or gamma = 0:  r_t = log pi_{t-1} - log pi_{t-2}
    t >= 3:              r_t = (1 - gamma) [log pi_{t-1} - log pi_{t-2}]
                               + gamma     [log pi_{t-2} - log pi_{t-3}]

without beta, which scales every margin alike. It is linear in the log-probabilities, so one row of
weights says all of it. A reference-free loss (SimPO, Eq. 17; ORPO) has `r = log pi / |y|` and the
same ensemble.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


def reward_weights(iteration: int, gamma: float, reference_free: bool) -> tuple[float, ...]:
    """Weights of log pi_{t-1}, log pi_{t-2}, ... in iteration t's reward.

    Args:
        iteration: t, 1-based; selection starts at t = 2.
        gamma: weight of the previous reward in the ensemble, 0 to 1.
        reference_free: whether the loss has no reference (SimPO, ORPO).

    Returns:
        As many weights as policies the reward needs, newest first.

    Raises:
        ValueError: for iteration 1, which has no earlier policy to compare with.

    Source: Eq. 7; Eq. 17 for the reference-free form.
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
    """Weighted sum of log-probabilities, per token where the loss is.

    Args:
        logps: (policies, n) summed log-probabilities in nats, newest policy first.
        weights: as `reward_weights` gives them.
        lengths: (n,) completion tokens, or None for a loss that sums over tokens.

    Returns:
        (n,) float64 rewards, in nats (per token with `lengths`).

    Raises:
        ValueError: if the number of policies and of weights differ.
    """
    values = np.asarray(logps, dtype=np.float64)
    if len(values) != len(weights):
        raise ValueError(f"{len(values)} policies scored, but the reward weighs {len(weights)}")
    reward: FloatArray = np.einsum("pn,p->n", values, np.asarray(weights))
    return reward if lengths is None else reward / np.asarray(lengths, dtype=np.float64)
