"""An optimizer begun anew in place, for the arg-min of another iteration.

In place, because DeepSpeed's engine steps the one that it was made with, and FSDP2's weights are
sharded already. Optimizers make their state on their first step where there is none.
"""

from copy import deepcopy
from typing import Any

import torch
from torch import nn

from sera_plugin.model.parts import forget_moments


class Beginning:
    """What an optimizer was before its first step and before a schedule set its learning rate."""

    def __init__(self, optimizer: Any) -> None:
        #: Of each group of weights: learning rate, betas, ...
        self._groups = [
            {name: deepcopy(value) for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups
        ]
        #: What it knows of single weights from the start, such as muon's flags. Adagrad's sums are
        #: made again.
        self._state = {
            weight: kept
            for weight, known in optimizer.state.items()
            if (kept := {k: v for k, v in known.items() if not isinstance(v, torch.Tensor)})
        }

    def restore(self, optimizer: Any, model: nn.Module) -> None:
        """The optimizer of `model` as it was, with no state but that."""
        optimizer.state.clear()
        optimizer.state.update({weight: dict(known) for weight, known in self._state.items()})
        for group, begun in zip(optimizer.param_groups, self._groups, strict=True):
            weights = group["params"]
            group.clear()
            group.update(deepcopy(begun), params=weights)
        forget_moments(model, getattr(optimizer, "optimizer", None))
