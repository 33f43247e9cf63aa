"""The step-0 gate: before an iteration's first update the policy is theta_{t-1}, as scored."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sera_plugin.model.losses import PreferenceLoss

#: How far the same weights may differ from themselves in a completion's log-probability: nats per
#: square root of its tokens, because each token is rounded by itself. Scoring and training batch
#: differently. Answers of 259 tokens were seen to move by 0.1 nats in bfloat16 (0.006 per root
#: token), and by 0.64 (0.04) against float32.
FLOAT32_LIMIT = 0.01
LOW_PRECISION_LIMIT = 0.2
#: How far a loss may be from what its own log-probabilities give, relative where it exceeds 1.
FORMULA_LIMIT = 1e-3


def low_precision(model: torch.nn.Module) -> bool:
    """Whether any weight is quantised or narrower than float32."""
    return any(weight.dtype != torch.float32 for weight in model.parameters())


def deviation(found: npt.ArrayLike, expected: npt.ArrayLike, lengths: npt.ArrayLike) -> float:
    """How far (n,) log pi of completions of some lengths are from what they should be, at most.

    In nats per square root of a completion's tokens; NaN if any log-probability is.
    """
    difference = np.asarray(found, np.float64) - np.asarray(expected, np.float64)
    return float(np.max(np.abs(difference) / np.sqrt(np.asarray(lengths))))


def check_step_zero(
    inputs: Mapping[str, Tensor],
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    limit: float,
    loss: Tensor | None = None,
    function: PreferenceLoss | None = None,
) -> dict[str, float]:
    """Compare the first training forward with the stored log pi_{t-1}, and the loss with both.

    One check for a reference of other weights, other tokens or another precision, before any of
    them costs a run. Precision is judged on log-probabilities alone: beta and length multiply their
    noise in a loss. So the loss is compared with the one that the measured values give.

    Args:
        inputs: the micro-batch: completion_mask (2n, length) with the chosen rows first,
            ref_chosen_logps and ref_rejected_logps (n,), and policy_chosen_logps and
            policy_rejected_logps, log pi_{t-1}, where the reference is another policy.
        chosen_logps, rejected_logps: (n,), from the training forward, nats; or () means of these,
            which are then compared with means.
        limit: the largest `deviation`.
        loss, function: the micro-batch's mean loss and what computed it, for SeRA's own losses.

    Returns:
        The figures that were compared.

    Raises:
        ValueError: with the figures, if one is over its limit.
    """
    found = [chosen_logps.detach().cpu(), rejected_logps.detach().cpu()]
    references = [inputs[f"ref_{side}_logps"].cpu() for side in ("chosen", "rejected")]
    stored = references
    if "policy_chosen_logps" in inputs:
        stored = [inputs[f"policy_{side}_logps"].cpu() for side in ("chosen", "rejected")]
    lengths = inputs["completion_mask"].sum(dim=1).cpu().chunk(2)
    means = [
        (float(policy.mean()), float(before.mean()), float(length.float().mean()))
        for policy, before, length in zip(found, stored, lengths, strict=True)
    ]
    compared = zip(found, stored, lengths, strict=True) if found[0].ndim else means
    # NumPy's maximum, unlike Python's, is NaN if any of these is; and no NaN passes below.
    figures = {
        "nats_per_token": float(np.max([abs(one - other) / n for one, other, n in means])),
        "nats_per_root_token": float(np.max([deviation(*each) for each in compared])),
    }
    passed = figures["nats_per_root_token"] <= limit
    if loss is not None and function is not None:
        rewards = map(function.rewards, found, references, lengths)
        figures["loss"] = loss.item()
        figures["expected_loss"] = float(function(*rewards).mean())
        allowed = FORMULA_LIMIT * max(1.0, abs(figures["expected_loss"]))
        passed = passed and abs(figures["loss"] - figures["expected_loss"]) <= allowed
    figures = {name: round(value, 6) for name, value in figures.items()}
    if not passed:
        raise ValueError(
            "step-0 gate: before an iteration's first update the policy is the one that the pairs "
            f"were scored under, but {figures} (allowed: {limit} nats per square root of an "
            f"answer's tokens, and {FORMULA_LIMIT} between the loss and what its own "
            "log-probabilities give). The reference would be wrong, so the run stops here. Usual "
            "causes: dropout, a kernel that differs between training and evaluation, or mixed "
            "precision over a model in another type. Train in bf16 or float32 throughout and leave "
            "`disable_dropout` at the host's default."
        )
    return figures
