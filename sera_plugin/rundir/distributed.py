"""Several processes under torch.distributed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from sera_plugin.rundir.ranks import Ranks

#: Ranks wait for whole phases. A rank that dies ends the wait of the others at once.
_PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class DistributedRanks(Ranks):
    """The ranks of a process group.

    Waiting and adding up go over a gloo group of their own: collectives of an accelerator give up
    after minutes, and would keep it busy meanwhile.
    """

    group: Any = None

    def barrier(self) -> None:
        """See `Ranks.barrier`."""
        dist.barrier(group=self.group)

    def sum(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """See `Ranks.sum`."""
        total = torch.from_numpy(values.copy())
        dist.all_reduce(total, group=self.group)
        added: npt.NDArray[np.float64] = total.numpy()
        return added


def current_ranks() -> Ranks:
    """The ranks of this run; a collective call where there are several."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return Ranks()
    world = dist.get_world_size()
    return DistributedRanks(
        rank=dist.get_rank(),
        world=world,
        local_world=int(os.environ.get("LOCAL_WORLD_SIZE", world)),
        group=dist.new_group(backend="gloo", timeout=_PATIENCE),
    )
