"""Which policy is best, by pairs that no iteration trains on: the one that `sera.keep` leaves."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from sera_plugin.algorithm.rewards import FloatArray

#: What policies are compared by, for a reader.
FIGURE = "mean DPO loss on the held-out pairs, against the initial policy"
#: Standard errors by which an earlier policy has to be better: one-sided 99 %.
CLEARLY = 2.326


def held_out_losses(
    initial: Mapping[str, npt.ArrayLike],
    policy: Mapping[str, npt.ArrayLike],
    beta: float,
    per_token: bool = False,
    reference_free: bool = False,
) -> FloatArray:
    """(M,) -log sigmoid(beta (r_w - r_l)) of each held-out pair (Eq. 7 of Rafailov et al. 2023).

    The reward is that of the loss in training: log pi - log pi_0, divided by the completion's
    tokens where the loss does (`per_token`), log pi alone without a reference. So theta_0 has log 2
    everywhere with one.

    `initial` and `policy` are evaluation.parquet under theta_0 and under the policy: (M,)
    `chosen_logp`, `rejected_logp` (summed, nats), `chosen_length`, `rejected_length` (tokens).
    """

    def reward(side: str) -> FloatArray:
        logps = np.asarray(policy[f"{side}_logp"], dtype=np.float64)
        if not reference_free:
            logps = logps - np.asarray(initial[f"{side}_logp"])
        return logps / np.asarray(policy[f"{side}_length"]) if per_token else logps

    margin = reward("chosen") - reward("rejected")
    losses: FloatArray = np.logaddexp(0.0, -beta * margin)
    return losses


def best_policy(losses: Mapping[int, FloatArray]) -> int:
    """The last trained policy (any but theta_0), unless an earlier one is clearly better.

    That is, unless its (M,) losses are lower than the last one's by more than chance: a paired
    one-sided test at 99 %. The last one's mean is often slightly higher although its answers are
    better, because preference tuning makes margins large, wrong ones too. If an earlier one is, the
    question is asked again of the one before the last, and so on. One with a loss that is not
    finite has diverged, and any other is better.
    """
    trained = sorted(policy for policy in losses if policy)
    return next(
        policy
        for policy in reversed(trained)
        if not any(_clearly_lower(losses[one], losses[policy]) for one in trained if one < policy)
    )


def _clearly_lower(one: FloatArray, other: FloatArray) -> bool:
    if not np.isfinite(other).all():
        return bool(np.isfinite(one).all())
    gain = other - one
    if len(gain) < 2:
        return False
    return bool(gain.mean() > CLEARLY * gain.std(ddof=1) / len(gain) ** 0.5)
