"""The processes of one run: all hold the same tables, rank 0 writes, each does part of the work."""

import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from heapq import heapreplace
from mmap import ACCESS_COPY, mmap
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T")

#: Ranks wait for whole phases. A process that dies ends the wait of the others at once; of a
#: machine that is gone nothing is heard, and `watch` ends it.
_PATIENCE = timedelta(days=30)
#: What to do after a rank is lost.
AGAIN = (
    "This process ends too. Mend what the other one names, if it names something; the same command "
    "with `auto_resume_from_checkpoints: true` goes on from the last checkpoint, if there is one."
)
#: Bytes of a word that ranks tell each other.
_WORD = 256


class RankLost(RuntimeError):
    """Another process of this run has ended before its work was done."""


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RankLost(f"another process of this run has ended; it says why. {AGAIN}") from error


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
    machines: tuple[int, ...] = (1,)  # how many each has; they are numbered machine by machine
    #: A gloo group to wait and add up in, None in one process. Collectives of an accelerator give
    #: up after minutes, and would keep it busy meanwhile.
    group: Any = None

    @property
    def world(self) -> int:
        """How many processes there are."""
        return sum(self.machines)

    @property
    def first(self) -> int:
        """The first rank of this machine."""
        return max(first for first in self._firsts() if first <= self.rank)

    @property
    def local_world(self) -> int:
        """How many ranks are on this machine."""
        return self.machines[self._firsts().index(self.first)]

    def _firsts(self) -> list[int]:
        return [sum(self.machines[:place]) for place in range(len(self.machines))]

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
        if (common := math.gcd(*self.machines)) % size:
            counts = " and ".join(map(str, sorted(set(self.machines))))
            where = "on this machine" if len(self.machines) == 1 else "that machines have here"
            sizes = [n for n in range(1, common + 1) if common % n == 0]
            raise ValueError(
                f"vllm.tensor_parallel_size: {size} does not divide the {counts} processes "
                f"{where}. Set it to one of {', '.join(map(str, sizes))}."
            )
        if self.rank % size:
            return NO_PART
        return Shard(self.rank // size, self.world // size)

    def barrier(self) -> None:
        """Return once every rank is here, however long that takes."""
        if self.group is not None:
            from torch import distributed

            with _together():
                distributed.barrier(group=self.group)

    def sum(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """The element-wise sum over all ranks, on each of them."""
        if self.group is None:
            return values
        import torch

        total = values.copy()
        with _together():
            torch.distributed.all_reduce(torch.from_numpy(total), group=self.group)
        return total

    def words(self, mine: str) -> list[str]:
        """What each rank says, up to 256 bytes of it, on each of them."""
        said = np.zeros((self.world, _WORD))
        letters = mine.encode()[:_WORD]
        said[self.rank, : len(letters)] = list(letters)
        heard = self.sum(said.ravel()).reshape(said.shape).astype(np.uint8)
        return [bytes(one).rstrip(b"\0").decode(errors="replace") for one in heard]

    def share(
        self, size: int, fill: Callable[[npt.NDArray[np.uint8]], object]
    ) -> npt.NDArray[np.uint8]:
        """(size,) bytes that a machine's ranks hold once, which the first of them has filled.

        A collective call. Nobody may write to them later: the others map the same pages. They are a
        file without a name (memfd_create), which no size of /dev/shm limits, and gone with the last
        array. Where a rank cannot open another one's, each has bytes of its own and fills them.
        """
        first, file, mapped = self.first, -1, None
        if max(self.machines) > 1 and sys.platform == "linux":
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


def store_connection() -> Any:
    """A connection of its own to the store in which processes have met, for a thread."""
    from torch.distributed.distributed_c10d import _get_default_store

    store: Any = _get_default_store()
    return store.clone()


def current_ranks() -> Ranks:
    """The ranks of this run; a collective call where there are several.

    ValueError if they are not numbered machine by machine.
    """
    from torch import distributed

    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return Ranks()
    rank, world = distributed.get_rank(), distributed.get_world_size()
    # DeepSpeed's own launcher has another name for it.
    size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world)
    place = int(os.environ.get("LOCAL_RANK", rank % size))
    everybody = Ranks(rank, (world,), distributed.new_group(backend="gloo", timeout=_PATIENCE))
    mine = np.zeros((world, 2))
    mine[rank] = place, size
    places, sizes = everybody.sum(mine.ravel()).reshape(-1, 2).astype(int).T
    machines = tuple(map(int, sizes[places == 0]))
    if places.tolist() != [place for size in machines for place in range(size)]:
        raise ValueError(
            f"the launcher numbers the {world} processes of this run {', '.join(map(str, places))} "
            f"on their machines (LOCAL_RANK), which have {', '.join(map(str, sizes))} of them "
            "(LOCAL_WORLD_SIZE). Number them machine by machine, as torchrun does."
        )
    return Ranks(rank, machines, everybody.group)
