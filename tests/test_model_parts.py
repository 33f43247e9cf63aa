"""Scoring, sampling, snapshots and the gate on a small real model."""

from __future__ import annotations

import math
import signal
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from sera_plugin.algorithm.protocols import SamplingSettings
from sera_plugin.model.budget import TokenBudget, batches_by_length
from sera_plugin.model.gate import FLOAT32_LIMIT, LOW_PRECISION_LIMIT, check_step_zero
from sera_plugin.model.losses import PreferenceLoss
from sera_plugin.model.policies import PolicyHistory
from sera_plugin.model.scoring import score_sequences
from sera_plugin.model.weights import restore_snapshot, take_snapshot
from sera_plugin.rundir.ranks import Shard
from sera_plugin.rundir.store import RunStore
from sera_plugin.sampling.transformers import TransformersSampler
from sera_plugin.tools.demo.base_model import load_model
from tests.conftest import ids


@pytest.fixture(scope="module")
def tokenizer(world):
    return load_model(world.base)[1]


# ------------------------------------------------------------------ log-probabilities


def test_batches_hold_every_index_once_within_the_budget():
    lengths = [5, 30, 7, 7, 2, 11]
    batches = list(batches_by_length(lengths, 16))
    assert sorted(i for batch in batches for i in batch) == list(range(6))
    assert batches[0] == [1]
    for batch in batches[1:]:
        assert max(lengths[i] for i in batch) * len(batch) <= 16


def test_scoring_leaves_the_model_in_its_mode(model):
    for mode in (True, False):
        model.train(mode)
        score_sequences(model, ids(3), ids(3), pad_id=0, budget=TokenBudget(99))
        assert model.training == mode


# ------------------------------------------------------------------ sampling

SETTINGS = SamplingSettings(4, 1.0, 0.95, 10, 48, (2,), seed=3)


def sampled(model, prompts, settings=SETTINGS, budget=150, skip=()):
    chunks = TransformersSampler(model, 0, budget).sample(prompts, settings, skip=skip)
    return {row: found for chunk in chunks for row, found in chunk}


def test_the_same_seed_gives_the_same_and_leaves_the_training_random_stream_alone(model):
    prompts = ids(7, 9, 8, 9, 7)
    first = sampled(model, prompts)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert sampled(model, prompts) == first
    assert torch.equal(torch.rand(3), expected)
    assert sorted(first) == list(range(5))
    assert all(len(found) == 4 for found in first.values())
    assert sampled(model, prompts, replace(SETTINGS, seed=4)) != first


def test_skipped_rows_do_not_change_the_others(model):
    prompts = ids(7, 9, 8, 9, 7)
    whole = sampled(model, prompts)
    first = next(iter(TransformersSampler(model, 0, 150).sample(prompts, SETTINGS)))
    for done in ({row for row, _ in first}, {1}):  # a batch, and a part of one
        rest = sampled(model, prompts, skip=done)
        assert rest
        assert rest == {row: found for row, found in whole.items() if row not in done}


def test_shards_together_give_the_same_candidates(model):
    prompts, parts = ids(7, 9, 8, 9, 7), {}
    for index in range(2):
        sampler = TransformersSampler(model, 0, 150, shard=Shard(index, 2))
        part = {row: found for chunk in sampler.sample(prompts, SETTINGS) for row, found in chunk}
        assert part
        assert not part.keys() & parts.keys()
        parts |= part
    assert parts == sampled(model, prompts)


def test_shards_together_give_the_same_scores(model):
    prompts, completions = ids(3, 9, 5, 5), ids(8, 2, 1, 12, seed=1)
    keys = {"pad_id": 0, "budget": TokenBudget(24)}
    parts = [
        score_sequences(model, prompts, completions, shard=Shard(index, 2), **keys)
        for index in range(2)
    ]
    assert all(part.any() for part in parts)
    whole = score_sequences(model, prompts, completions, **keys)
    np.testing.assert_array_equal(parts[0] + parts[1], whole)


