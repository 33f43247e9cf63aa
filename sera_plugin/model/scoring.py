"""The scorer: log pi(y|x), summed over the completion's tokens, in nats, under any policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sera_plugin.algorithm.method import Phases
from sera_plugin.algorithm.rewards import FloatArray
from sera_plugin.model.budget import TokenBudget, batches_by_length, plan_tokens
from sera_plugin.model.forward import abilities, forward_logps, innermost
from sera_plugin.model.memory import SCORED_ON_CPU, scoring_bytes_per_token
from sera_plugin.model.packing import Ids, Layout, Sharing, collate, plan_lines
from sera_plugin.model.policies import PolicyHistory
from sera_plugin.model.weights import is_sharded
from sera_plugin.rundir.progress import progress
from sera_plugin.rundir.ranks import WHOLE, Ranks, Shard


@dataclass
class PolicyScorer:
    """The `Scorer` of a run: under theta_p for any p that the history still has.

    Attributes:
        policies: the run's policies; the model's current one is never swapped.
        pad_id: padding token id.
        budget: most tokens per forward pass.
        autocast: the context training computes its loss in.
        ranks: the run's processes; each scores its part.
        quiet: whether it shows no progress.
        phases: what the current iteration has cost; the loop starts a new one each iteration.
    """

    policies: PolicyHistory
    pad_id: int
    budget: TokenBudget
    autocast: Callable[[], AbstractContextManager[object]]
    ranks: Ranks
    quiet: bool
    phases: Phases = field(default_factory=Phases)

    @property
    def shard(self) -> Shard:
        """This rank's part of forward passes over the model, as it is now."""
        return replace(self.ranks.shard, in_step=is_sharded(self.policies.model))

    def __call__(
        self, policy: int, prompts: Sequence[Any], completions: Sequence[Any], phase: str
    ) -> FloatArray:
        """See `sera_plugin.algorithm.protocols.Scorer`."""
        tokens = sum(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
        self.phases.count(phase, len(prompts), tokens)
        what = f"{phase.replace('_', ' ')} under theta_{policy}"
        # An equal part of all ranks'; the last batches are not equal.
        mine = tokens // self.ranks.world
        with self.policies.at(policy), progress(what, mine, "token", self.quiet) as advance:
            scores = score_sequences(
                self.policies.model,
                prompts,
                completions,
                pad_id=self.pad_id,
                budget=self.budget,
                autocast=self.autocast,
                shard=self.shard,
                progress=advance,
            )
        return self.ranks.sum(scores)


@torch.no_grad()
def score_sequences(
    model: torch.nn.Module,
    prompts: Sequence[Ids],
    completions: Sequence[Ids],
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
        budget: most tokens per forward pass; halved, for good, when memory runs out.
        autocast: the context training computes its loss in.
        shard: this process's part of the batches; in step where the model is sharded.
        progress: called with the prompt and completion tokens of each finished batch.

    Returns:
        (n,) float64 log pi(completion | prompt) in nats, 0 where another part scores. Not checked
        for being finite.
    """
    with autocast():
        can = abilities(model)
    device = next(model.parameters()).device
    sharing = cost_of_sharing(model, budget.planned) if can.shared else None
    lines = plan_lines(prompts, completions, sharing)
    sizes = [len(prompts[line[0]]) + sum(len(completions[i]) for i in line) for line in lines]
    scores = np.zeros(len(prompts), dtype=np.float64)

    def score(batch: list[int]) -> tuple[list[int], npt.NDArray[np.float64]]:
        chosen = [lines[number] for number in batch]
        layout: Layout = "packed" if can.packed else "padded"
        if len(chosen[0]) > 1:
            layout = "shared"
        inputs, targets = collate(prompts, completions, chosen, layout, pad_id, device)
        with autocast():
            logps, _ = forward_logps(model, inputs, targets)
        return [index for line in chosen for index in line], logps.double().cpu().numpy()

    batches = []
    # Apart, because a mask of our own slows down lines that do not need it.
    for shared in (True, False):
        kind = [number for number, line in enumerate(lines) if (len(line) > 1) == shared]
        for batch in batches_by_length([sizes[number] for number in kind], budget.planned):
            batches.append([kind[index] for index in batch])
    mine = shard.of(batches, [sum(sizes[number] for number in batch) for batch in batches])
    was_training = model.training
    model.eval()
    try:
        for _, (indices, logps) in budget.run(mine, sizes, score, shard.in_step):
            scores[indices] = logps
            progress(sum(len(prompts[index]) + len(completions[index]) for index in indices))
        for _ in range(shard.idle(batches)):
            score(batches[-1])  # one of the smallest: only to take part
    finally:
        model.train(was_training)
    return scores


def scoring_budget(model: Any, device: torch.device, longest: int) -> TokenBudget:
    """Tokens per forward pass on a device, for sequences of up to `longest` tokens."""
    per_token = scoring_bytes_per_token(innermost(model).config.get_text_config().hidden_size)
    return TokenBudget(plan_tokens(device, per_token, longest, on_cpu=SCORED_ON_CPU))


def cost_of_sharing(model: Any, longest: int) -> Sharing:
    """What attention costs in this model, by its configuration, in lines of up to `longest`."""
    base = innermost(model)
    text = base.config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    # Multiplications: queries with keys and weights with values for a pair of tokens, and a token's
    # with every weight in the layers.
    pair = 2 * text.num_hidden_layers * text.num_attention_heads * head_dim
    weights = base.num_parameters(exclude_embeddings=True)
    if not text.tie_word_embeddings:
        weights -= text.vocab_size * text.hidden_size
    window = getattr(text, "sliding_window", None) or longest
    return Sharing(attention=pair / weights, longest=min(longest, window))
