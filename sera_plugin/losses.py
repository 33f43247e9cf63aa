"""Direct alignment losses as pure functions of log-probabilities.

Each loss is a link function of the margin between two rewards. With `log pi(y|x)` summed over the
completion's tokens, in nats, a completion's reward is `log pi - log pi_ref`, or `log pi` for the
reference-free SimPO; SimPO and averaged IPO divide it by the completion's tokens.

Why these are not TRL's: TRL 1.9 ignores label smoothing in its `sigmoid` loss (so cDPO cannot be
had), has no summed IPO and no SimPO margin. The formulas agree with TRL's where both exist; a test
holds that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class PreferenceLoss:
    """One of SeRA's losses with its constants.

    Attributes:
        kind: dpo, ipo, slic, robust or simpo.
        beta: strength of the preference (1 / strength of the KL anchor).
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
        return self.kind == "simpo"

    def rewards(self, logps: Tensor, ref_logps: Tensor, lengths: Tensor) -> Tensor:
        """(n,) rewards without beta, nats (per token if `per_token`), from (n,) summed logps."""
        reward = logps if self.reference_free else logps - ref_logps
        return reward / lengths if self.per_token else reward

    def __call__(self, chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
        """(n,) losses from (n,) rewards as `rewards` gives them.

        Sources: DPO Eq. 7 of Rafailov et al. 2023, with cDPO's smoothing (Mitchell 2023); rDPO
        Eq. 12 of Chowdhury et al. 2024; IPO Eq. 17 of Azar et al. 2023; SLiC-HF as in Zhao et al.
        2023 with the margin scaled by beta; SimPO Eq. 6 of Meng et al. 2024 (here Eq. 18).
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
        raise ValueError(f"unknown loss {self.kind!r}; dpo, ipo, slic, robust, simpo are known")