def test_candidates_end_once_or_are_cut_off(model):
    for found in sampled(model, ids(7, 7, 7, 7, 7, 7)).values():
        for one in found:
            stopped = one.finish_reason == "stop"
            assert one.token_ids.count(2) == stopped
            assert (one.token_ids[-1] == 2) == stopped
            assert stopped or len(one.token_ids) == 10


def test_prompt_and_candidate_stay_within_the_context(model):
    settings = SamplingSettings(4, 1.0, 1.0, 30, 20, (2,), seed=1)
    prompts = ids(12, 19, 5)
    for row, found in sampled(model, prompts, settings).items():
        assert max(len(one.token_ids) for one in found) <= 20 - len(prompts[row])
    with pytest.raises(ValueError, match="has 20 tokens, which leaves no room"):
        sampled(model, ids(20), settings)


def test_the_models_own_generation_config_does_not_leak_in(model):
    prompts = ids(7, 9)
    expected = sampled(model, prompts)
    model.generation_config.top_k = 1
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.min_new_tokens = 9
    assert sampled(model, prompts) == expected


# ------------------------------------------------------------------ policies


@pytest.fixture
def history(model, tokenizer, tmp_path):
    """theta_0 is kept, and the model has been trained since."""
    history = PolicyHistory(model, RunStore(tmp_path), "base", tokenizer)
    history.keep_initial(recorded=False)
    change(model, lambda weight: weight.add_(1.0))
    return history


@torch.no_grad()
def change(model, how):
    for weight in model.parameters():
        if weight.requires_grad:
            how(weight)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_another_policy_is_there_inside_the_block_and_gone_after_it(model, history):
    history.keep_current(1)
    trained = take_snapshot(model)
    name = next(iter(trained))
    storage = model.get_parameter(name).data_ptr()
    with pytest.raises(KeyboardInterrupt), history.at(0):  # noqa: PT012
        assert torch.equal(take_snapshot(model)[name] + 1, trained[name])
        assert model.get_parameter(name).data_ptr() == storage
        raise KeyboardInterrupt
    assert same(take_snapshot(model), trained)


def test_training_between_two_visits_of_another_policy_is_not_undone(model, history):
    history.current = None  # from an iteration's first step on
    trained = take_snapshot(model)
    with history.at(0):
        pass
    assert same(take_snapshot(model), trained)


def test_ctrl_c_while_another_policy_is_in_the_model_meets_the_one_in_training(model, history):
    """The host's handler saves the model as it is, and ends."""
    history.keep_current(1)
    trained, saved = take_snapshot(model), []

    def host_handler(number, frame):
        saved.append(take_snapshot(model))
        raise SystemExit

    before = signal.signal(signal.SIGINT, host_handler)
    try:
        with pytest.raises(SystemExit), history.at(0):
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is host_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert same(saved[0], trained)


@pytest.mark.parametrize("lora", [False, True])
def test_a_policy_read_from_disk_is_the_one_that_was_kept(model, tokenizer, tmp_path, lora):
    if lora:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    store = RunStore(tmp_path)
    history = PolicyHistory(model, store, "base", tokenizer)
    history.keep_initial(recorded=False)
    change(model, lambda weight: weight.add_(torch.randn_like(weight)))
    history.keep_current(1)
    kept = take_snapshot(model)
    assert not list(store.policy(2).glob("*.bin"))
    change(model, torch.Tensor.zero_)
    fresh = PolicyHistory(model, store, "base", tokenizer)
    fresh.current = None
    with fresh.at(1):
        assert same(take_snapshot(model), kept)
    assert not any(weight.any() for weight in take_snapshot(model).values())


def test_a_snapshot_of_other_weights_is_refused(model):
    with pytest.raises(ValueError, match="extra"):
        restore_snapshot(model, take_snapshot(model) | {"extra": torch.zeros(1)})


