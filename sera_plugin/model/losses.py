"""What one micro-batch optimises: a direct alignment loss and what is added to it; the step-0 gate.

Each loss is a link function of the margin between two rewards. With `log pi(y|x)` summed over the
completion's tokens, in nats, a completion's reward is `log pi - log pi_ref`, or `log pi` for the
reference-free SimPO and ORPO; these two and averaged IPO divide it by the completion's tokens.

TRL 1.9 ignores label smoothing in its `sigmoid` loss (so it has no cDPO), and has no summed IPO,
SimPO margin or KTO-Pair, and ORPO in another trainer. Where both exist the formulas agree.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from sera_plugin.config.kinds import LOSSES, is_reference_free
from sera_plugin.model.forward import (
    Targets,
    abilities,
    evaluating,
    forward_logps,
    innermost,
    without_padding,
)


@dataclass(frozen=True)
class PreferenceLoss:
    """One of SeRA's losses with its constants."""

    kind: str  # one of `config.kinds.LOSSES`
    beta: float  # strength of the preference (1 / strength of the KL anchor); ORPO's lambda
    label_smoothing: float = 0.0  # share of labels taken to be wrong
    simpo_gamma: float = 0.0  # SimPO's target margin, 0 in the paper's Eq. 18
    per_token: bool = False  # divide rewards by the completion's tokens

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
    """KTO (Ethayarajh et al. 2024) on pairs: each side's mean reward is the other's KL estimate."""
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


_NOT_PACKED = (
    "dpo_padding_free: true, but this model does not keep sequences of one line apart under its "
    "attn_implementation (its layers carry more than attention along a line, or the kernel reads "
    "no lengths). Remove dpo_padding_free."
)


class Result(NamedTuple):
    """One micro-batch of n pairs."""

    loss: Tensor  # what is minimised
    preference_loss: Tensor  # its part that compares chosen with rejected
    chosen_logps: Tensor  # (n,) log pi of the completions, nats
    rejected_logps: Tensor
    #: TRL's names, plus `num_tokens` and `loss` of this micro-batch; means over all processes.
    metrics: dict[str, float]
    outputs: Any  # the model's own


@dataclass(frozen=True)
class Objective:
    """A preference loss with the terms that are added to it."""

    loss: PreferenceLoss
    nll_weight: float = 0.0  # of the chosen answers' likelihood: CPO's `cpo_alpha`, 1 for ORPO
    nll_of_prompts: bool = False  # as the host's ORPO, which counts the prompts' tokens too
    router_weight: float | None = None  # of a mixture-of-experts model's balancing loss
    padding_free: bool = False  # pass a micro-batch as one packed line
    mean: Callable[[Tensor], Tensor] = lambda metrics: metrics  # over all processes

    def __call__(self, model: Any, inputs: Mapping[str, Tensor]) -> Result:
        """One forward pass over the policy; the reference values come with the data.

        Inputs: input_ids, attention_mask, completion_mask (2n, length), padded on the right, with
        the chosen rows first; ref_chosen_logps, ref_rejected_logps (n,).
        """
        taken: dict[str, Any] = {"input_ids": inputs["input_ids"]}
        mask = inputs["completion_mask"]
        targets = Targets.of(inputs["input_ids"], mask)
        if self.nll_of_prompts:
            targets = targets.with_prompts(inputs["input_ids"], mask)
        if self.padding_free:
            if not abilities(model, mask.device).packed:
                raise ValueError(_NOT_PACKED)
            taken, targets = without_padding(taken["input_ids"], inputs["attention_mask"], targets)
        if self.router_weight is not None:
            taken["output_router_logits"] = True
            if not self.padding_free:
                # It is an average over the tokens that the mask names. Nothing else asks for one:
                # no scored token attends to padding, and with it SDPA takes slower kernels.
                taken["attention_mask"] = inputs["attention_mask"]
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
        balancing = {}
        if self.router_weight is not None:
            loss = loss + self.router_weight * outputs.aux_loss
            balancing["aux_loss"] = outputs.aux_loss
        metrics = {
            "rewards/chosen": self.loss.beta * chosen.mean(),
            "rewards/rejected": self.loss.beta * rejected.mean(),
            "rewards/accuracies": (chosen > rejected).float().mean(),
            "rewards/margins": self.loss.beta * (chosen - rejected).mean(),
            "logps/chosen": chosen_logps.mean(),
            "logps/rejected": rejected_logps.mean(),
            "num_tokens": inputs["attention_mask"].sum().float(),
            "loss": loss,
            **balancing,
        }
        # One transfer from the device for all of them.
        values = self.mean(torch.stack([value.detach() for value in metrics.values()])).tolist()
        figures = dict(zip(metrics, values, strict=True))
        return Result(loss, preference_loss, chosen_logps, rejected_logps, figures, outputs)


# ------------------------------------------------------------------ the step-0 gate

#: How far the same weights may differ from themselves in a completion's log-probability: nats per
#: square root of its tokens, because each token is rounded by itself. Scoring and training batch
#: differently. Answers of 259 tokens were seen to move by 0.1 nats in bfloat16 (0.006 per root
#: token), and by 0.64 (0.04) against float32.
FLOAT32_LIMIT = 0.01
LOW_PRECISION_LIMIT = 0.2
#: How far a loss may be from what its own log-probabilities give, relative where it exceeds 1.
FORMULA_LIMIT = 1e-3

