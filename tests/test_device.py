"""Tensors go to where passes are made; there is no GPU here, so that device is only named."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from sera_plugin.algorithm.method import SamplingSettings
from sera_plugin.config.sera import SeraConfig
from sera_plugin.model import forward
from sera_plugin.model.budget import TokenBudget
from sera_plugin.model.forward import Targets, abilities
from sera_plugin.model.losses import Objective, PreferenceLoss
from sera_plugin.model.scoring import score_sequences
from sera_plugin.rundir.ranks import WHOLE, Ranks
from sera_plugin.rundir.store import RunStore
from sera_plugin.sampling import samplers
from sera_plugin.sampling.offload import make_room
from sera_plugin.sampling.samplers import Choice, Samplers
from sera_plugin.sampling.transformers import TransformersSampler
from tests.conftest import ids
from tests.tiny_models import MODELS, build

SETTINGS = SamplingSettings(1, 1.0, 1.0, 6, 48, (2,), seed=3)


class Reached(Exception):
    """A pass would begin now."""


@pytest.mark.parametrize("known", [False, True])
def test_what_is_scored_goes_to_the_accelerator_wherever_weights_rest(model, monkeypatch, known):
    """FSDP2 with `offload_params` keeps weights in host memory between passes."""
    if known:
        abilities(model)
    budget = TokenBudget(9, device="meta")

    def passes(model, inputs, *_):
        raise Reached(inputs["input_ids"].device.type)

    monkeypatch.setattr("sera_plugin.model.scoring.forward_logps", passes)
    monkeypatch.setattr(forward, "forward_logps", passes)
    with pytest.raises(Reached, match="meta"):
        score_sequences(model, ids(4), ids(5), pad_id=0, budget=budget)


def test_a_step_tries_what_a_model_takes_where_the_step_is(model, monkeypatch):
    inputs, targets = forward.collate(ids(4), ids(5), [(0,)], 0, "meta")

    def collate(*args):
        raise Reached(*args[4:5])

    monkeypatch.setattr(forward, "collate", collate)
    with pytest.raises(Reached, match="meta"):
        forward.forward_logps(model, inputs, targets)


def test_prompts_go_to_the_accelerator_too(model, monkeypatch):
    def generate(**keys):
        raise Reached(*{keys[name].device.type for name in ("input_ids", "attention_mask")})

    monkeypatch.setattr(model, "generate", generate)
    with pytest.raises(Reached, match="meta"):
        list(TransformersSampler(model, 0, 99, device="meta").sample(ids(4), SETTINGS))


def test_room_for_an_engine_is_made_on_the_accelerator(model, monkeypatch):
    def free(device):
        raise Reached(device)

    monkeypatch.setattr(torch.cuda, "mem_get_info", free)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    gpu = torch.device("cuda", 1)
    with pytest.raises(Reached, match="cuda:1"), make_room(model, gpu, None, 2, {}, Ranks(), 48):
        pass


def test_samplers_take_the_scorers_device(model, tmp_path, monkeypatch):
    device = torch.device("cuda", 1)
    card = SimpleNamespace(total_memory=2**34)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    other = {"pad_id": 0, "autocast": nullcontext, "shard": WHOLE}
    policies = SimpleNamespace(model=model, is_adapter=False, at=int)
    scorer = SimpleNamespace(policies=policies, budget=TokenBudget(9, device=device), **other)
    cfg = {"sequence_len": 48, "base_model": "x", "torch_dtype": torch.float32}
    made = Samplers(cfg, SeraConfig(), RunStore(tmp_path), scorer, None)
    assert made._sampler(1, None).budget.device == device
    monkeypatch.setattr(samplers, "damage", lambda path: None)
    made.choice = Choice("vllm", "as asked")
    assert made._sampler(1, None).make_room.args[1] == device


@pytest.fixture
def elsewhere():
    """A model on another device, where an operation of tensors on two devices is an error.

    Fake tensors have a device and a shape, but no values. That device is `meta`: of fake CUDA
    tensors autograd aborts the process where torch was built without CUDA. What reads values is not
    followed: `Targets.of` (nonzero, tolist), `abilities` (allclose), the slice of whole logits
    (item), the figures of a step (tolist).
    """
    model = build(MODELS["Llama"][0])
    abilities(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield model.to("meta")


def trained_on(model, loss, device="meta"):
    loss.backward()
    assert {weight.grad.device.type for weight in model.parameters()} == {device}


@pytest.mark.parametrize(
    ("lines", "packed"),
    [([(0,), (1,), (2,)], False), ([(0,), (1,), (2,)], True), ([(0, 1), (2,)], False)],
)
def test_every_layout_is_passed_on_one_device(elsewhere, lines, packed):
    inputs, targets = forward.collate(ids(9, 9, 5), ids(8, 5, 3), lines, 0, "meta", packed)
    given = [one for one in (*inputs.values(), *vars(targets).values()) if torch.is_tensor(one)]
    assert {one.device.type for one in given} == {"meta"}
    logps, _ = forward.forward_logps(elsewhere, inputs, targets)
    assert isinstance(logps, FakeTensor)
    assert logps.shape == (3,)
    trained_on(elsewhere, logps.sum())


@pytest.mark.parametrize("kind", ["dpo", "robust", "slic", "ipo", "simpo", "kto_pair", "orpo"])
def test_a_step_is_made_on_one_device(elsewhere, monkeypatch, kind):
    lines = [(index,) for index in range(4)]
    inputs, targets = forward.collate(ids(9, 4, 9, 4), ids(8, 5, 3, 6), lines, 0, "meta")
    monkeypatch.setattr(Targets, "of", lambda *_: targets)
    inputs["completion_mask"] = inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        inputs[name] = torch.zeros(2, device="meta")
    loss = PreferenceLoss(kind, 0.1, per_token=kind == "orpo")
    figures = []

    def mean(metrics):
        figures.append(metrics.device.type)
        return np.zeros(len(metrics))

    result = Objective(loss, nll_weight=0.1, mean=mean)(elsewhere, inputs)
    assert figures == ["meta"]
    trained_on(elsewhere, result.loss)
