"""Weights of which each process holds a part: FSDP2's DTensors.

FSDP2 shards a model in place. Between two forward passes a module's parameters are either the
parts (DTensors) or, where they were not given back, whole tensors that the next pass throws away.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

#: What activation checkpointing puts between the names of modules, once the model is sharded.
_WRAPPED = "_checkpoint_wrapped_module."


def is_sharded(model: nn.Module) -> bool:
    """Whether a forward pass is a collective call of all processes."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """The trainable weights by the names they had before the model was sharded."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return {
        name.replace(_WRAPPED, ""): weight
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }


def local(weight: Tensor) -> Tensor:
    """This process's part of a weight, which shares the weight's storage."""
    weight = weight.detach()
    return weight.to_local() if isinstance(weight, DTensor) else weight


def part_of(whole: Tensor, weight: Tensor, source: int | None = None) -> Tensor:
    """This process's part of a tensor, cut as a weight is.

    Args:
        whole: of the weight's full shape.
        weight: a DTensor, or any tensor, of which the whole is the part.
        source: the rank whose `whole` counts, in a collective call; None takes each rank's own.
    """
    if not isinstance(weight, DTensor):
        return whole
    cut = distribute_tensor(
        whole.to(weight.dtype), weight.device_mesh, weight.placements, src_data_rank=source
    )
    return cut.to_local()


@torch.no_grad()
def whole_weights(model: nn.Module, trainable_only: bool) -> dict[str, Any]:
    """Gather a state dict into rank 0's host memory; the other ranks take part and get {}."""
    options = StateDictOptions(
        full_state_dict=True, cpu_offload=True, ignore_frozen_params=trainable_only
    )
    state = get_model_state_dict(model, options=options)
    # Tied weights are gathered one by one; told apart they would be written twice.
    first: dict[int, str] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        name = name.replace(_WRAPPED, "")
        if name in state:
            state[name] = state[first.setdefault(id(weight), name)]
    return state
