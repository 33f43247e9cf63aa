"""The direct alignment losses, against hand-derived values and TRL's formulas."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from sera_plugin.config.sera import SeraConfig
from sera_plugin.host.trainer import preference_loss
from sera_plugin.model.losses import Objective, PreferenceLoss

BETA = 0.5


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        # DPO at logit 1: log(1 + e^-1).
        (PreferenceLoss("dpo", 0.2), 0.313262),
        # cDPO: 0.9 * 0.313262 + 0.1 * 1.313262
        (PreferenceLoss("dpo", 0.2, label_smoothing=0.1), 0.413262),
        # rDPO: (0.9 * 0.313262 - 0.1 * 1.313262) / 0.8
        (PreferenceLoss("robust", 0.2, label_smoothing=0.1), 0.188262),
        # SLiC: 1 - 0.1 * 5, and nothing once beta * margin exceeds 1.
        (PreferenceLoss("slic", 0.1), 0.5),
        (PreferenceLoss("slic", 0.4), 0.0),
        # IPO: (5 - 1/2)^2, and its optimum at margin 1 / (2 * 0.1).
        (PreferenceLoss("ipo", 1.0), 20.25),
        (PreferenceLoss("ipo", 0.1), 0.0),
        # SimPO: -log sigmoid(0.4 * 5 - 1)
        (PreferenceLoss("simpo", 0.4, simpo_gamma=1.0), 0.313262),
    ],
)
def test_loss_by_hand_at_a_margin_of_five(loss, expected):
    value = loss(torch.tensor([3.0]), torch.tensor([-2.0]))
    assert value.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("keys", "block", "at_zero", "reward"),
    [
        ({"dpo_label_smoothing": 0.1}, {}, math.log(2), 4.0),
        ({"dpo_label_smoothing": 0.2}, {"loss": "robust"}, math.log(2), 4.0),
        ({}, {"loss": "slic"}, 1.0, 4.0),
        # (0 - 1 / (2 beta))^2 with the paper's beta of 1
        ({}, {"loss": "ipo"}, 0.25, 2.0),
        ({}, {"loss": "ipo", "ipo_reduction": "sum"}, 0.25, 4.0),
        ({}, {"loss": "simpo"}, math.log(2), -1.5),
        ({"simpo_gamma": 0.5}, {"loss": "simpo"}, math.log1p(math.exp(0.5)), -1.5),
        ({}, {"loss": "orpo"}, 0.1 * math.log(2), -1.5),
    ],
)
def test_a_configuration_gives_its_loss(base_config, load, keys, block, at_zero, reward):
    """Two tokens with log pi = -3 under the policy and -7 under the reference."""
    base_config["sera"] |= block
    cfg = load(base_config | keys)
    loss = preference_loss(cfg, SeraConfig(**cfg.sera))
    assert loss.label_smoothing == keys.get("dpo_label_smoothing", 0.0)
    side = torch.tensor([-1.0])
    assert loss(side, side).item() == pytest.approx(at_zero, abs=1e-6)
    found = loss.rewards(torch.tensor([-3.0]), torch.tensor([-7.0]), torch.tensor([2]))
    assert found.item() == reward


@pytest.mark.parametrize("kind", ["dpo", "ipo", "slic", "robust", "simpo"])
def test_gradients_are_finite_where_a_naive_log_sigmoid_is_not(kind):
    chosen = torch.tensor([-2000.0, -1.0, 1.0, 2000.0], requires_grad=True)
    rejected = torch.zeros(4, requires_grad=True)
    losses = PreferenceLoss(kind, BETA, label_smoothing=0.1)(chosen, rejected)
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert torch.isfinite(chosen.grad).all()
    torch.testing.assert_close(chosen.grad, -rejected.grad)


def test_kto_pair_at_zero_and_by_hand():
    """Rewards all zero: 1 - s(0) on either side, 0.5.

    Chosen 2 and 0, rejected 1 and -3, beta 0.5: the averages are 1 and max(0, -1) = 0. First pair:
    1 - s(0.5 (2 - 0)) and 1 - s(0.5 (1 - 1)); second: 1 - s(0) and 1 - s(0.5 (1 + 3)).
    """
    zero = torch.zeros(3)
    assert PreferenceLoss("kto_pair", BETA)(zero, zero).tolist() == [0.5] * 3

    def logistic(x):
        return 1 / (1 + math.exp(-x))

    chosen, rejected = torch.tensor([2.0, 0.0]), torch.tensor([1.0, -3.0])
    found = PreferenceLoss("kto_pair", BETA)(chosen, rejected)
    expected = [(1 - logistic(1) + 0.5) / 2, (0.5 + 1 - logistic(2)) / 2]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


def test_kto_pair_takes_no_gradient_through_its_averages():
    """d/dr of (1 - s(beta (r - z))) / 2 is -beta s (1 - s) / 2, with z a constant."""
    chosen = torch.tensor([2.0], requires_grad=True)
    rejected = torch.tensor([1.0], requires_grad=True)
    PreferenceLoss("kto_pair", BETA)(chosen, rejected).sum().backward()
    s = 1 / (1 + math.exp(-BETA * (2 - 1)))
    assert chosen.grad.item() == pytest.approx(-BETA * s * (1 - s) / 2, abs=1e-6)


def test_orpo_agrees_with_the_hosts():
    from trl.experimental.orpo import ORPOTrainer

    chosen, rejected = torch.tensor([-0.1, -2.0, -8.0]), torch.tensor([-1.0, -0.5, -8.0])
    trainer = SimpleNamespace(beta=BETA, accelerator=SimpleNamespace(device="cpu"))
    theirs = -ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)[0]
    torch.testing.assert_close(PreferenceLoss("orpo", BETA)(chosen, rejected), theirs)
    # Odds exp(-ln 2) / (1 - exp(-ln 2)) = 1 against exp(-ln 4) / (1 - 1/4) = 1/3.
    found = PreferenceLoss("orpo", 1.0)(-torch.tensor([2.0]).log(), -torch.tensor([4.0]).log())
    assert found.item() == pytest.approx(math.log1p(1 / 3), abs=1e-6)


@pytest.mark.parametrize("certain", [0.0, -1e-20, -1e-6, -40.0])
def test_orpo_has_a_gradient_wherever_a_policy_can_be(certain):
    chosen = torch.tensor([certain], requires_grad=True)
    PreferenceLoss("orpo", BETA)(chosen, torch.tensor([-1.0])).sum().backward()
    assert torch.isfinite(chosen.grad).all()


def test_orpo_adds_the_likelihood_of_prompt_and_chosen(model):
    """As the host has it: the mean over all tokens of prompt and chosen but the first."""
    batch = {
        "input_ids": torch.tensor([[6, 7, 8, 9, 10, 0], [6, 7, 11, 12, 0, 0],
                                   [6, 7, 8, 13, 0, 0], [6, 7, 14, 15, 16, 17]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0],
                                        [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]),
        "completion_mask": torch.tensor([[0, 0, 0, 1, 1, 0], [0, 0, 1, 1, 0, 0],
                                         [0, 0, 0, 1, 0, 0], [0, 0, 1, 1, 1, 1]]),
        "ref_chosen_logps": torch.zeros(2), "ref_rejected_logps": torch.zeros(2),
    }  # fmt: skip
    loss = PreferenceLoss("orpo", BETA, per_token=True)
    result = Objective(loss, nll_weight=1.0, nll_of_prompts=True)(model, batch)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)[:2]
        likelihood = torch.nn.functional.cross_entropy(
            logits[:2, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
        )
        logps = logits[:, :-1].float().log_softmax(-1)
        logps = logps.gather(2, batch["input_ids"][:, 1:, None])[..., 0]
        mask = batch["completion_mask"][:, 1:]
        rewards = (logps * mask).sum(1) / mask.sum(1)
    torch.testing.assert_close(
        result.loss.detach(), loss(rewards[:2], rewards[2:]).mean() + likelihood
    )
    torch.testing.assert_close(result.chosen_logps.detach(), (logps * mask).sum(1)[:2])


def test_figures_of_a_micro_batch_by_hand(model):
    """Rewards of chosen 0 and 1, of rejected 0 and 0: two rewards that are equal rank nothing."""
    ones = torch.ones(4, 4, dtype=torch.long)
    batch = {
        "input_ids": torch.arange(2, 18).view(4, 4),
        "attention_mask": ones,
        "completion_mask": torch.tensor([0, 0, 1, 1]) * ones,
        "ref_chosen_logps": torch.zeros(2), "ref_rejected_logps": torch.zeros(2),
    }  # fmt: skip
    policy = Objective(PreferenceLoss("dpo", BETA))(model, batch)
    batch["ref_chosen_logps"] = policy.chosen_logps.detach() - torch.tensor([0.0, 1.0])
    batch["ref_rejected_logps"] = policy.rejected_logps.detach()
    found = Objective(PreferenceLoss("dpo", BETA))(model, batch).metrics
    assert found["rewards/accuracies"] == 1 / 2
    assert found["rewards/chosen"] == pytest.approx(BETA / 2, abs=1e-5)
    assert found["rewards/rejected"] == pytest.approx(0, abs=1e-5)
    assert found["rewards/margins"] == pytest.approx(BETA / 2, abs=1e-5)
    # log 2 without a margin, log(1 + e^-0.5) with one of 1.
    assert found["loss"] == pytest.approx((math.log(2) + math.log1p(math.exp(-BETA))) / 2, abs=1e-5)
