"""The direct alignment losses, against hand-derived values and TRL's formulas."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from trl.experimental.orpo import ORPOTrainer

from sera_plugin.config.sera import SeraConfig
from sera_plugin.host.trainer import preference_loss
from sera_plugin.model import forward
from sera_plugin.model.forward import abilities
from sera_plugin.model.losses import Objective, PreferenceLoss
from tests.tiny_models import MODELS, build, in_segments

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


@pytest.mark.parametrize("kind", ["dpo", "ipo", "slic", "robust", "simpo", "orpo"])
def test_gradients_are_finite_wherever_a_policy_can_be(kind):
    orpo = kind == "orpo"  # its rewards are log-probabilities
    at = [0.0, -1e-20, -1e-6, -40.0] if orpo else [-2000.0, -1.0, 1.0, 2000.0]
    chosen = torch.tensor(at, requires_grad=True)
    rejected = torch.full((4,), -1.0 if orpo else 0.0, requires_grad=True)
    losses = PreferenceLoss(kind, BETA, label_smoothing=0.1)(chosen, rejected)
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert torch.isfinite(chosen.grad).all()
    if not orpo:
        torch.testing.assert_close(chosen.grad, -rejected.grad)


def test_kto_pair_by_hand_without_a_gradient_through_its_averages():
    """Chosen 2 and 0, rejected 1 and -3, beta 0.5: the averages are 1 and max(0, -1) = 0.

    First pair: 1 - s(0.5 (2 - 0)) and 1 - s(0.5 (1 - 1)); second: 1 - s(0) and 1 - s(0.5 (1 + 3)).
    The gradient of (1 - s(beta (r - z))) / 2 is -beta s (1 - s) / 2, with z a constant.
    """
    loss = PreferenceLoss("kto_pair", BETA)
    s1, s2 = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-2))
    chosen = torch.tensor([2.0, 0.0], requires_grad=True)
    found = loss(chosen, torch.tensor([1.0, -3.0]))
    expected = [(1 - s1 + 0.5) / 2, (0.5 + 1 - s2) / 2]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    found.sum().backward()
    gradient = [-BETA * s1 * (1 - s1) / 2, -BETA * 0.5 * 0.5 / 2]
    assert chosen.grad.tolist() == pytest.approx(gradient, abs=1e-6)


def test_orpo_agrees_with_the_hosts():
    chosen, rejected = torch.tensor([-0.1, -2.0, -8.0]), torch.tensor([-1.0, -0.5, -8.0])
    trainer = SimpleNamespace(beta=BETA, accelerator=SimpleNamespace(device="cpu"))
    theirs = -ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)[0]
    torch.testing.assert_close(PreferenceLoss("orpo", BETA)(chosen, rejected), theirs)
    # Odds exp(-ln 2) / (1 - exp(-ln 2)) = 1 against exp(-ln 4) / (1 - 1/4) = 1/3.
    found = PreferenceLoss("orpo", 1.0)(-torch.tensor([2.0]).log(), -torch.tensor([4.0]).log())
    assert found.item() == pytest.approx(math.log1p(1 / 3), abs=1e-6)


def test_orpo_adds_the_likelihood_of_prompt_and_chosen(model):
    """As the host has it: the mean over all tokens of prompt and chosen but the first."""
    ids = [[6, 7, 8, 9, 10], [6, 7, 11, 12], [6, 7, 8, 13], [6, 7, 14, 15, 16, 17]]
    input_ids = pad_sequence(list(map(torch.tensor, ids)), batch_first=True)
    place = torch.arange(6)[None]
    attended = (place < torch.tensor([[5], [4], [4], [6]])).long()
    answer = attended * (place >= torch.tensor([[3], [2], [3], [2]]))
    batch = {"input_ids": input_ids, "attention_mask": attended, "completion_mask": answer}
    batch |= dict.fromkeys(("ref_chosen_logps", "ref_rejected_logps"), torch.zeros(2))
    loss = PreferenceLoss("orpo", BETA, per_token=True)
    result = Objective(loss, nll_weight=1.0, nll_of_prompts=True)(model, batch)
    with torch.no_grad():
        logits = model(input_ids=input_ids, attention_mask=attended).logits[:, :-1].float()
        logps = logits.log_softmax(-1).gather(2, input_ids[:, 1:, None])[..., 0]
    likelihood = -logps[:2][attended[:2, 1:] == 1].mean()
    sums = (logps * answer[:, 1:]).sum(1)
    rewards = sums / answer.sum(1)
    expected = loss(rewards[:2], rewards[2:]).mean() + likelihood
    torch.testing.assert_close(result.loss.detach(), expected)
    torch.testing.assert_close(result.chosen_logps.detach(), sums[:2])


@pytest.mark.parametrize("kind", ["dpo", "orpo"])
@pytest.mark.parametrize("name", ["Llama", "Mixtral"])
def test_without_padding_loss_and_gradients_are_the_same(name, kind, monkeypatch):
    """The kernel that needs a GPU is SDPA here, one sequence after the other."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_in_segments", in_segments)
    model = build(MODELS[name][0])
    lengths = torch.tensor([[9, 4], [5, 2], [7, 3], [12, 5]])  # of prompt and answer, of the prompt
    place = torch.arange(12)[None]
    attended = (place < lengths[:, :1]).long()
    batch = {"input_ids": torch.arange(3, 51).view(4, 12), "attention_mask": attended}
    batch |= {"completion_mask": attended * (place >= lengths[:, 1:])}
    batch |= {f"ref_{side}_logps": torch.tensor([-9.0, -20.0]) for side in ("chosen", "rejected")}
    keys = {"nll_weight": 1.0, "nll_of_prompts": True} if kind == "orpo" else {}
    if name == "Mixtral":
        keys["router_weight"] = 0.5
    passed, found = [], []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: passed.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    for padding_free in (False, True):
        model.config._attn_implementation = "flash_in_segments" if padding_free else "sdpa"
        forward._KNOWN.pop(model, None)
        abilities(model)
        passed.clear()
        model.zero_grad()
        result = Objective(PreferenceLoss(kind, BETA), **keys, padding_free=padding_free)(
            model, batch
        )
        result.loss.backward()
        found.append([result.loss, result.chosen_logps, result.rejected_logps])
        found[-1] += [weight.grad.clone() for weight in model.parameters()]
        assert passed == [(1, 33) if padding_free else (4, 12)]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_model_that_cannot_tell_packed_sequences_apart_is_not_trained_without_padding(model):
    ones = torch.ones(2, 4, dtype=torch.long)
    batch = dict.fromkeys(("input_ids", "attention_mask", "completion_mask"), ones)
    with pytest.raises(ValueError, match="Remove dpo_padding_free"):
        Objective(PreferenceLoss("dpo", BETA), padding_free=True)(model, batch)


def test_figures_of_a_micro_batch_by_hand(model):
    """Rewards of chosen 0 and 1, of rejected 0 and 0: two rewards that are equal rank nothing."""
    ones = torch.ones(4, 4, dtype=torch.long)
    batch = {"input_ids": torch.arange(2, 18).view(4, 4), "attention_mask": ones}
    batch |= {"completion_mask": torch.tensor([0, 0, 1, 1]) * ones}
    batch |= dict.fromkeys(("ref_chosen_logps", "ref_rejected_logps"), torch.zeros(2))
    objective = Objective(PreferenceLoss("dpo", BETA))
    policy = objective(model, batch)
    batch["ref_chosen_logps"] = policy.chosen_logps.detach() - torch.tensor([0.0, 1.0])
    batch["ref_rejected_logps"] = policy.rejected_logps.detach()
    found = objective(model, batch).metrics
    expected = {
        "rewards/accuracies": 1 / 2,
        "rewards/chosen": BETA / 2,
        "rewards/rejected": 0,
        "rewards/margins": BETA / 2,
        # log 2 without a margin, log(1 + e^-0.5) with one of 1.
        "loss": (math.log(2) + math.log1p(math.exp(-BETA))) / 2,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-5)
