"""The scorer: log pi(y|x), summed over the completion's tokens, in nats, under any policy."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from sera_plugin.algorithm.method import Phases
from sera_plugin.algorithm.rewards import FloatArray
from sera_plugin.model.budget import TokenBudget, batches_by_length
from sera_plugin.model.forward import (
    Ids,
    abilities,
    collate,
    evaluating,
    forward_logps,
)
from sera_plugin.model.lines import Sharing, plan_lines
from sera_plugin.model.parts import is_sharded
from sera_plugin.model.policies import PolicyHistory
from sera_plugin.rundir.progress import progress
from sera_plugin.rundir.ranks import WHOLE, Ranks, Shard
from sera_plugin.rundir.tokens import lengths_of


@dataclass
class PolicyScorer:
    """The `Scorer` of a run: under theta_p for any p that the history still has."""

    policies: PolicyHistory
    pad_id: int
    budget: TokenBudget
    autocast: Callable[[], AbstractContextManager[object]]  # as training computes its loss in
    ranks: Ranks  # each scores its part
    quiet: bool  # show no progress
    #: What the current iteration has cost; the loop starts a new one each iteration.
    phases: Phases = field(default_factory=Phases)

    @property
    def shard(self) -> Shard:
        """This rank's part of forward passes over the model, as it is now."""
        return replace(self.ranks.shard, in_step=is_sharded(self.policies.model))

    def __call__(
        self, policy: int, prompts: Sequence[Any], completions: Sequence[Any], phase: str
    ) -> FloatArray:
        """See `sera_plugin.algorithm.method.Scorer`."""
        tokens = sum(int(lengths_of(each).sum(dtype=np.int64)) for each in (prompts, completions))
        self.phases.count(phase, len(prompts), tokens)
        what = f"{phase.replace('_', ' ')} under theta_{policy}"
        mine = tokens // self.ranks.world  # about: the last batches are not equal
        with progress(what, mine, "token", self.quiet) as advance, self.policies.at(policy):
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
) -> FloatArray:
    """Score (n,) completions under the model as it is now, in the context training computes in.

    A `shard` scores its part of the batches; `progress` is called with the tokens of each. Returns
    (n,) log pi(completion | prompt) in nats, finite or not, 0 where another part scores.
    """
    with autocast():
        can = abilities(model, budget.device)
    sharing = Sharing.of(model, budget.planned) if can.shared else None
    lines = plan_lines(prompts, completions, sharing)
    before, after = (lengths_of(each).tolist() for each in (prompts, completions))
    sizes = [before[line[0]] + sum(after[index] for index in line) for line in lines]
    scores = np.zeros(len(prompts), dtype=np.float64)

    def score(batch: list[int]) -> tuple[list[int], FloatArray]:
        chosen = [lines[number] for number in batch]
        packed = can.packed and len(chosen[0]) == 1
        inputs, targets = collate(prompts, completions, chosen, pad_id, budget.device, packed)
        with autocast():
            logps, _ = forward_logps(model, inputs, targets)
        return [index for line in chosen for index in line], logps.double().cpu().numpy()

    batches: list[list[int]] = []
    # Apart, because a mask of our own slows down lines that do not need it.
    for shared in (True, False):
        kind = [number for number, line in enumerate(lines) if (len(line) > 1) == shared]
        planned = batches_by_length([sizes[number] for number in kind], budget.planned)
        batches += ([kind[index] for index in batch] for batch in planned)
    mine = shard.of(batches, [sum(sizes[number] for number in batch) for batch in batches])
    with evaluating(model):
        for _, (indices, logps) in budget.run(mine, sizes, score, shard.in_step):
            scores[indices] = logps
            progress(sum(len(prompts[index]) + len(completions[index]) for index in indices))
        for _ in range(shard.idle(batches)):
            score(batches[-1])  # one of the smallest: only to take part
    return scores
