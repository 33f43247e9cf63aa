"""What one micro-batch optimises: forward pass, loss and the metrics TRL would show."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sera_plugin.model.forward import forward_logps
from sera_plugin.model.losses import PreferenceLoss
from sera_plugin.model.packing import Targets


@dataclass(frozen=True)
class Result:
    """One micro-batch of n pairs.

    Attributes:
        loss: what is minimised.
        preference_loss: the part of it that compares chosen with rejected.
        chosen_logps, rejected_logps: (n,) log pi of the completions, nats.
        metrics: TRL's names, plus `num_tokens` and `loss` of this micro-batch; means over all
            processes.
        outputs: the model's own.
    """

    loss: Tensor
    preference_loss: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    metrics: dict[str, float]
    outputs: Any


@dataclass(frozen=True)
class Objective:
    """A preference loss with the terms that are added to it.

    Attributes:
        loss: the preference loss.
        nll_weight: of the likelihood term on the chosen completions: CPO's (`cpo_alpha`), 0 in the
            paper; 1 for ORPO.
        nll_of_prompts: whether that term counts the prompts' tokens too, as the host's ORPO does.
        router_weight: of a mixture-of-experts model's balancing loss, None where it has none.
        mean: takes the metrics of one process to their mean over all.
    """

    loss: PreferenceLoss
    nll_weight: float = 0.0
    nll_of_prompts: bool = False
    router_weight: float | None = None
    mean: Callable[[Tensor], Tensor] = lambda metrics: metrics

    def __call__(self, model: Any, inputs: Mapping[str, Tensor]) -> Result:
        """One forward pass over the policy; the reference values come with the data.

        Args:
            model: the policy.
            inputs: input_ids, attention_mask, completion_mask (2n, length) with the chosen rows
                first; ref_chosen_logps, ref_rejected_logps (n,).
        """
        taken: dict[str, Any] = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        if self.router_weight is not None:
            taken["output_router_logits"] = True
        mask = inputs["completion_mask"]
        targets = Targets.of(inputs["input_ids"], mask)
        if self.nll_of_prompts:
            targets = targets.with_prompts(inputs["input_ids"], mask)
        logps, outputs = forward_logps(model, taken, targets)
        pairs = len(mask) // 2
        chosen_logps, rejected_logps = logps[:pairs], logps[pairs : 2 * pairs]
        chosen_lengths, rejected_lengths = mask.sum(dim=1).chunk(2)
        chosen = self.loss.rewards(chosen_logps, inputs["ref_chosen_logps"], chosen_lengths)
        rejected = self.loss.rewards(rejected_logps, inputs["ref_rejected_logps"], rejected_lengths)
        preference_loss = loss = self.loss(chosen, rejected).mean()
        if self.nll_weight:
            # Mean over the tokens of the micro-batch (CPO, Xu et al. 2024, Eq. 5; ORPO as in TRL).
            likely = chosen_logps.sum() + logps[2 * pairs :].sum()
            tokens = chosen_lengths.sum() + sum(targets.lengths[2 * pairs :])
            loss = loss - self.nll_weight * likely / tokens
        if self.router_weight is not None:
            loss = loss + self.router_weight * outputs.aux_loss
        metrics = {
            "rewards/chosen": self.loss.beta * chosen.mean(),
            "rewards/rejected": self.loss.beta * rejected.mean(),
            "rewards/accuracies": (chosen > rejected).float().mean(),
            "rewards/margins": self.loss.beta * (chosen - rejected).mean(),
            "logps/chosen": chosen_logps.mean(),
            "logps/rejected": rejected_logps.mean(),
            "num_tokens": inputs["attention_mask"].sum().float(),
            "loss": loss,
        }
        # One transfer from the device for all of them.
        values = self.mean(torch.stack([value.detach() for value in metrics.values()])).tolist()
        return Result(
            loss=loss,
            preference_loss=preference_loss,
            chosen_logps=chosen_logps,
            rejected_logps=rejected_logps,
            metrics=dict(zip(metrics, values, strict=True)),
            outputs=outputs,
        )
