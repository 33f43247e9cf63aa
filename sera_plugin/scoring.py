"""The `Scorer` of a run: any policy at hand, swapped into the one model, with a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from tqdm.auto import tqdm

from sera_plugin.iteration import Phases
from sera_plugin.logprobs import score_sequences
from sera_plugin.policies import PolicyHistory
from sera_plugin.rewards import FloatArray


class PolicyScorer:
    """Scores completions under theta_p for any p that the history still has.

    Args:
        policies: the run's policies; the model's current one is never swapped.
        pad_id: padding token id.
        token_budget: most tokens per forward pass.
        autocast: the context training computes its loss in.
        quiet: no progress bars.
    """

    def __init__(
        self,
        policies: PolicyHistory,
        pad_id: int,
        token_budget: int,
        autocast: Callable[[], AbstractContextManager[object]],
        quiet: bool,
    ) -> None:
        self.policies = policies
        self.pad_id = pad_id
        self.token_budget = token_budget
        self.autocast = autocast
        self.quiet = quiet
        #: What the current iteration has cost; the trainer starts a new one each iteration.
        self.phases = Phases()

    def __call__(
        self, policy: int, prompts: Sequence[Any], completions: Sequence[Any], phase: str
    ) -> FloatArray:
        """See `sera_plugin.iteration.Scorer`."""
        tokens = sum(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
        self.phases.count(phase, len(prompts), tokens)
        bar = tqdm(
            total=tokens,
            unit="tok",
            unit_scale=True,
            desc=f"SeRA: {phase.replace('_', ' ')} under theta_{policy}",
            disable=self.quiet,
        )
        with self.policies.at(policy), bar:
            return score_sequences(
                self.policies.model,
                prompts,
                completions,
                pad_id=self.pad_id,
                token_budget=self.token_budget,
                autocast=self.autocast,
                progress=bar.update,
            )


def sampling_progress(quiet: bool) -> Callable[[int, str], Callable[[Any], None]]:
    """A progress bar over prompts with tokens per second, as `prepare_iteration` wants it."""

    def start(total: int, phase: str) -> Callable[[Any], None]:
        bar = tqdm(total=total, unit="prompt", desc=f"SeRA: {phase}", disable=quiet)
        tokens = 0

        def advance(chunk: Any) -> None:
            nonlocal tokens
            tokens += sum(len(one.token_ids) for _, found in chunk for one in found)
            elapsed = bar.format_dict["elapsed"]
            bar.set_postfix_str(f"{tokens / elapsed:,.0f} tok/s" if elapsed else "", refresh=False)
            bar.update(len(chunk))
            if bar.n >= total:
                bar.close()

        return advance

    return start
