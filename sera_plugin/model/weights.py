"""The trainable weights of a model: whole or sharded, their snapshots, and PEFT adapters.

FSDP2 shards a model in place. Between two forward passes a module's parameters are either the
parts (DTensors) or, where they were not given back, whole tensors that the next pass throws away.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from sera_plugin.rundir.ranks import Ranks

#: Trainable weights by name in host memory; of sharded ones this process's part.
Snapshot = dict[str, Tensor]

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


def _local(weight: Tensor) -> Tensor:
    """This process's part of a weight, which shares the weight's storage."""
    weight = weight.detach()
    return weight.to_local() if isinstance(weight, DTensor) else weight


def part_of(whole: Tensor, weight: Tensor, source: int | None = None) -> Tensor:
    """This process's part of a tensor, cut as a weight is.

    In a collective call `source` is the rank whose `whole` counts; None takes each rank's own.
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


def take_snapshot(model: nn.Module) -> Snapshot:
    """Copy the trainable weights to host memory, bit for bit, in their own type."""
    return {name: _local(weight).to("cpu", copy=True) for name, weight in trainable(model).items()}


@torch.no_grad()
def restore_snapshot(model: nn.Module, snapshot: Snapshot) -> None:
    """Write a snapshot of the same weights into the model's own storage.

    One that was taken before the model was sharded holds whole weights, and is cut.
    """
    weights = trainable(model)
    if weights.keys() != snapshot.keys():
        differing = sorted(weights.keys() ^ snapshot.keys())[:3]
        raise ValueError(f"the snapshot's weights are not the model's: {', '.join(differing)}")
    for name, weight in weights.items():
        here, saved = _local(weight), snapshot[name]
        here.copy_(saved if saved.shape == here.shape else part_of(saved, weight))


def is_finite(model: nn.Module, ranks: Ranks) -> bool:
    """Whether no trainable weight is NaN or infinite, on any rank; a collective call."""
    found = [_local(weight).isfinite().all().cpu() for weight in trainable(model).values()]
    bad = np.array([0.0 if torch.stack(found).all() else 1.0])
    return not ranks.sum(bad).any()


def continue_adapter(model: Any, directory: str | None) -> tuple[Any, Snapshot | None]:
    """Load the adapter in `lora_model_dir`, which axolotl 0.19 ignores for DPO.

    Returns the model, and the weights of its adapter where it has one.
    """
    if directory and not isinstance(model, PeftModel):
        model = PeftModel.from_pretrained(model, directory, is_trainable=True)
    return model, take_snapshot(model) if isinstance(model, PeftModel) else None


def tidy_adapters(model: PeftModel, continued: Snapshot | None) -> None:
    """Undo what TRL 1.9 does to adapters for a reference that we keep as data.

    TRL copies a continued adapter to a second one named `ref`, which a resumed run then restores
    instead of the policy; and it rounds adapters on a quantised base to bfloat16, where updates of
    5e-6 vanish. `continued` is what `continue_adapter` returned before TRL saw the model.
    """
    if "ref" in model.peft_config:
        model.delete_adapter("ref")
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data = weight.data.float()
        # On a CPU bitsandbytes 0.50 repacks a layer's weights for good on its first forward pass
        # in eval mode, and cannot train it afterwards. Scoring comes before training.
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    if continued is not None:
        restore_snapshot(model, continued)
