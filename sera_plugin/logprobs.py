"""The scorer: log pi(y|x), summed over the completion's tokens, in nats.

Scoring and training use the same function of the logits, in float32 whatever the model computes
in, so that a policy compared with itself gives zero.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from sera_plugin.ranks import WHOLE, Shard


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


@torch.no_grad()
def score_sequences(
    model: torch.nn.Module,
    prompts: Sequence[npt.NDArray[np.int32]],
    completions: Sequence[npt.NDArray[np.int32]],
    *,
    pad_id: int,
    token_budget: int,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    shard: Shard = WHOLE,
    progress: Callable[[int], object] = lambda tokens: None,
) -> npt.NDArray[np.float64]:
    """Score completions under the model as it is now.

    Args:
        model: a causal language model; left in the mode (train or eval) it came in.
        prompts, completions: (n,) arrays of token ids each.
        pad_id: padding token id.
        token_budget: most tokens per forward pass, padding included.
        autocast: the context training computes its loss in.
        shard: this process's part of the batches.
        progress: called with the tokens of each finished batch.

    Returns:
        (n,) float64 log pi(completion | prompt) in nats, 0 where another part scores. Not checked
        for being finite.
    """
    device = next(model.parameters()).device
    lengths = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
    scores = np.zeros(len(lengths), dtype=np.float64)
    was_training = model.training
    model.eval()
    try:
        for batch in shard.of(list(batches_by_length(lengths, token_budget))):
            width = lengths[batch[0]]
            input_ids = torch.full((len(batch), width), pad_id, dtype=torch.long)
            attention = torch.zeros_like(input_ids)
            mask = torch.zeros_like(input_ids)
            for line, index in enumerate(batch):
                ids = np.concatenate([prompts[index], completions[index]])
                input_ids[line, : len(ids)] = torch.from_numpy(ids)
                attention[line, : len(ids)] = 1
                mask[line, len(prompts[index]) : len(ids)] = 1
            input_ids, attention, mask = (x.to(device) for x in (input_ids, attention, mask))
            with autocast():
                logps, _ = forward_logps(model, input_ids, attention, mask)
            scores[batch] = logps.double().cpu().numpy()
            progress(sum(lengths[index] for index in batch))
    finally:
        model.train(was_training)
    return scores
