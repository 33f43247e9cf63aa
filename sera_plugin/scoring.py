"""The `Scorer` of a run: any policy at hand, swapped into the one model, with a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

from tqdm.auto import tqdm

from sera_plugin.budget import TokenBudget
from sera_plugin.iteration import Progress
from sera_plugin.logprobs import score_sequences
from sera_plugin.method import Phases
from sera_plugin.policies import PolicyHistory
from sera_plugin.ranks import Ranks, Shard
from sera_plugin.rewards import FloatArray
from sera_plugin.sampling import Chunk
from sera_plugin.sharding import is_sharded


class PolicyScorer:
    """Scores completions under theta_p for any p that the history still has.

    Args:
        policies: the run's policies; the model's current one is never swapped.
        pad_id: padding token id.
        budget: most tokens per forward pass.
        autocast: the context training computes its loss in.
        ranks: the run's processes; each scores its part.
        quiet: no progress bars.
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
        #: What the current iteration has cost; the trainer starts a new one each iteration.
        self.phases = Phases()

    @property
    def shard(self) -> Shard:
        """This rank's part of forward passes over the model, as it is now."""
        return replace(self.ranks.shard, in_step=is_sharded(self.policies.model))

    def __call__(
        self, policy: int, prompts: Sequence[Any], completions: Sequence[Any], phase: str
    ) -> FloatArray:
        """See `sera_plugin.iteration.Scorer`."""
        tokens = sum(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
        self.phases.count(phase, len(prompts), tokens)
        bar = tqdm(
            total=tokens // self.ranks.world,
            unit="tok",
            unit_scale=True,
            desc=f"SeRA: {phase.replace('_', ' ')} under theta_{policy}",
            disable=self.quiet,
        )
        # The total is planned as an equal part of all ranks'; the last batches are not equal.
        with self.policies.at(policy), bar:
            scores = score_sequences(
                self.policies.model,
                prompts,
                completions,
                pad_id=self.pad_id,
                budget=self.budget,
                autocast=self.autocast,
                shard=self.shard,
                progress=bar.update,
            )
            bar.total = bar.n
        return self.ranks.sum(scores)


def sampling_progress(quiet: bool) -> Progress:
    """A progress bar over prompts with tokens per second, as `prepare_iteration` wants it."""

    @contextmanager
    def start(total: int, phase: str) -> Iterator[Callable[[Chunk], None]]:
        tokens = 0
        with tqdm(total=total, unit="prompt", desc=f"SeRA: {phase}", disable=quiet) as bar:

            def advance(chunk: Chunk) -> None:
                nonlocal tokens
                tokens += sum(len(one.token_ids) for _, found in chunk for one in found)
                spent = bar.format_dict["elapsed"]
                bar.set_postfix_str(f"{tokens / spent:,.0f} tok/s" if spent else "", refresh=False)
                bar.update(len(chunk))

            yield advance
            bar.total = bar.n

    return start
