"""How many tokens a forward pass takes: planned by the device, fewer once memory has run out."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from sera_plugin.model.memory import tokens_per_pass

LOG = logging.getLogger("axolotl.sera")

T = TypeVar("T")


def plan_tokens(device: torch.device, bytes_per_token: int, longest: int, on_cpu: int) -> int:
    """`tokens_per_pass` on a device.

    Told by the device alone and not by what is free on it, so that batches, and with them the last
    digits of all results, are the same when a run is continued.
    """
    cuda = device.type == "cuda"
    memory = torch.cuda.get_device_properties(device).total_memory if cuda else None
    return tokens_per_pass(memory, bytes_per_token, longest, on_cpu)


def batches_by_length(lengths: Sequence[int], token_budget: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest first.

    A batch holds at most `token_budget` tokens once padded; a longer sequence is alone.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch and lengths[batch[0]] * (len(batch) + 1) > token_budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@dataclass
class TokenBudget:
    """How many tokens one forward pass may take, and what is left of that.

    Attributes:
        planned: most tokens per forward pass, padding included. All ranks plan by it.
        purpose: what the passes are for, in a message.
        tokens: the same as `planned`, after what has run out of memory.
    """

    planned: int
    purpose: str = "scoring"
    tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = self.planned

    def run(
        self,
        batches: Sequence[list[int]],
        sizes: Sequence[int],
        work: Callable[[list[int]], T],
        in_step: bool = False,
    ) -> Iterator[tuple[list[int], T]]:
        """Work through batches, in smaller parts once memory has run out.

        Args:
            batches: indices, from `batches_by_length`.
            sizes: tokens by index.
            work: what to do with a batch or a part of one.
            in_step: whether `work` is a collective call, which no rank makes in parts alone.

        Yields:
            (batch or part of one, what came out).

        Raises:
            ValueError: if not even one sequence fits into memory, or a batch that cannot be split.
        """
        left = deque(batches)
        while left:
            batch = left.popleft()
            size = sizes[batch[0]]
            if len(batch) > 1 and len(batch) * size > self.tokens and not in_step:
                fits = max(1, self.tokens // size)
                left.extendleft((batch[fits:], batch[:fits]))
                continue
            try:
                result = work(batch)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                if in_step or len(batch) == 1:
                    raise ValueError(self._out_of_memory(len(batch), size, in_step)) from error
                error.__traceback__ = None  # its frames hold what did not fit
            else:
                yield batch, result
                continue
            clear_device_cache(garbage_collection=True)
            self.tokens = min(self.tokens, len(batch) * size) // 2
            LOG.warning(
                "SeRA: out of memory while %s %d sequences of %d tokens at a time; going on with "
                "%d tokens at a time",
                self.purpose,
                len(batch),
                size,
                self.tokens,
            )
            left.appendleft(batch)

    def _out_of_memory(self, sequences: int, size: int, in_step: bool) -> str:
        sampling = "for sampling sera.max_new_tokens or sera.candidates"
        if in_step:
            return (
                f"out of memory while {self.purpose} {sequences} sequences of {size} tokens at a "
                "time. Every forward pass over sharded weights is made by all processes together, "
                "so this one cannot go on with smaller batches alone, and the run stops. Set "
                "fsdp_config.offload_params: true, take more processes, or lower sequence_len "
                f"({sampling}, or set sera.sampler: vllm)."
            )
        return (
            f"out of memory while {self.purpose}, with {size} tokens at a time. Lower sequence_len "
            f"({sampling}), load the model in 4 or 8 bits, or take a device with more memory."
        )
