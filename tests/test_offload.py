"""Room for an engine: what it is told, what would move. Nothing moves on a CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit

from sera_plugin.rundir.ranks import Ranks
from sera_plugin.sampling import offload
from sera_plugin.sampling.offload import engine_needs, make_room, resident_tensors
from sera_plugin.sampling.vllm import Memory

GIB = 2**30


def test_what_an_engine_needs_by_hand(model):
    text = model.config
    per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 2
    assert engine_needs(model, 48, 2) == (2 * model.num_parameters(), 32 * 48 * per_token)


@pytest.mark.parametrize(
    ("available", "ranks", "cache", "fits"),
    [(64 * GIB, 1, 16, True), (64 * GIB, 4, 4, True), (6 * GIB, 2, 1, False)],
)
def test_on_a_cpu_ranks_share_the_hosts_memory(model, monkeypatch, available, ranks, cache, fits):
    found = type("Found", (), {"available": available})
    monkeypatch.setattr(offload.psutil, "virtual_memory", lambda: found)
    monkeypatch.setattr(offload, "engine_needs", lambda *_: (2 * GIB, 2 * GIB))
    with make_room(model, None, 2, {}, Ranks(0, ranks, ranks), 48) as memory:
        assert memory == Memory(None, fits, cache_gib=cache)


def test_everything_that_lies_on_the_device_is_found_once_but_what_moves_by_itself(model):
    optimizer = torch.optim.AdamW(model.parameters())
    first = next(model.parameters())
    model(input_ids=torch.tensor([[1, 5, 7]])).logits.sum().backward()
    optimizer.step()
    wanted = [first, first.grad, *optimizer.state[first].values(), *model.buffers()]
    paged = optimizer.state[first]["paged"] = torch.zeros(2)
    paged.is_paged = True
    found = {id(tensor) for tensor in resident_tensors(model, optimizer)}
    assert len(found) == len(resident_tensors(model, optimizer))
    assert found.issuperset(map(id, wanted))
    assert id(paged) not in found


def test_scales_of_four_bit_weights_are_found():
    layer = Linear4bit(64, 64, quant_type="nf4", compress_statistics=True)
    layer.load_state_dict(torch.nn.Linear(64, 64).state_dict())
    layer = layer.to("cpu")
    state = layer.weight.quant_state
    assert isinstance(state, QuantState)
    found = {id(tensor) for tensor in resident_tensors(layer, None)}
    for tensor in (layer.weight, state.absmax, state.code, state.state2.absmax, state.state2.code):
        assert id(tensor) in found


def test_an_engine_gets_what_all_of_its_devices_have():
    class Four(Ranks):
        def sum(self, values):
            return values + np.where(values == 0, np.array([9.0, 7.0, 5.0, 8.0]), 0)

    frees = [offload._least_free(100, 2, Four(rank, 4, 4)) for rank in range(4)]
    assert frees == [7, 9, 8, 5]
    assert offload._least_free(100, 2, Ranks()) == 100
