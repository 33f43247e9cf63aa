"""The direct alignment losses, against hand-derived values and TRL's formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from sera_plugin.losses import PreferenceLoss

BETA = 0.5
CHOSEN = torch.tensor([1.2, -0.4, 3.0])
REJECTED = torch.tensor([0.2, 0.6, -1.0])


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (PreferenceLoss("dpo", BETA), math.log(2)),
        (PreferenceLoss("dpo", BETA, label_smoothing=0.2), math.log(2)),
        # (0.8 ln 2 - 0.2 ln 2) / 0.6 = ln 2
        (PreferenceLoss("robust", BETA, label_smoothing=0.2), math.log(2)),
        (PreferenceLoss("slic", BETA), 1.0),
        # (0 - 1 / (2 * 0.5))^2 = 1
        (PreferenceLoss("ipo", BETA), 1.0),
        (PreferenceLoss("simpo", BETA), math.log(2)),
        # -log sigmoid(-1.5) = log(1 + e^1.5)
        (PreferenceLoss("simpo", BETA, simpo_gamma=1.5), math.log1p(math.exp(1.5))),
    ],
)
def test_loss_at_zero_margin(loss, expected):
    assert loss(CHOSEN, CHOSEN).tolist() == pytest.approx([expected] * 3, abs=1e-6)


def test_losses_agree_with_trl_where_both_exist():
    delta = CHOSEN - REJECTED
    z = BETA * delta
    torch.testing.assert_close(PreferenceLoss("dpo", BETA)(CHOSEN, REJECTED), -logsigmoid(z))
    torch.testing.assert_close(PreferenceLoss("slic", BETA)(CHOSEN, REJECTED), torch.relu(1 - z))
    torch.testing.assert_close(
        PreferenceLoss("ipo", BETA)(CHOSEN, REJECTED), (delta - 1 / (2 * BETA)) ** 2
    )
    robust = (-(1 - 0.1) * logsigmoid(z) + 0.1 * logsigmoid(-z)) / (1 - 2 * 0.1)
    torch.testing.assert_close(
        PreferenceLoss("robust", BETA, label_smoothing=0.1)(CHOSEN, REJECTED), robust
    )


def test_cdpo_mixes_both_labels():
    # margin 1, beta 0.5: 0.9 * log(1 + e^-0.5) + 0.1 * log(1 + e^0.5)
    loss = PreferenceLoss("dpo", BETA, label_smoothing=0.1)(CHOSEN[:1], REJECTED[:1])
    expected = 0.9 * math.log1p(math.exp(-0.5)) + 0.1 * math.log1p(math.exp(0.5))
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_reward_is_a_ratio_or_reference_free():
    logps, reference, lengths = torch.tensor([-8.0]), torch.tensor([-10.0]), torch.tensor([4])
    assert PreferenceLoss("dpo", 1).rewards(logps, reference, lengths).item() == 2.0
    assert PreferenceLoss("ipo", 1, per_token=True).rewards(logps, reference, lengths).item() == 0.5
    simpo = PreferenceLoss("simpo", 1, per_token=True)
    assert simpo.rewards(logps, reference, lengths).item() == -2.0


@pytest.mark.parametrize("kind", ["dpo", "ipo", "slic", "robust", "simpo"])
def test_gradients_push_chosen_up_and_rejected_down(kind):
    chosen = torch.zeros(3, requires_grad=True)
    rejected = torch.zeros(3, requires_grad=True)
    PreferenceLoss(kind, BETA, label_smoothing=0.1)(chosen, rejected).sum().backward()
    assert (chosen.grad < 0).all()
    assert (rejected.grad > 0).all()


def test_an_unknown_loss_is_an_error():
    with pytest.raises(ValueError, match="unknown loss 'kto'"):
        PreferenceLoss("kto", BETA)(CHOSEN, REJECTED)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        # Margin 5. DPO at logit 1: log(1 + e^-1).
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
def test_loss_elsewhere_by_hand(loss, expected):
    value = loss(torch.tensor([3.0]), torch.tensor([-2.0]))
    assert value.item() == pytest.approx(expected, abs=1e-5)


def test_averaged_ipo_agrees_with_trl_from_log_probabilities_on():
    generator = torch.Generator().manual_seed(0)
    chosen, rejected, ref_chosen, ref_rejected = -50 * torch.rand(4, 8, generator=generator)
    lengths = torch.randint(1, 40, (2, 8), generator=generator)
    averaged = (chosen - ref_chosen) / lengths[0] - (rejected - ref_rejected) / lengths[1]
    loss = PreferenceLoss("ipo", BETA, per_token=True)
    rewards = (
        loss.rewards(chosen, ref_chosen, lengths[0]),
        loss.rewards(rejected, ref_rejected, lengths[1]),
    )
    torch.testing.assert_close(loss(*rewards), (averaged - 1 / (2 * BETA)) ** 2)


@pytest.mark.parametrize("kind", ["dpo", "ipo", "slic", "robust", "simpo"])
def test_gradients_are_finite_where_a_naive_log_sigmoid_is_not(kind):
    chosen = torch.tensor([-2000.0, -1.0, 1.0, 2000.0], requires_grad=True)
    rejected = torch.zeros(4, requires_grad=True)
    losses = PreferenceLoss(kind, BETA, label_smoothing=0.1)(chosen, rejected)
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert torch.isfinite(chosen.grad).all()
    torch.testing.assert_close(chosen.grad, -rejected.grad)
