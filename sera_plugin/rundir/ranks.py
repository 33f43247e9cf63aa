"""The processes of one run: all hold the same tables, rank 0 writes, each does part of the work."""

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from heapq import heapreplace
from mmap import ACCESS_COPY, mmap
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T")

#: Ranks wait for whole phases. A rank that dies ends the wait of the others at once.
_PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count` of some work; a count of 0 is an empty part.

    In step a piece is a collective call, in which every part takes a turn together.
    """

    index: int = 0
    count: int = 1
    in_step: bool = False

    def of(self, pieces: Sequence[T], sizes: Sequence[int]) -> list[T]:
        """The pieces (largest first) of this part, in their order. All parts must ask alike.

        The largest piece left goes to the part that has the least; in step every `count`-th piece,
        because a turn takes as long as its largest piece.
        """
        if self.in_step or not self.count:
            return list(pieces[self.index :: self.count]) if self.count else []
        loads = [(0, part) for part in range(self.count)]  # a heap
        mine = []
        for place in np.argsort(-np.asarray(sizes), kind="stable").tolist():
            load, least = loads[0]
            heapreplace(loads, (load + sizes[place], least))
            if least == self.index:
                mine.append(place)
        return [pieces[place] for place in sorted(mine)]

    def idle(self, pieces: Sequence[T]) -> int:
        """How many turns this part has nothing to do in while another has (in step)."""
        if not self.in_step:
            return 0
        return -(-len(pieces) // self.count) - len(pieces[self.index :: self.count])


WHOLE, NO_PART = Shard(), Shard(0, 0)


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, one unless torch.distributed has more."""

    rank: int = 0  # this process's number among all of the run
    world: int = 1
    local_world: int = 1  # how many of them are on this machine, numbered without a gap
    #: A gloo group to wait and add up in, None in one process. Collectives of an accelerator give
    #: up after minutes, and would keep it busy meanwhile.
    group: Any = None

    @property
    def main(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    @property
    def shard(self) -> Shard:
        """This rank's part of work that every rank takes part in."""
        return Shard(self.rank, self.world)

    def engine_shard(self, size: int) -> Shard:
        """This rank's part if the first of every `size` ranks of a machine has an engine for all.

        The others have no part. ValueError if the ranks of a machine do not divide.
        """
        if self.world == 1 or size == 1:
            return self.shard
        if self.local_world % size:
            sizes = [n for n in range(1, self.local_world + 1) if self.local_world % n == 0]
            raise ValueError(
                f"vllm.tensor_parallel_size: {size} does not divide the {self.local_world} "
                f"processes on this machine. Set it to one of {', '.join(map(str, sizes))}."
            )
        if self.rank % size:
            return NO_PART
        return Shard(self.rank // size, self.world // size)

    def barrier(self) -> None:
        """Return once every rank is here, however long that takes."""
        if self.group is not None:
            from torch import distributed

            distributed.barrier(group=self.group)

    def sum(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """The element-wise sum over all ranks, on each of them."""
        if self.group is None:
            return values
        import torch

        total = values.copy()
        torch.distributed.all_reduce(torch.from_numpy(total), group=self.group)
        return total

    def share(
        self, size: int, fill: Callable[[npt.NDArray[np.uint8]], object]
    ) -> npt.NDArray[np.uint8]:
        """(size,) bytes that a machine's ranks hold once, which the first of them has filled.

        A collective call. Nobody may write to them later: the others map the same pages. They are a
        file without a name (memfd_create), which no size of /dev/shm limits, and gone with the last
        array. Where a rank cannot open another one's, each has bytes of its own and fills them.
        """
        first, file, mapped = self.rank - self.rank % self.local_world, -1, None
        if self.local_world > 1 and sys.platform == "linux":
            place = np.zeros((self.world, 2))
            if self.rank == first:
                with suppress(OSError):  # -1 is no descriptor, and nobody can open it
                    file = os.memfd_create("sera-shared")
                    os.truncate(file, max(1, size))
                place[self.rank] = os.getpid(), file
            process, number = self.sum(place.ravel()).reshape(-1, 2)[first].astype(int)
            with (
                suppress(OSError, ValueError),
                open(f"/proc/{process}/fd/{number}", "rb") as opened,
            ):
                # The same pages for as long as this rank does not write to them.
                mapped = mmap(opened.fileno(), max(1, size), access=ACCESS_COPY)
            if self.rank == first and mapped is not None:
                mapped = mmap(file, max(1, size))
            failed = self.sum(np.array([float(mapped is None)]))[0]
            if file >= 0:
                os.close(file)  # all that could have opened it
            mapped = None if failed else mapped
        if mapped is None:
            own = np.empty(size, np.uint8)
            fill(own)
            return own
        shared = np.frombuffer(mapped, np.uint8)[:size]
        if self.rank == first:
            fill(shared)
        self.barrier()
        return shared

    def on_main(self, action: Callable[[], object]) -> None:
        """Let rank 0 do something that all ranks see done, and none sees half done or too early."""
        self.barrier()
        if self.main:
            action()
        self.barrier()


def current_ranks() -> Ranks:
    """The ranks of this run; a collective call where there are several."""
    from torch import distributed

    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return Ranks()
    world = distributed.get_world_size()
    return Ranks(
        rank=distributed.get_rank(),
        world=world,
        local_world=int(os.environ.get("LOCAL_WORLD_SIZE", world)),
        group=distributed.new_group(backend="gloo", timeout=_PATIENCE),
    )
