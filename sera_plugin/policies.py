"""Snapshots of the trainable weights, swapped in place into the one loaded model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Snapshot = dict[str, Tensor]


def take_snapshot(model: nn.Module) -> Snapshot:
    """Copy the trainable weights to host memory, bit for bit, in their own type."""
    return {
        name: weight.detach().to("cpu", copy=True)
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }


@torch.no_grad()
def restore_snapshot(model: nn.Module, snapshot: Snapshot) -> None:
    """Write a snapshot into the model's own storage.

    Raises:
        ValueError: if the snapshot was taken from other trainable weights.
    """
    weights = {name: w for name, w in model.named_parameters() if w.requires_grad}
    if weights.keys() != snapshot.keys():
        differing = sorted(weights.keys() ^ snapshot.keys())[:3]
        raise ValueError(f"the snapshot's weights are not the model's: {', '.join(differing)}")
    for name, weight in weights.items():
        weight.copy_(snapshot[name])


@contextmanager
def swapped_in(model: nn.Module, snapshot: Snapshot) -> Iterator[None]:
    """The model is another policy inside the block, and itself again afterwards."""
    current = take_snapshot(model)
    restore_snapshot(model, snapshot)
    try:
        yield
    finally:
        restore_snapshot(model, current)


def save_policy(model: Any, directory: Path) -> None:
    """Save the model as PEFT, transformers and vLLM load it: an adapter, or whole weights.

    Weights are written as safetensors. For a quantised base only the adapter is written, so the
    base is never dequantised.
    """
    model.save_pretrained(str(directory), safe_serialization=True)


def load_policy(model: Any, directory: Path) -> Snapshot:
    """Read a saved policy back as a snapshot of this model's trainable weights.

    The model holds its own weights again afterwards.
    """
    current = take_snapshot(model)
    try:
        if hasattr(model, "peft_config"):
            from peft import load_peft_weights, set_peft_model_state_dict

            # From host memory, so that no second adapter is ever on the accelerator.
            set_peft_model_state_dict(model, load_peft_weights(str(directory), device="cpu"))
            return take_snapshot(model)
        saved = type(model).from_pretrained(str(directory), dtype="auto").state_dict()
        return {name: saved[name] for name in current}
    finally:
        restore_snapshot(model, current)
