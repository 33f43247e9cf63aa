"""Direct alignment losses as pure functions of log-probabilities.

Each loss is a link function of the margin between two rewards. With `log pi(y|x)` summed over the
completion's tokens, in nats, a completion's reward is `log pi - log pi_ref`, or `log pi` for the
reference-free SimPO and ORPO; these two and averaged IPO divide it by the completion's tokens.

Why these are not TRL's: TRL 1.9 ignores label smoothing in its `sigmoid` loss (so cDPO cannot be
had), has no summed IPO, no SimPO margin, no KTO-Pair, and ORPO in a trainer of its own. The
formulas agree with TRL's where both exist; a test holds that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sera_plugin.config.sera import REFERENCE_FREE


@dataclass(frozen=True)
class PreferenceLoss:
    """One of SeRA's losses with its constants.

    Attributes:
        kind: dpo, ipo, slic, robust, simpo, kto_pair or orpo.
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
        return self.kind in REFERENCE_FREE

    def rewards(self, logps: Tensor, ref_logps: Tensor, lengths: Tensor) -> Tensor:
        """(n,) rewards without beta, nats (per token if `per_token`), from (n,) summed logps."""
        reward = logps if self.reference_free else logps - ref_logps
        return reward / lengths if self.per_token else reward

    def __call__(self, chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
        """(n,) losses from (n,) rewards as `rewards` gives them.

        Raises:
            ValueError: for a kind that is none of the above.

        Sources: DPO Eq. 7 of Rafailov et al. 2023, with cDPO's smoothing (Mitchell 2023); rDPO
        Eq. 12 of Chowdhury et al. 2024; IPO Eq. 17 of Azar et al. 2023; SLiC-HF as in Zhao et al.
        2023 with the margin scaled by beta; SimPO Eq. 6 of Meng et al. 2024 (here Eq. 18);
        KTO-Pair: KTO of Ethayarajh et al. 2024 on pairs, where the rewards of one side, averaged
        over the batch, estimate the KL divergence that the other side's are compared with; ORPO
        Eq. 6 and 7 of Hong et al. 2024 without its likelihood term, which `Objective` adds.
        """
        margin = chosen_rewards - rejected_rewards
        logit = self.beta * margin
        smoothing = self.label_smoothing
        if self.kind == "dpo":
            return -(1 - smoothing) * F.logsigmoid(logit) - smoothing * F.logsigmoid(-logit)
        if self.kind == "robust":
            clean, flipped = -F.logsigmoid(logit), -F.logsigmoid(-logit)
            return ((1 - smoothing) * clean - smoothing * flipped) / (1 - 2 * smoothing)
        if self.kind == "slic":
            return torch.relu(1 - logit)
        if self.kind == "ipo":
            return (margin - 1 / (2 * self.beta)) ** 2
        if self.kind == "simpo":
            return -F.logsigmoid(logit - self.simpo_gamma)
        if self.kind == "kto_pair":
            # Constants: KTO takes no gradient through its estimate.
            chosen_kl, rejected_kl = (
                side.detach().mean().clamp(min=0) for side in (chosen_rewards, rejected_rewards)
            )
            chosen = 1 - torch.sigmoid(self.beta * (chosen_rewards - rejected_kl))
            rejected = 1 - torch.sigmoid(self.beta * (chosen_kl - rejected_rewards))
            return (chosen + rejected) / 2
        if self.kind == "orpo":
            log_odds = margin - (_log1mexp(chosen_rewards) - _log1mexp(rejected_rewards))
            return -self.beta * F.logsigmoid(log_odds)
        raise ValueError(
            f"unknown loss {self.kind!r}; dpo, ipo, slic, robust, simpo, kto_pair, orpo are known"
        )


def _log1mexp(values: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, exact near zero and far from it (Maechler 2012)."""
    values = values.clamp(max=-torch.finfo(values.dtype).tiny)
    near = values > -0.693
    # Either branch in its own range, so that the other's gradient is not NaN times zero.
    small, large = (torch.where(mask, values, -0.693) for mask in (near, ~near))
    return torch.where(near, torch.log(-torch.expm1(small)), torch.log1p(-torch.exp(large)))
