"""Tensors go to where passes are made; there is no GPU here, so that device is only named."""

from types import SimpleNamespace

import pytest
import torch

from sera_plugin.algorithm.method import SamplingSettings
from sera_plugin.config.sera import SeraConfig
from sera_plugin.model import forward
from sera_plugin.model.budget import TokenBudget
from sera_plugin.model.forward import abilities
from sera_plugin.model.scoring import score_sequences
from sera_plugin.rundir.ranks import WHOLE, Ranks
from sera_plugin.rundir.store import RunStore
from sera_plugin.sampling import offload, samplers
from sera_plugin.sampling.offload import make_room
from sera_plugin.sampling.samplers import Choice, Samplers
from sera_plugin.sampling.transformers import TransformersSampler
from tests.conftest import ids

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

    monkeypatch.setattr(offload, "_free", free)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    gpu = torch.device("cuda", 1)
    with pytest.raises(Reached, match="cuda:1"), make_room(model, gpu, None, 2, {}, Ranks(), 48):
        pass


def test_samplers_take_the_scorers_device(model, tmp_path, monkeypatch):
    device, other = torch.device("meta"), {"pad_id": 0, "autocast": None, "shard": WHOLE}
    policies = SimpleNamespace(model=model, is_adapter=False, at=int)
    scorer = SimpleNamespace(policies=policies, budget=TokenBudget(9, device=device), **other)
    cfg = {"sequence_len": 48, "base_model": "x", "torch_dtype": torch.float32}
    made = Samplers(cfg, SeraConfig(), RunStore(tmp_path), scorer, None)
    assert made._sampler(1, None).budget.device == device
    monkeypatch.setattr(samplers, "damage", lambda path: None)
    made.choice = Choice("vllm", "as asked")
    assert made._sampler(1, None).make_room.args[1] == device
