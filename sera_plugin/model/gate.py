"""The step-0 gate: before an iteration's first update the policy is theta_{t-1}, as scored."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sera_plugin.model.losses import PreferenceLoss

#: How far policy and reference may differ when they are the same weights, as (nats per token,
#: loss). Scoring and training pad their batches differently, which moves low-precision sums.
FLOAT32_LIMITS = (1e-3, 1e-3)
LOW_PRECISION_LIMITS = (0.05, 0.1)


def low_precision(model: torch.nn.Module) -> bool:
    """Whether any weight is quantised or narrower than float32."""
    return any(weight.dtype != torch.float32 for weight in model.parameters())


def check_step_zero(
    inputs: Mapping[str, Tensor],
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    limits: tuple[float, float],
    loss: Tensor | None = None,
    function: PreferenceLoss | None = None,
) -> dict[str, float]:
    """Compare the first training forward with the stored log pi_{t-1}.

    One check for a reference of other weights, other tokens or another precision, before any of
    them costs a run. The loss must be what the stored values give: ln 2 for DPO against the
    previous policy.

    Args:
        inputs: the micro-batch: completion_mask (2n, length) with the chosen rows first,
            ref_chosen_logps and ref_rejected_logps (n,), and policy_chosen_logps and
            policy_rejected_logps, log pi_{t-1}, where the reference is another policy.
        chosen_logps, rejected_logps: (n,) or means, from the training forward, nats.
        limits: largest difference in nats per token and in the loss.
        loss, function: the micro-batch's mean loss and what computed it, for SeRA's own losses.

    Returns:
        The figures that were compared.

    Raises:
        ValueError: with the figures, if they differ by more than the limits.
    """
    references = [inputs[f"ref_{side}_logps"] for side in ("chosen", "rejected")]
    expected = [
        inputs.get(f"policy_{side}_logps", reference)
        for side, reference in zip(("chosen", "rejected"), references, strict=True)
    ]
    lengths = inputs["completion_mask"].sum(dim=1).chunk(2)
    errors = [
        abs(float(policy.detach().mean()) - float(stored.mean())) / float(length.float().mean())
        for policy, stored, length in zip(
            (chosen_logps, rejected_logps), expected, lengths, strict=True
        )
    ]
    # A tensor's maximum, unlike Python's, is NaN if any error is; and no NaN passes below.
    figures = {"nats_per_token": torch.tensor(errors).max().item()}
    passed = figures["nats_per_token"] <= limits[0]
    if loss is not None and function is not None:
        rewards = [
            function.rewards(stored, reference, length)
            for stored, reference, length in zip(expected, references, lengths, strict=True)
        ]
        figures["loss"] = loss.item()
        figures["expected_loss"] = float(function(*rewards).mean())
        passed = passed and abs(figures["loss"] - figures["expected_loss"]) <= limits[1]
    figures = {name: round(value, 6) for name, value in figures.items()}
    if not passed:
        raise ValueError(
            "step-0 gate: before an iteration's first update the policy is the one that the pairs "
            f"were scored under, but {figures} (allowed: {limits[0]} nats per token, {limits[1]} "
            "in the loss). The reference would be wrong, so the run stops here. Usual causes: "
            "dropout, a kernel that differs between training and evaluation, or mixed precision "
            "over a model in another type. Train in bf16 or float32 throughout and leave "
            "`disable_dropout` at the host's default."
        )
    return figures
