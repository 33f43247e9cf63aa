"""An optimizer that is begun anew in place steps as a new one does."""

from copy import deepcopy

import bitsandbytes as bnb
import pytest
import torch
from axolotl.contribs.mit.muon.muon import MuonOptimizerFactory
from schedulefree import AdamWScheduleFree
from torch import nn
from torchao.optim import AdamW8bit

from sera_plugin.host.restart import Beginning


def muon(model: nn.Module) -> torch.optim.Optimizer:
    return MuonOptimizerFactory()(model, None, lr=1e-2, weight_decay=0.0)


OPTIMIZERS = {
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
    "fused": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9),
    "adagrad": lambda model: torch.optim.Adagrad(model.parameters(), lr=1e-2),
    "rmsprop": lambda model: torch.optim.RMSprop(model.parameters(), lr=1e-2, centered=True),
    "bitsandbytes": lambda model: bnb.optim.AdamW8bit(model.parameters(), 1e-2, min_8bit_size=1),
    "torchao": lambda model: AdamW8bit(model.parameters(), lr=1e-2, block_size=64),
    "schedule free": lambda model: AdamWScheduleFree(model.parameters(), lr=1e-2),
    "muon": muon,
}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    if hasattr(optimizer, "train"):
        optimizer.train()
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(8, 64, generator=generator)
        model(inputs).square().mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.nightly if name == "torchao" else ())  # it compiles
        for name in OPTIMIZERS
    ],
)
def test_an_optimizer_begun_anew_steps_as_a_new_one(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Tanh(), nn.Linear(64, 64, bias=False))
    optimizer = OPTIMIZERS[name](model)
    beginning = Beginning(optimizer)
    train(model, optimizer, 3)
    other = deepcopy(model)
    before = other[0].weight.clone()

    beginning.restore(optimizer, model)
    train(model, optimizer, 2)
    train(other, OPTIMIZERS[name](other), 2)
    assert not torch.equal(before, other[0].weight)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
