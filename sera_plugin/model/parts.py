"""Weights of which a process has a part: under FSDP2, and under DeepSpeed's ZeRO-3.

FSDP2 shards a model in place. Between two forward passes a module's parameters are either the
parts (DTensors) or, where they were not given back, whole tensors that the next pass throws away.
ZeRO-3 leaves a parameter empty: its part is an attribute, `ds_tensor`, flat and filled up to the
same length on every rank. Facts are of torch 2.13 and deepspeed 0.18.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import get_rank
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

#: What activation checkpointing puts between the names of modules, once the model is sharded.
_WRAPPED = "_checkpoint_wrapped_module."
#: Where a model has its engine's way to give whole weights back, also those still on their way.
_RELEASE = "_sera_release"


def hold_engine(model: nn.Module, engine: Any) -> None:
    """DeepSpeed's engine of a model has been made."""
    if is_sharded(model):
        setattr(model, _RELEASE, engine.empty_partition_cache)


def is_sharded(model: nn.Module) -> bool:
    """Whether a forward pass is a collective call of all processes."""
    return any(isinstance(module, FSDPModule) for module in model.modules()) or any(
        map(_in_zero, model.parameters())
    )


def forget_moments(model: nn.Module, optimizer: Any) -> None:
    """DeepSpeed's `optimizer` begins anew: ZeRO-1 and 2 would hold on to what its state was."""
    for weight in model.parameters():
        if (mapping := getattr(weight, "_hp_mapping", None)) is not None:
            mapping.optim_fragment = None
    if hasattr(optimizer, "_hp_optimizer_states_linked"):
        optimizer._hp_optimizer_states_linked = False


def _in_zero(weight: Any) -> bool:
    return getattr(weight, "ds_tensor", None) is not None


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """The trainable weights by the names they had before the model was sharded, in parts again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    getattr(model, _RELEASE, lambda: None)()
    return {
        name.replace(_WRAPPED, ""): weight
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }


def whole_shape(weight: Any) -> torch.Size:
    """The shape of a weight that may be in parts."""
    shape: torch.Size = weight.ds_shape if _in_zero(weight) else weight.shape
    return shape


def elements(weight: Any) -> int:
    """Elements of a process's part of a weight, the same for all processes."""
    if _in_zero(weight):
        return int(weight.ds_tensor.numel())
    processes = weight.device_mesh.size() if isinstance(weight, DTensor) else 1
    return math.ceil(weight.numel() / processes)


def count_weights(model: Any, exclude_embeddings: bool = False) -> int:
    """transformers' `num_parameters`, also of a model in ZeRO-3's parts."""
    if not any(map(_in_zero, model.parameters())):
        return int(model.num_parameters(exclude_embeddings=exclude_embeddings))
    tables = [one.weight for one in model.modules() if isinstance(one, nn.Embedding)]
    left_out = set(map(id, tables)) if exclude_embeddings else set()
    return sum(whole_shape(one).numel() for one in model.parameters() if id(one) not in left_out)


def local(weight: Any) -> Tensor:
    """This process's part of a weight, which shares the weight's storage."""
    if _in_zero(weight):
        part: Tensor = weight.ds_tensor.detach()
        return part[: max(0, weight.ds_numel - _first(weight))]  # without what fills it up
    here: Tensor = weight.detach()
    return here.to_local() if isinstance(here, DTensor) else here


def _first(weight: Any) -> int:
    """Where this process's part begins in a weight of ZeRO-3."""
    return int(get_rank(weight.ds_process_group) * weight.ds_tensor.numel())


def part_of(whole: Tensor, weight: Any, source: int | None = None) -> Tensor:
    """This process's part of a tensor, cut as a weight is: of rank `source`'s, None for its own."""
    if _in_zero(weight):
        if _in_zero(whole):  # a model that is loaded under ZeRO-3 comes in parts
            return local(whole)
        first, size = _first(weight), weight.ds_tensor.numel()
        return whole.flatten()[first : first + size].to(weight.dtype)
    if not isinstance(weight, DTensor):
        return whole
    mesh, placements = weight.device_mesh, weight.placements
    cut = distribute_tensor(whole.to(weight.dtype), mesh, placements, src_data_rank=source)
    return cut.to_local()


@torch.no_grad()
def whole_weights(model: nn.Module, trainable_only: bool) -> dict[str, Any]:
    """Gather a state dict into rank 0's host memory; the other ranks take part and get {}."""
    if any(map(_in_zero, model.parameters())):
        state = _gathered(model, trainable_only)
    else:
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


def _gathered(model: nn.Module, trainable_only: bool) -> dict[str, Any]:
    """The same under ZeRO-3, one weight at a time, as no more may fit."""
    import deepspeed

    trainable(model)
    weights = dict(model.named_parameters(remove_duplicate=False))
    state: dict[str, Any] = {} if trainable_only else dict(model.state_dict())
    state = {name: value for name, value in state.items() if name not in weights}  # buffers
    main = get_rank() == 0
    for name, weight in weights.items():
        if weight.requires_grad or not trainable_only:
            with deepspeed.zero.GatheredParameters([weight]):
                if main:
                    state[name] = weight.detach().to("cpu", copy=True)
    return state if main else {}
