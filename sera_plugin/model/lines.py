"""Which completions share a line of a batch, behind one copy of their prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sera_plugin.model.forward import Ids, Line, innermost
from sera_plugin.model.parts import count_weights
from sera_plugin.rundir.tokens import TOKENS, TokenColumn, lengths_of

Counts = npt.NDArray[np.int64]
#: More completions than this never share a prompt: attention between them grows with the square.
_MOST_SHARED = 8


@dataclass(frozen=True)
class Sharing:
    """When completions share a prompt: where a line costs less."""

    attention: float  # of a pair of tokens, in units of what a token costs in the weights
    longest: int  # most tokens of a line that is shared

    @classmethod
    def of(cls, model: Any, longest: int) -> Sharing:
        """By the model's configuration, in lines of up to `longest` tokens."""
        base = innermost(model)
        text = base.config.get_text_config()
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        # Multiplications: queries with keys and weights with values for a pair of tokens, and a
        # token's with every weight in the layers.
        pair = 2 * text.num_hidden_layers * text.num_attention_heads * head_dim
        weights = count_weights(base, exclude_embeddings=True)
        if not text.tie_word_embeddings:
            weights -= text.vocab_size * text.hidden_size
        window = getattr(text, "sliding_window", None) or longest
        return cls(attention=pair / weights, longest=min(longest, window))

    def cost(self, tokens: Counts, completions: Counts) -> npt.NDArray[np.float64]:
        """Of each line. Kernels skip half of a causal mask; one that they read they compute."""
        pairs = self.attention * tokens**2
        shared = np.where(tokens <= self.longest, tokens + pairs, np.inf)
        return np.where(completions == 1, tokens + pairs / 2, shared)


def plan_lines(
    prompts: Sequence[Ids], completions: Sequence[Ids], sharing: Sharing | None
) -> list[Line]:
    """Put completions of equal prompts into one line where that costs less; each is in one line."""
    if sharing is None:
        return [(index,) for index in range(len(prompts))]
    if not isinstance(prompts, TokenColumn):
        prompts = TokenColumn(pa.array(prompts, TOKENS))
    number, lengths = prompts.same(), lengths_of(completions).astype(np.int64)
    order = np.lexsort((lengths, number))
    starts = np.flatnonzero(np.diff(number[order], prepend=-1))
    counts = np.diff(starts, append=len(order))
    best = np.ones_like(counts)  # completions that share a line, by prompt
    for count in np.unique(counts):
        its = np.flatnonzero(counts == count)
        answers = lengths[order[starts[its, None] + np.arange(count)]]
        before = prompts.lengths[order[starts[its]], None]
        costs = []
        for size in range(1, min(count, _MOST_SHARED) + 1):
            begins = np.arange(0, count, size)
            tokens = before + np.add.reduceat(answers, begins, axis=1)
            costs.append(sharing.cost(tokens, np.diff(begins, append=count)).cumsum(axis=1)[:, -1])
        best[its] = 1 + np.argmin(costs, axis=0)
    indices, ends = order.tolist(), starts + counts
    return [
        tuple(indices[at : min(at + size, end)])
        for start, end, size in zip(starts.tolist(), ends.tolist(), best.tolist(), strict=True)
        for at in range(start, end, size)
    ]
