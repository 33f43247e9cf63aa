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

from sera_plugin.config.kinds import LOSSES, is_reference_free


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
        """(n,) losses from (n,) rewards as `rewards` gives them.

        Raises:
            KeyError: for a kind that is not in `config.kinds.LOSSES`.
        """
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
