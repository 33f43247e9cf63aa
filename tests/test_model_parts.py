"""Sampling, snapshots and the gate on a small real model."""

import math
import signal
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from sera_plugin.algorithm.method import SamplingSettings
from sera_plugin.model.losses import (
    FLOAT32_LIMIT,
    LOW_PRECISION_LIMIT,
    PreferenceLoss,
    check_step_zero,
)
from sera_plugin.model.policies import PolicyHistory, restore_snapshot, take_snapshot
from sera_plugin.rundir.ranks import WHOLE, Shard
from sera_plugin.rundir.store import RunStore
from sera_plugin.sampling.transformers import TransformersSampler
from sera_plugin.tools.demo.base_model import load_model
from tests.conftest import ids


@pytest.fixture(scope="module")
def tokenizer(world):
    return load_model(world.base)[1]


SETTINGS = SamplingSettings(4, 1.0, 0.95, 10, 48, (2,), seed=3)


def sampled(model, prompts, settings=SETTINGS, skip=(), shard=WHOLE):
    chunks = TransformersSampler(model, 0, 150, shard=shard).sample(prompts, settings, skip=skip)
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


def test_a_part_of_the_rows_gets_what_it_gets_in_the_whole(model):
    prompts = ids(7, 9, 8, 9, 7)
    whole = sampled(model, prompts)
    first = next(iter(TransformersSampler(model, 0, 150).sample(prompts, SETTINGS)))
    for done in ({row for row, _ in first}, {1}):  # a batch, and a part of one
        rest = {row: found for row, found in whole.items() if row not in done}
        assert sampled(model, prompts, skip=done) == rest != {}
    one, other = (sampled(model, prompts, shard=Shard(index, 2)) for index in range(2))
    assert 0 < len(one) < len(whole) == len(one) + len(other)
    assert one | other == whole


def test_candidates_end_once_or_are_cut_off_at_the_end_of_the_context(model):
    settings = SamplingSettings(4, 1.0, 1.0, 10, 20, (2,), seed=1)
    prompts = ids(7, 12, 19, 5)
    for row, found in sampled(model, prompts, settings).items():
        room = min(10, 20 - len(prompts[row]))
        for one in found:
            stopped = one.finish_reason == "stop"
            assert one.token_ids.count(2) == stopped
            assert (one.token_ids[-1] == 2) == stopped
            assert len(one.token_ids) <= room if stopped else len(one.token_ids) == room
    with pytest.raises(ValueError, match="has 20 tokens, which leaves no room"):
        sampled(model, ids(20), settings)


def test_the_models_own_generation_config_does_not_leak_in(model):
    expected = sampled(model, ids(7, 9))
    model.generation_config.update(top_k=1, repetition_penalty=5.0, min_new_tokens=9)
    assert sampled(model, ids(7, 9)) == expected


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


@pytest.mark.parametrize("kept", [True, False])
def test_another_policy_is_there_inside_the_block_and_gone_after_it(model, history, kept):
    history.current = None  # from an iteration's first step on
    if kept:
        history.keep_current(1)
    trained = take_snapshot(model)
    name = next(iter(trained))
    storage = model.get_parameter(name).data_ptr()
    with pytest.raises(KeyboardInterrupt), history.at(0):  # noqa: PT012
        assert torch.equal(take_snapshot(model)[name] + 1, trained[name])
        assert model.get_parameter(name).data_ptr() == storage
        raise KeyboardInterrupt
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


@pytest.mark.parametrize("kind", ["full", "mixed", "lora"])
def test_a_policy_read_from_disk_is_the_one_that_was_kept(model, tokenizer, tmp_path, kind):
    if kind == "lora":
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    if kind == "mixed":  # the first weight is not of the widest type
        model.bfloat16().model.norm.float()
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
    with pytest.raises(ValueError, match="extra"):
        restore_snapshot(model, kept | {"extra": torch.zeros(1)})


NONE = (0.0, 0.0, 0.0, 0.0)
DPO, IPO = PreferenceLoss("dpo", 0.2), PreferenceLoss("ipo", 1.0)
SIMPO = PreferenceLoss("simpo", 1.0, per_token=True)
LONG = {"tokens": 259, "limit": LOW_PRECISION_LIMIT}


def gate(off, loss=None, function=DPO, limit=FLOAT32_LIMIT, tokens=10):
    """The gate for two pairs whose log pi are off by so many nats, or for means of these."""
    reference = torch.tensor([[-20.0, -22.0], [-30.0, -30.0]])
    inputs = {"completion_mask": torch.ones(4, tokens)}
    inputs |= {"ref_chosen_logps": reference[0], "ref_rejected_logps": reference[1]}
    found = reference + torch.tensor(off).view(2, -1)
    if len(off) == 2:
        found = found.mean(dim=1)
    loss = None if loss is None else torch.tensor(loss)
    return check_step_zero(inputs, *found, limit, loss, function)


@pytest.mark.parametrize(
    ("off", "loss", "function", "keys"),
    [
        (NONE, math.log(2), DPO, LONG),
        # Rewards -2.0 and -2.2 against -3.0 per token, beta 1.
        (NONE, math.log((1 + math.e**-1) * (1 + math.e**-0.8)) / 2, SIMPO, {}),
        # A margin of 0.6 nats: summed IPO with beta 1 has (0.6 - 0.5)^2; the reference has 0.25.
        ((0.3, 0, -0.3, 0), 0.26 / 2, IPO, LONG),
    ],
)
def test_gate_passes_the_reference_and_a_loss_that_multiplies_rounding(off, loss, function, keys):
    figures = gate(off, loss, function, **keys)
    assert figures["nats_per_root_token"] == pytest.approx(max(off) / math.sqrt(259), abs=1e-4)
    assert figures["expected_loss"] == pytest.approx(loss, abs=1e-4)


@pytest.mark.parametrize(("limit", "nats"), [(FLOAT32_LIMIT, 0.01), (LOW_PRECISION_LIMIT, 0.2)])
@pytest.mark.parametrize("tokens", [1, 16, 400])
def test_gate_allows_more_to_longer_answers_and_judges_each(limit, nats, tokens):
    allowed = nats * math.sqrt(tokens)  # of opposite sign: their mean would be right
    gate((0.9 * allowed, -0.9 * allowed, 0.0, 0.0), limit=limit, tokens=tokens)
    with pytest.raises(ValueError, match="step-0 gate"):
        gate((1.1 * allowed, -1.1 * allowed, 0.0, 0.0), limit=limit, tokens=tokens)


@pytest.mark.parametrize(
    ("off", "loss", "cause"),
    [
        ((0.0, 0.0, 0.0, math.nan), None, "kernel"),
        ((-0.1, 0.0), None, "kernel"),  # means, which is all that the host's own losses leave
        (NONE, 1.018, "another plugin"),
        (NONE, math.nan, "another plugin"),
        ((-0.1, -0.1, 0.0, 0.0), 1.018, "kernel"),
    ],
)
def test_gate_stops_anything_else_and_names_its_cause(off, loss, cause):
    with pytest.raises(ValueError, match="step-0 gate") as stopped:
        gate(off, loss)
    for other in ("kernel", "another plugin"):
        both = loss is not None and any(off)
        assert (other in str(stopped.value)) == (both or other == cause)
