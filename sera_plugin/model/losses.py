"""What one micro-batch optimises: a direct alignment loss and what is added to it.

Each loss is a link function of the margin between two rewards. With `log pi(y|x)` summed over the
completion's tokens, in nats, a completion's reward is `log pi - log pi_ref`, or `log pi` for the
reference-free SimPO and ORPO; these two and averaged IPO divide it by the completion's tokens.

Why these are not TRL's: TRL 1.9 ignores label smoothing in its `sigmoid` loss (so cDPO cannot be
had), has no summed IPO, no SimPO margin, no KTO-Pair, and ORPO in a trainer of its own. The
formulas agree with TRL's where both exist; a test holds that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sera_plugin.config.kinds import LOSSES, is_reference_free
from sera_plugin.model.forward import forward_logps
from sera_plugin.model.packing import Targets


@dataclass(frozen=True)
class PreferenceLoss:
    """One of SeRA's losses with its constants.

    Attributes:
        kind: one of `config.kinds.LOSSES`.
        beta: strength of the preference (1 / strength of the KL anchor); ORPO's lambda.
        label_smoothing: share of labels taken to be wrong; cDPO for `dpo`, rDPO for `robust`.
        simpo_gamma: SimPO's target margin, 0 in the paper's Eq. 18.
        per_token: divide rewards by the completion's tokens.
    """

    kind: str
    beta: float
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.0
    per_token: bool = False

    @property
    def name(self) -> str:
        """The loss for a reader."""
        smoothed = f" (label smoothing {self.label_smoothing:g})" if self.label_smoothing else ""
        return self.kind + smoothed

    @property
    def reference_free(self) -> bool:
        """Whether the reward is log pi alone (paper Eq. 17)."""
        return is_reference_free(self.kind)

    def rewards(self, logps: Tensor, ref_logps: Tensor, lengths: Tensor) -> Tensor:
        """(n,) rewards without beta, nats (per token if `per_token`), from (n,) summed logps."""
        reward = logps if self.reference_free else logps - ref_logps
        return reward / lengths if self.per_token else reward

    def __call__(self, chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
        """(n,) losses from (n,) rewards as `rewards` gives them."""
        loss: Tensor = LOSSES[self.kind].load()(self, chosen_rewards, rejected_rewards)
        return loss


def dpo(loss: PreferenceLoss, chosen: Tensor, rejected: Tensor) -> Tensor:
    """Eq. 7 of Rafailov et al. 2023, with cDPO's label smoothing (Mitchell 2023)."""
    logit, smoothing = loss.beta * (chosen - rejected), loss.label_smoothing
    return -(1 - smoothing) * F.logsigmoid(logit) - smoothing * F.logsigmoid(-logit)


def robust(loss: PreferenceLoss, chosen: Tensor, rejected: Tensor) -> Tensor:
    """rDPO: Eq. 12 of Chowdhury et al. 2024."""
    logit, smoothing = loss.beta * (chosen - rejected), loss.label_smoothing
    clean, flipped = -F.logsigmoid(logit), -F.logsigmoid(-logit)
    return ((1 - smoothing) * clean - smoothing * flipped) / (1 - 2 * smoothing)


def slic(loss: PreferenceLoss, chosen: Tensor, rejected: Tensor) -> Tensor:
    """SLiC-HF: the hinge loss of Zhao et al. 2023, with the margin scaled by beta."""
    return torch.relu(1 - loss.beta * (chosen - rejected))


def ipo(loss: PreferenceLoss, chosen: Tensor, rejected: Tensor) -> Tensor:
    """Eq. 17 of Azar et al. 2023."""
    return (chosen - rejected - 1 / (2 * loss.beta)) ** 2


def simpo(loss: PreferenceLoss, chosen: Tensor, rejected: Tensor) -> Tensor:
    """Eq. 6 of Meng et al. 2024 (Eq. 18 of the SeRA paper)."""
    return -F.logsigmoid(loss.beta * (chosen - rejected) - loss.simpo_gamma)


def kto_pair(loss: PreferenceLoss, chosen: Tensor, rejected: Tensor) -> Tensor:
    """KTO (Ethayarajh et al. 2024) on pairs.

    The rewards of one side, averaged over the batch, estimate the KL divergence that the other
    side's are compared with.
    """
    # Constants: KTO takes no gradient through its estimate.
    chosen_kl, rejected_kl = (side.detach().mean().clamp(min=0) for side in (chosen, rejected))
    chosen_loss = 1 - torch.sigmoid(loss.beta * (chosen - rejected_kl))
    rejected_loss = 1 - torch.sigmoid(loss.beta * (chosen_kl - rejected))
    return (chosen_loss + rejected_loss) / 2


def orpo(loss: PreferenceLoss, chosen: Tensor, rejected: Tensor) -> Tensor:
    """Eq. 6 and 7 of Hong et al. 2024 without the likelihood term, which `Objective` adds."""
    log_odds = chosen - rejected - (_log1mexp(chosen) - _log1mexp(rejected))
    return -loss.beta * F.logsigmoid(log_odds)


def _log1mexp(values: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, exact near zero and far from it (Maechler 2012)."""
    values = values.clamp(max=-torch.finfo(values.dtype).tiny)
    near = values > -0.693
    # Either branch in its own range, so that the other's gradient is not NaN times zero.
    small, large = (torch.where(mask, values, -0.693) for mask in (near, ~near))
    return torch.where(near, torch.log(-torch.expm1(small)), torch.log1p(-torch.exp(large)))


@dataclass(frozen=True)
class Result:
    """One micro-batch of n pairs.

    Attributes:
        loss: what is minimised; `preference_loss` the part that compares chosen with rejected.
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

        Inputs: input_ids, attention_mask, completion_mask (2n, length) with the chosen rows first;
        ref_chosen_logps, ref_rejected_logps (n,).
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
