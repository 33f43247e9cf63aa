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
