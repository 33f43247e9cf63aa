"""Which policy is best, by pairs that no iteration trains on: the one that `sera.keep` leaves."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from sera_plugin.algorithm.rewards import FloatArray

#: What `held_out_figure` is, for a reader.
FIGURE = "minus the mean DPO loss against theta_0"


def held_out_figure(
    initial: Mapping[str, npt.ArrayLike],
    policy: Mapping[str, npt.ArrayLike],
    beta: float,
    per_token: bool = False,
    reference_free: bool = False,
) -> float:
    """How well a policy tells chosen from rejected, larger is better.

    Minus the mean of -log sigmoid(beta (r_w - r_l)) (Eq. 7 of Rafailov et al. 2023), with the
    reward of the loss in training: log pi - log pi_0, divided by the completion's tokens where the
    loss does (`per_token`), log pi alone without a reference. So theta_0 has -log 2 with one.

    `initial` and `policy` are evaluation.parquet under theta_0 and under the policy: (M,)
    `chosen_logp`, `rejected_logp` (summed, nats), `chosen_length`, `rejected_length` (tokens).
    """

    def reward(side: str) -> FloatArray:
        logps = np.asarray(policy[f"{side}_logp"], dtype=np.float64)
        if not reference_free:
            logps = logps - np.asarray(initial[f"{side}_logp"])
        return logps / np.asarray(policy[f"{side}_length"]) if per_token else logps

    margin = reward("chosen") - reward("rejected")
    return -float(np.logaddexp(0.0, -beta * margin).mean())


def best_policy(figures: Mapping[int, Any]) -> int:
    """The trained policy (any but theta_0) with the largest figure; of equal ones the earliest."""
    return max(sorted(policy for policy in figures if policy), key=lambda one: figures[one])