_WRONG_LOGPS = (
    "But training computes other log-probabilities than scoring did (at most {limit} nats per "
    "square root of an answer's tokens is rounding), so every reference would be wrong. Usual "
    "causes: a kernel that differs between training and evaluation, or mixed precision over a "
    "model in another type. Train in bf16 or float32 throughout, with attn_implementation: sdpa."
)
_WRONG_LOSS = (
    "But the loss is not the one that its own log-probabilities and references give (within "
    "{limit}), whatever their precision: something changes it, such as another plugin or a patch "
    "of the trainer's loss. Leave that out."
)


def rounding_limit(model: torch.nn.Module, autocast: bool) -> float:
    """The largest `deviation` that rounding explains, by the model and mixed precision around it.

    More where a weight is quantised or narrower than float32, and where tokens choose experts.
    """
    low = autocast or any(weight.dtype != torch.float32 for weight in model.parameters())
    config: str = innermost(model).config.to_json_string(use_diff=False)
    chooses = re.search(r'experts\w*": ([2-9]|\d\d)', config)
    return LOW_PRECISION_LIMIT if low or chooses else FLOAT32_LIMIT


def deviation(found: npt.ArrayLike, expected: npt.ArrayLike, lengths: npt.ArrayLike) -> float:
    """How far (n,) log pi of completions of some lengths are from what they should be, at most.

    In nats per square root of a completion's tokens; NaN if any log-probability is.
    """
    difference = np.asarray(found, np.float64) - np.asarray(expected, np.float64)
    return float(np.max(np.abs(difference) / np.sqrt(np.asarray(lengths))))


class Again(NamedTuple):
    """A micro-batch passed again through the same weights, without a gradient."""

    settled: tuple[Tensor, Tensor]  # (n,) log pi of both sides in eval mode, nats
    scatter: float  # `deviation` of two passes in training mode from each other


@torch.no_grad()
def pass_again(model: Any, inputs: Mapping[str, Tensor]) -> Again:
    """Tell what a model draws at random in training apart from what it computes.

    The random stream goes on afterwards as if nothing had been drawn.
    """
    taken = {"input_ids": inputs["input_ids"]}
    targets = Targets.of(inputs["input_ids"], inputs["completion_mask"])
    device = inputs["input_ids"].device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        drawn = [forward_logps(model, taken, targets)[0].cpu() for _ in range(2)]
    with evaluating(model):
        settled = forward_logps(model, taken, targets)[0]
    chosen, rejected = settled.chunk(2)
    scatter = deviation(drawn[0], drawn[1], targets.lengths)
    return Again((chosen, rejected), scatter)


def check_step_zero(
    inputs: Mapping[str, Tensor],
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    limit: float,
    loss: Tensor | None = None,
    function: PreferenceLoss | None = None,
    repeat: Callable[[bool], Again | None] = lambda over: None,
) -> dict[str, float]:
    """Compare an iteration's first training forward with the stored log pi_{t-1}.

    Precision is judged on log-probabilities alone: beta and length multiply their noise in a loss.
    So the loss is compared with the one that the measured values give.

    `inputs` are as `Objective` takes them, with (n,) policy_chosen_logps and policy_rejected_logps
    where theta_{t-1} is not the reference. The forward's log-probabilities are (n,) nats, or ()
    means. `limit` is the largest `deviation`; `loss` is the micro-batch's mean and `function` what
    computed it, for SeRA's own losses. `repeat` is told whether they are over the limit, and passes
    the micro-batch again. Where two passes differ from each other, the model draws at random in
    training (a router's jitter, attention dropout: a config may have them, and TRL switches off
    only dropout layers). The reference is then judged without that.

    Returns the figures that were compared; ValueError with them if one is over its limit.
    """
    kept_as = "policy" if "policy_chosen_logps" in inputs else "ref"
    found = [chosen_logps.detach().cpu(), rejected_logps.detach().cpu()]
    references, stored = (
        [inputs[f"{kind}_{side}_logps"].cpu() for side in ("chosen", "rejected")]
        for kind in ("ref", kept_as)
    )
    lengths = inputs["completion_mask"].sum(dim=1).cpu().chunk(2)

    def compare(found: Sequence[Tensor]) -> dict[str, float]:
        means = [
            (float(policy.mean()), float(before.mean()), float(length.float().mean()))
            for policy, before, length in zip(found, stored, lengths, strict=True)
        ]
        compared = zip(found, stored, lengths, strict=True) if found[0].ndim else means
        # NumPy's maximum, unlike Python's, is NaN if any of these is; and no NaN passes below.
        return {
            "nats_per_token": float(np.max([abs(one - other) / n for one, other, n in means])),
            "nats_per_root_token": float(np.max([deviation(*each) for each in compared])),
        }

    figures = compare(found)
    again = repeat(not figures["nats_per_root_token"] <= limit)
    # As large as what is over the limit: passes of one function differ by rounding, far less.
    if again is not None and again.scatter > limit / 4:
        figures = compare([side.cpu() for side in again.settled]) | {"scatter": again.scatter}
    wrong = []
    if not figures["nats_per_root_token"] <= limit:  # NaN is wrong too
        wrong.append(_WRONG_LOGPS.format(limit=limit))
    if loss is not None and function is not None:
        expected = float(function(*map(function.rewards, found, references, lengths)).mean())
        figures |= {"loss": loss.item(), "expected_loss": expected}
        if not abs(loss.item() - expected) <= FORMULA_LIMIT * max(1.0, abs(expected)):
            wrong.append(_WRONG_LOSS.format(limit=FORMULA_LIMIT))
    figures = {name: round(value, 6) for name, value in figures.items()}
    if wrong:
        raise ValueError(
            "step-0 gate: before an iteration's first update the policy is the one that the pairs "
            f"were scored under. {' '.join(wrong)} Measured: {figures}. The run stops here."
        )
    return figures
