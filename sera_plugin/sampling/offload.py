"""Room on the accelerator for an engine beside a training run, and everything back afterwards."""

import gc
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from time import monotonic, sleep
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sera_plugin.model.budget import ENGINE_OVERHEAD, ENGINE_SEQUENCES, ENGINE_SLACK, GIB
from sera_plugin.model.memory import cache_bytes_per_token, statistics_of
from sera_plugin.model.parts import count_weights
from sera_plugin.model.policies import before_interrupt
from sera_plugin.rundir.ranks import Ranks
from sera_plugin.sampling.vllm import Memory

LOG = logging.getLogger("axolotl.sera")

#: Seconds in which the driver returns a dead process's memory, a little later than it ends.
_BACK_WITHIN = 60.0


def engine_needs(model: Any, length: int, element_size: int) -> tuple[int, int]:
    """Bytes of the unquantised weights, and of a cache for `ENGINE_SEQUENCES` sequences.

    `length` is the longest prompt + candidate in tokens, `element_size` in bytes as served.
    """
    per_token = cache_bytes_per_token(model, element_size)
    return count_weights(model) * element_size, ENGINE_SEQUENCES * length * per_token


@contextmanager
def make_room(
    model: nn.Module,
    device: torch.device,
    optimizer: Any,
    element_size: int,
    options: Mapping[str, Any],
    ranks: Ranks,
    length: int,
) -> Iterator[Memory]:
    """Free memory for an engine on a device in the block; all ranks enter and leave together.

    On a GPU weights and optimizer state may wait in host memory, see `waiting`.

    `element_size` and `length` are as in `engine_needs`, `options` is the host's `vllm:` block,
    unset keys left out. An engine on several devices takes those of the neighbouring ranks.
    ValueError if the memory asked for is not free.
    """
    weights, cache = engine_needs(model, length, element_size)
    if device.type != "cuda":
        available = psutil.virtual_memory().available // ranks.local_world
        ranks.barrier()  # measured before any engine starts
        room = max(1, min(8 * cache, available // 4) // GIB)
        yield Memory(None, weights < available // 2, cache_gib=room)
        return
    size = int(options.get("tensor_parallel_size") or 1)
    devices = _devices((device.index or 0) // size * size, size)
    wanted = (weights + cache) // len(devices) + ENGINE_OVERHEAD
    _, total = torch.cuda.mem_get_info(device)
    asked = options.get("gpu_memory_utilization")
    if asked is not None:
        wanted = int(asked * total)
    with waiting(model, device, optimizer, wanted, "the engine") as free:
        free = _least_free(free, size, ranks)
        if asked is not None and asked * total > free:
            raise ValueError(
                f"vllm.gpu_memory_utilization: {asked} asks for {asked * total / GIB:.1f} GiB, "
                f"but {free / GIB:.1f} GiB are free. Leave it out, so that it is derived, or set "
                f"it to {free / total:.2f} or less."
            )
        utilization = asked if asked is not None else min(0.95, (free - ENGINE_SLACK) / total)
        fits = weights // len(devices) + ENGINE_OVERHEAD <= utilization * total
        try:
            yield Memory(utilization, fits, devices)
            ranks.barrier()  # a neighbour's engine may still be on this device
        finally:
            _wait_until_back(device, free)


@contextmanager
def waiting(
    model: nn.Module, device: torch.device, optimizer: Any, wanted: int, guest: str
) -> Iterator[int]:
    """Bytes that are free on a device, for a guest that wants so many of them.

    On a GPU unused blocks are always returned. Where too little is free, weights and optimizer
    state wait in host memory, and are back, bit for bit, when the block is left. On a CPU they
    stay, and the bytes are those of host memory.
    """
    if device.type != "cuda":
        yield psutil.virtual_memory().available
        return
    free, _ = _free(device)
    said, away = "the training run stays where it is", Away()
    try:
        with before_interrupt(away.stay):
            if free < wanted + ENGINE_SLACK:
                moved = away.put(filter(_on_gpu, resident_tensors(model, optimizer)))
                said = f"{moved / GIB:.2f} GiB of the training run wait in host memory"
                free, _ = _free(device)
            figures = guest, wanted / GIB, free / GIB
            LOG.info(f"SeRA: {said}: %s wants %.1f GiB, and %.1f GiB are free now", *figures)
            yield free
    finally:
        away.back()


class Away:
    """Tensors whose memory is free while copies wait on the host.

    Storages are emptied in place. A tensor with another storage on another device would lose its
    node in autograd (`set_data` resets it), and with it the hook by which DDP averages gradients;
    and names that share a storage go on sharing it.
    """

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._copies: dict[int, tuple[torch.UntypedStorage, Tensor]] = {}

    def put(self, tensors: Iterable[Tensor]) -> int:
        """Copy the tensors' storages to host memory and empty them, but for mapped ones.

        Returns the number of bytes that were moved.
        """
        for tensor in tensors:
            self._tensors.append(tensor)
            storage = tensor.untyped_storage()
            if storage.resizable() and storage._cdata not in self._copies:
                copy = torch.empty(storage.nbytes(), dtype=torch.uint8)
                copy.untyped_storage().copy_(storage)
                self._copies[storage._cdata] = storage, copy
                storage.resize_(0)
        return sum(copy.nbytes for _, copy in self._copies.values())

    def back(self) -> None:
        """Fill the storages again, bit for bit."""
        while self._copies:
            storage, copy = self._copies.popitem()[1]
            storage.resize_(copy.nbytes)
            storage.copy_(copy.untyped_storage())

    @torch.no_grad()
    def stay(self) -> None:
        """Ctrl-C: the host saves the model, and its memory is still somebody else's."""
        for tensor in self._tensors:
            if kept := self._copies.get(tensor.untyped_storage()._cdata):
                place = tensor.storage_offset(), tensor.shape, tensor.stride()
                tensor.data = torch.empty(0, dtype=tensor.dtype).set_(
                    kept[1].untyped_storage(), *place
                )
        self._copies.clear()


def resident_tensors(model: nn.Module, optimizer: Any) -> list[Tensor]:
    """Every tensor that a training run keeps on its device between steps, each once.

    Without the parts of sharded weights, whose storage FSDP2 holds on to by itself.
    """
    found: list[Tensor] = [*model.parameters(), *model.buffers()]
    found += [weight.grad for weight in model.parameters() if weight.grad is not None]
    found += statistics_of(model)
    # Of DeepSpeed: what it steps is a copy of the weights in float32.
    for group in optimizer.param_groups if optimizer is not None else ():
        found += group["params"]
    for state in optimizer.state.values() if optimizer is not None else ():
        tensors = [value for value in state.values() if isinstance(value, Tensor)]
        # Paged optimizer state moves by itself.
        found += [value for value in tensors if not getattr(value, "is_paged", False)]
    return list({id(each): each for each in found if not isinstance(each, DTensor)}.values())


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda"


def _free(device: torch.device) -> tuple[int, int]:
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)


def _least_free(free: int, size: int, ranks: Ranks) -> int:
    """What the ranks whose devices one engine takes all have free."""
    everybody = ranks.sum(np.where(np.arange(ranks.world) == ranks.rank, float(free), 0.0))
    first = ranks.rank // size * size
    return int(everybody[first : first + size].min())


def _wait_until_back(device: torch.device, free: int) -> None:
    until = monotonic() + _BACK_WITHIN
    while (now := _free(device)[0]) < free - ENGINE_SLACK // 2:
        if monotonic() > until:
            said = "%.1f GiB of GPU memory have not come back since sampling; another program may"
            LOG.warning(f"SeRA: {said} have taken them", (free - now) / GIB)
            return
        sleep(0.5)


def _devices(first: int, count: int) -> tuple[str, ...]:
    """CUDA devices for an engine, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else list(map(str, range(torch.cuda.device_count())))
    return tuple(name.strip() for name in names[first : first + count])
