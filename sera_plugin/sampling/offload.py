"""Room on the accelerator for an engine beside a training run, and everything back afterwards."""

import gc
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from time import monotonic, sleep
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sera_plugin.model.budget import ENGINE_OVERHEAD, ENGINE_SEQUENCES, ENGINE_SLACK, GIB
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
    return model.num_parameters() * element_size, ENGINE_SEQUENCES * length * per_token


def cache_bytes_per_token(model: Any, element_size: int) -> int:
    """Keys and values of one token in all layers (Kwon et al. 2023, 3).

    Of a model without attention, whose state is as large for any length: as if it had one head.
    """
    text = model.config.get_text_config()
    queries = getattr(text, "num_attention_heads", 1)
    heads = getattr(text, "num_key_value_heads", None) or queries
    size = getattr(text, "head_dim", None) or text.hidden_size // queries
    return int(2 * text.num_hidden_layers * heads * size * element_size)


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

    On a GPU unused blocks are always returned. If the engine would still not fit beside the run,
    weights and optimizer state wait in host memory, and are back, bit for bit, afterwards.

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
    free, total = _free(device)
    asked = options.get("gpu_memory_utilization")
    if asked is not None:
        wanted = int(asked * total)
    homes: list[tuple[Tensor, torch.device]] = []
    if free < wanted + ENGINE_SLACK:
        resident = resident_tensors(model, optimizer)
        homes = [(tensor, tensor.device) for tensor in resident if tensor.device.type == "cuda"]
        for tensor, _ in homes:
            tensor.data = tensor.data.to("cpu")
        before, (free, _) = free, _free(device)
        said = f"weights and optimizer state wait in host memory ({before / GIB:.1f} GiB were free)"
    else:
        said = "the engine fits beside the training run"
    LOG.info("SeRA: %s: it wants %.1f GiB of %.1f GiB free", said, wanted / GIB, free / GIB)
    try:
        free = _least_free(free, size, ranks)
        if asked is not None and asked * total > free:
            raise ValueError(
                f"vllm.gpu_memory_utilization: {asked} asks for {asked * total / GIB:.1f} GiB, "
                f"but {free / GIB:.1f} GiB are free. Leave it out, so that it is derived, or set "
                f"it to {free / total:.2f} or less."
            )
        utilization = asked if asked is not None else min(0.95, (free - ENGINE_SLACK) / total)
        fits = weights // len(devices) + ENGINE_OVERHEAD <= utilization * total
        yield Memory(utilization, fits, devices)
        ranks.barrier()  # a neighbour's engine may still be on this device
        _wait_until_back(device, free)
    finally:
        for tensor, home in homes:
            tensor.data = tensor.data.to(home)


def resident_tensors(model: nn.Module, optimizer: Any) -> list[Tensor]:
    """Every tensor that a training run keeps on its device between steps, each once.

    Without the parts of sharded weights, whose storage FSDP2 holds on to by itself.
    """
    found: list[Tensor] = [*model.parameters(), *model.buffers()]
    found += [weight.grad for weight in model.parameters() if weight.grad is not None]
    for weight in model.parameters():
        state = getattr(weight, "quant_state", None)
        while state is not None:  # 4-bit weights: their scales, which may be quantised again
            found += [value for value in vars(state).values() if isinstance(value, Tensor)]
            state = getattr(state, "state2", None)
    for state in optimizer.state.values() if optimizer is not None else ():
        tensors = [value for value in state.values() if isinstance(value, Tensor)]
        # Paged optimizer state moves by itself.
        found += [value for value in tensors if not getattr(value, "is_paged", False)]
    return list({id(each): each for each in found if not isinstance(each, DTensor)}.values())


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
