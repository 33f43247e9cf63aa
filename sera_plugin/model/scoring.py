"""The `Scorer` of a run: any policy at hand, swapped into the one model, with a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from sera_plugin.algorithm.method import Phases
from sera_plugin.algorithm.rewards import FloatArray
from sera_plugin.model.budget import TokenBudget
from sera_plugin.model.logprobs import score_sequences
from sera_plugin.model.policies import PolicyHistory
from sera_plugin.model.sharding import is_sharded
from sera_plugin.rundir.progress import progress
from sera_plugin.rundir.ranks import Ranks, Shard


class PolicyScorer:
    """Scores completions under theta_p for any p that the history still has.

    Args:
        policies: the run's policies; the model's current one is never swapped.
        pad_id: padding token id.
        budget: most tokens per forward pass.
        autocast: the context training computes its loss in.
        ranks: the run's processes; each scores its part.
        quiet: tells nothing about its progress.
    """

    def __init__(
        self,
        policies: PolicyHistory,
        pad_id: int,
        budget: TokenBudget,
        autocast: Callable[[], AbstractContextManager[object]],
        ranks: Ranks,
        quiet: bool,
    ) -> None:
        self.policies = policies
        self.pad_id = pad_id
        self.budget = budget
        self.autocast = autocast
        self.ranks = ranks
        self.quiet = quiet
        #: What the current iteration has cost; the loop starts a new one each iteration.
        self.phases = Phases()

    @property
    def shard(self) -> Shard:
        """This rank's part of forward passes over the model, as it is now."""
        return replace(self.ranks.shard, in_step=is_sharded(self.policies.model))

    def __call__(
        self, policy: int, prompts: Sequence[Any], completions: Sequence[Any], phase: str
    ) -> FloatArray:
        """See `sera_plugin.algorithm.offline.Scorer`."""
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
