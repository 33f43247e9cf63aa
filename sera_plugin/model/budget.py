"""How much of anything is done at a time: planned by the device, less once memory has run out."""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from sera_plugin.model.forward import REFUSALS, forward_replaced, innermost

LOG = logging.getLogger("axolotl.sera")

T = TypeVar("T")

GIB = 2**30

#: Of a GPU's memory one pass may take this part; more tokens than these are no faster.
_SHARE, _MOST = 8, 32_768
#: Tokens per pass where there is no GPU: more leave a CPU's cache when scoring.
SCORED_ON_CPU = 2_048

#: Context, activations and CUDA graphs of an engine; what two measurements may differ by.
ENGINE_OVERHEAD, ENGINE_SLACK = 3 * GIB, 1 * GIB
#: Prompts at full length that an engine's cache should hold for sampling to be fast.
ENGINE_SEQUENCES = 32

_OUT_OF_MEMORY = (
    "out of memory while {purpose}, with {size} tokens at a time. Lower sequence_len (for sampling "
    "sera.max_new_tokens or sera.candidates), load the model in 4 or 8 bits, or take a device with "
    "more memory. Where this needs another key than sera.sampler, the run begins anew, in another "
    "output_dir."
)
_OUT_OF_MEMORY_IN_STEP = (
    "out of memory while {purpose} {sequences} sequences of {size} tokens at a time. Every forward "
    "pass over sharded weights is made by all processes together, so this one cannot go on with "
    "smaller batches alone, and the run stops. Set fsdp_config.offload_params: true, take more "
    "processes, or lower sequence_len (for sampling sera.max_new_tokens or sera.candidates, or set "
    "sera.sampler: vllm). Only with another sera.sampler does this run go on; with other keys one "
    "begins anew, in another output_dir."
)


def tokens_per_pass(memory: int | None, bytes_per_token: int, longest: int, on_cpu: int) -> int:
    """Tokens per forward pass, a power of two unless the longest sequence there can be is longer.

    `on_cpu` without a GPU, where `memory`, the GPU's in bytes, is None.
    """
    if memory is None:
        return max(longest, on_cpu)
    room = max(1, memory // _SHARE // bytes_per_token)
    return max(longest, min(_MOST, 1 << (room.bit_length() - 1)))


def plan_tokens(device: torch.device, bytes_per_token: int, longest: int, on_cpu: int) -> int:
    """`tokens_per_pass` on a device, told by the device alone and not by what is free on it.

    So batches, and with them the last digits of all results, are the same in a continued run.
    """
    cuda = device.type == "cuda"
    memory = torch.cuda.get_device_properties(device).total_memory if cuda else None
    return tokens_per_pass(memory, bytes_per_token, longest, on_cpu)


def scoring_bytes_per_token(hidden: int, whole: int) -> int:
    """A token's activations without gradients: up to 32 hidden states of 16 bits.

    And its `whole` logits where the model makes all of them, in float32 at last, and a copy of
    those that are scored: on a CPU 8 bytes each were measured, in float32 and under autocast.
    """
    return 64 * hidden + 8 * whole


class _Hidden(dict[Any, Any]):
    """What layers give, of which nothing but the hidden states is there."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)


@torch.no_grad()
def whole_logits(model: Any) -> int:
    """How many logits of each token a scoring pass makes at once: all, or none but by parts.

    All where a model changes them after its output layer, which is found out by values of its own
    forward with both its layers and its output layer left out: so it takes no weights, and is the
    same for a plan, before training and in a continued run. All where a model does not pass so.
    """
    base = innermost(model)
    text = base.config.get_text_config()
    given = torch.linspace(-99, 99, text.vocab_size).view(1, 1, -1)
    states = torch.zeros(1, 1, text.hidden_size)
    hidden = _Hidden({0: states, "last_hidden_state": states})
    layers, head = base.base_model, base.get_output_embeddings()
    with forward_replaced(layers, lambda *_, **__: hidden), forward_replaced(head, lambda _: given):
        try:
            found = base(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False).logits
            return 0 if torch.equal(found, given) else given.numel()
        except REFUSALS:
            return given.numel()


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


class TokenBudget:
    """How many tokens one forward pass may take, padding included, and what is left of that.

    `device` is where passes are made. Weights may rest elsewhere (FSDP2 with `offload_params`).
    """

    def __init__(
        self, planned: int, purpose: str = "scoring", device: torch.device | str = "cpu"
    ) -> None:
        self.device = torch.device(device)
        self.planned = planned  # all ranks plan by it
        self.tokens = planned  # after what has run out of memory
        self.purpose = purpose  # in a message

    def run(
        self,
        batches: Sequence[list[int]],
        sizes: Sequence[int],
        work: Callable[[list[int]], T],
        in_step: bool = False,
    ) -> Iterator[tuple[list[int], T]]:
        """Work through batches of indices, in smaller parts once memory has run out.

        `sizes` are tokens by index. In step, `work` is a collective call, which no rank makes in
        parts alone. Yields (batch or part of one, what came out); ValueError if not even one
        sequence, or a batch that cannot be split, fits into memory.
        """
        left = deque(batches)
        while left:
            batch = left.popleft()
            size = sizes[batch[0]]
            fits = max(1, self.tokens // size)
            if len(batch) > fits and not in_step:
                left.extendleft((batch[fits:], batch[:fits]))
                continue
            try:
                result = work(batch)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                if in_step or len(batch) == 1:
                    said = _OUT_OF_MEMORY_IN_STEP if in_step else _OUT_OF_MEMORY
                    said = said.format(purpose=self.purpose, sequences=len(batch), size=size)
                    raise ValueError(said) from error
                error.__traceback__ = None  # its frames hold what did not fit
            else:
                yield batch, result
                continue
            clear_device_cache(garbage_collection=True)
            self.tokens = min(self.tokens, len(batch) * size) // 2
            LOG.warning(
                f"SeRA: out of memory while {self.purpose} {len(batch)} sequences of {size} tokens "
                f"at a time; going on with {self.tokens} tokens at a time"
            )
            left.appendleft(batch)


def scoring_budget(model: Any, device: torch.device, longest: int) -> TokenBudget:
    """Tokens per forward pass on a device, for sequences of up to `longest` tokens."""
    hidden = innermost(model).config.get_text_config().hidden_size
    per_token = scoring_bytes_per_token(hidden, whole_logits(model))
    planned = plan_tokens(device, per_token, longest, on_cpu=SCORED_ON_CPU)
    return TokenBudget(planned, device=device)
