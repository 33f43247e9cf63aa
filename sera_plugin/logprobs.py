"""The scorer: log pi(y|x), summed over the completion's tokens, in nats.

Scoring and training use the same function of the logits, in float32 whatever the model computes
in, so that a policy compared with itself gives zero.
"""

from __future__ import annotations

import inspect
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor

from sera_plugin.ranks import WHOLE, Shard

LOG = logging.getLogger("axolotl.sera")

T = TypeVar("T")


def completion_logps(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Sum the log-probabilities of the masked tokens.

    Args:
        logits: (n, length, vocabulary), position i predicting label i.
        labels: (n, length) token ids.
        mask: (n, length), 1 where a token belongs to the completion.

    Returns:
        (n,) float32 sums in nats. Differentiable.
    """
    sums = []
    # Row by row: the float32 copy of the logits then never exceeds one row's completion.
    for row_logits, row_labels, row_mask in zip(logits, labels, mask.bool(), strict=True):
        picked = row_logits[row_mask].float()
        sums.append(-F.cross_entropy(picked, row_labels[row_mask], reduction="sum"))
    return torch.stack(sums)


def forward_logps(
    model: torch.nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_mask: Tensor,
    **model_inputs: Any,
) -> tuple[Tensor, Any]:
    """One forward pass, for scoring and for training alike.

    Args:
        model: a causal language model, wrapped or not.
        input_ids, attention_mask, completion_mask: (n, length), padded on the right.
        model_inputs: anything else the model's forward takes.

    Returns:
        (n,) float32 log pi(completion | prompt) in nats, and the model's output.
    """
    # Logits are needed from the first completion's predecessor on, and nowhere before.
    start = int(completion_mask.any(dim=0).int().argmax()) - 1
    if "logits_to_keep" in inspect.signature(type(innermost(model)).forward).parameters:
        model_inputs["logits_to_keep"] = input_ids.shape[1] - start
    output = model(
        input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **model_inputs
    )
    kept = output.logits[:, -(input_ids.shape[1] - start) : -1]
    labels, mask = input_ids[:, start + 1 :], completion_mask[:, start + 1 :]
    return completion_logps(kept, labels, mask), output


def innermost(model: Any) -> Any:
    """The transformers model inside DDP and PEFT wrappers."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def batches_by_length(lengths: Sequence[int], token_budget: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest first.

    Args:
        lengths: tokens per sequence.
        token_budget: most tokens a batch holds once padded; a longer sequence is alone.
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
        tokens: the same, after what has run out of memory.
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
                if in_step:
                    raise ValueError(self._in_step_message(len(batch), size)) from error
                self._exceeded(len(batch), size)
                error.__traceback__ = None  # its frames hold what did not fit
            else:
                yield batch, result
                continue
            clear_device_cache(garbage_collection=True)
            left.appendleft(batch)

    def _in_step_message(self, sequences: int, size: int) -> str:
        return (
            f"out of memory while {self.purpose} {sequences} sequences of {size} tokens at a time. "
            "Every forward pass over sharded weights is made by all processes together, so this "
            "one cannot go on with smaller batches alone, and the run stops. Set "
            "fsdp_config.offload_params: true, take more processes, or lower sequence_len (for "
            "sampling sera.max_new_tokens or sera.candidates, or set sera.sampler: vllm)."
        )

    def _exceeded(self, sequences: int, size: int) -> None:
        if sequences == 1:
            raise ValueError(
                f"out of memory while {self.purpose}, with {size} tokens at a time. "
                "Lower sequence_len (for sampling sera.max_new_tokens or sera.candidates), load "
                "the model in 4 or 8 bits, or take a device with more memory."
            )
        self.tokens = min(self.tokens, sequences * size) // 2
        LOG.warning(
            "SeRA: out of memory while %s %d sequences of %d tokens at a time; going on with %d "
            "tokens at a time",
            self.purpose,
            sequences,
            size,
            self.tokens,
        )


@torch.no_grad()
def score_sequences(
    model: torch.nn.Module,
    prompts: Sequence[npt.NDArray[np.int32]],
    completions: Sequence[npt.NDArray[np.int32]],
    *,
    pad_id: int,
    budget: TokenBudget,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    shard: Shard = WHOLE,
    progress: Callable[[int], object] = lambda tokens: None,
) -> npt.NDArray[np.float64]:
    """Score completions under the model as it is now.

    Args:
        model: a causal language model; left in the mode (train or eval) it came in.
        prompts, completions: (n,) arrays of token ids each.
        pad_id: padding token id.
        budget: most tokens per forward pass; halved, for good, when memory runs out.
        autocast: the context training computes its loss in.
        shard: this process's part of the batches; in step where the model is sharded.
        progress: called with the tokens of each finished batch.

    Returns:
        (n,) float64 log pi(completion | prompt) in nats, 0 where another part scores. Not checked
        for being finite.

    Raises:
        ValueError: if not even one sequence fits into memory.
    """
    lengths = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
    scores = np.zeros(len(lengths), dtype=np.float64)

    def score(batch: list[int]) -> npt.NDArray[np.float64]:
        sequences = [(prompts[index], completions[index]) for index in batch]
        return _score_batch(model, sequences, pad_id, autocast)

    was_training = model.training
    model.eval()
    try:
        batches = list(batches_by_length(lengths, budget.planned))
        tokens = [sum(lengths[index] for index in batch) for batch in batches]
        mine = shard.of(batches, tokens)
        for batch, logps in budget.run(mine, lengths, score, shard.in_step):
            scores[batch] = logps
            progress(sum(lengths[index] for index in batch))
        for _ in range(shard.idle(batches)):
            score(batches[-1])  # the smallest: only to take part
    finally:
        model.train(was_training)
    return scores


def _score_batch(
    model: torch.nn.Module,
    sequences: Sequence[tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]],
    pad_id: int,
    autocast: Callable[[], AbstractContextManager[object]],
) -> npt.NDArray[np.float64]:
    """(n,) log pi of (prompt, completion) sequences in one forward pass."""
    device = next(model.parameters()).device
    width = max(len(prompt) + len(completion) for prompt, completion in sequences)
    input_ids = torch.full((len(sequences), width), pad_id, dtype=torch.long)
    attention = torch.zeros_like(input_ids)
    mask = torch.zeros_like(input_ids)
    for line, (prompt, completion) in enumerate(sequences):
        ids = np.concatenate([prompt, completion])
        input_ids[line, : len(ids)] = torch.from_numpy(ids)
        attention[line, : len(ids)] = 1
        mask[line, len(prompt) : len(ids)] = 1
    input_ids, attention, mask = (x.to(device) for x in (input_ids, attention, mask))
    with autocast():
        logps, _ = forward_logps(model, input_ids, attention, mask)
    scored: npt.NDArray[np.float64] = logps.double().cpu().numpy()
    return scored