# ------------------------------------------------------------------ the gate

DPO = PreferenceLoss("dpo", 0.2)


def gate(chosen, rejected, loss=None, function=DPO, limit=FLOAT32_LIMIT, tokens=10):
    inputs = {
        "completion_mask": torch.ones(4, tokens),
        "ref_chosen_logps": torch.tensor([-20.0, -22.0]),
        "ref_rejected_logps": torch.tensor([-30.0, -30.0]),
    }
    chosen, rejected = torch.tensor(chosen), torch.tensor(rejected)
    loss = None if loss is None else torch.tensor(loss)
    return check_step_zero(inputs, chosen, rejected, limit, loss, function)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (DPO, math.log(2)),
        # Rewards -2.1 and -3.0 per token, beta 1.
        (
            PreferenceLoss("simpo", 1.0, per_token=True),
            (math.log1p(math.exp(-1.0)) + math.log1p(math.exp(-0.8))) / 2,
        ),
    ],
)
def test_gate_passes_the_reference_itself_and_knows_its_loss(loss, expected):
    figures = gate([-20.0, -22.0], [-30.0, -30.0], expected, loss)
    assert figures["nats_per_token"] == figures["nats_per_root_token"] == 0
    assert figures["expected_loss"] == pytest.approx(expected, abs=1e-6)


def test_gate_passes_a_loss_that_multiplies_rounding():
    """A margin of 0.6 nats: summed IPO with beta 1 has (0.6 - 0.5)^2; the reference has 0.25."""
    chosen, rejected = [-19.7, -22.0], [-30.3, -30.0]
    loss = ((0.6 - 0.5) ** 2 + 0.25) / 2
    figures = gate(chosen, rejected, loss, PreferenceLoss("ipo", 1.0), LOW_PRECISION_LIMIT, 259)
    assert figures["expected_loss"] == pytest.approx(loss, abs=1e-4)
    assert figures["nats_per_root_token"] == pytest.approx(0.3 / math.sqrt(259), abs=1e-4)


@pytest.mark.parametrize("tokens", [1, 16, 400])
def test_gate_allows_more_to_longer_answers_and_judges_each(tokens):
    allowed = LOW_PRECISION_LIMIT * math.sqrt(tokens)
    # Of opposite sign: their mean would be right.
    for share in (0.9, 1.1):
        chosen = [-20.0 + share * allowed, -22.0 - share * allowed]
        call = partial(gate, chosen, [-30.0, -30.0], limit=LOW_PRECISION_LIMIT, tokens=tokens)
        with nullcontext() if share < 1 else pytest.raises(ValueError, match="step-0 gate"):
            call()


@pytest.mark.parametrize(
    ("limit", "passes", "stops"), [(FLOAT32_LIMIT, 0.03, 0.05), (LOW_PRECISION_LIMIT, 0.7, 0.9)]
)
def test_gate_has_a_limit_for_each_precision(limit, passes, stops):
    """Sixteen tokens: four times 0.01 nats in float32, four times 0.2 in less."""
    gate([-20.0, -22.0 + passes], [-30.0, -30.0], limit=limit, tokens=16)
    with pytest.raises(ValueError, match="step-0 gate"):
        gate([-20.0, -22.0 + stops], [-30.0, -30.0], limit=limit, tokens=16)


@pytest.mark.parametrize(
    ("chosen", "rejected", "loss"),
    [
        ([-20.0, -22.1], [-30.0, -30.0], None),
        ([-20.0, -22.0], [-30.0, math.nan], None),
        (-21.1, -30.0, None),  # means, which is all that the host's own losses leave
        ([-20.0, -22.0], [-30.0, -30.0], 1.018),
        ([-20.0, -22.0], [-30.0, -30.0], math.nan),
    ],
)
def test_gate_stops_anything_else(chosen, rejected, loss):
    with pytest.raises(ValueError, match="step-0 gate"):
        gate(chosen, rejected, loss)
