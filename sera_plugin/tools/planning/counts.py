"""Pairs, steps, sequences and tokens of each iteration, counted before any of them happens.

Scoring the offline and the held-out pairs is known exactly. What is sampled is not there yet: it is
counted at an expected length, with the most that there can be beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from sera_plugin.algorithm.method import Method, Pairs
from sera_plugin.algorithm.schedule import Schedule

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Lengths:
    """Tokens of preference pairs, (N,) each."""

    prompt: IntArray
    chosen: IntArray
    rejected: IntArray

    @classmethod
    def of(cls, pairs: Pairs) -> Lengths:
        columns = (pairs.prompt_ids, pairs.chosen_ids, pairs.rejected_ids)
        return cls(*(column.lengths.astype(np.int64) for column in columns))

    def __len__(self) -> int:
        return len(self.prompt)

    @property
    def both(self) -> IntArray:
        """(N,) tokens of a pair, its prompt with either completion."""
        return 2 * self.prompt + self.chosen + self.rejected

    @property
    def longer(self) -> IntArray:
        """(N,) tokens of the pair's longer sequence."""
        return self.prompt + np.maximum(self.chosen, self.rejected)

    @property
    def completions(self) -> IntArray:
        """(N,) tokens of a pair's completions."""
        return self.chosen + self.rejected

    def within(self, longest: int) -> Lengths:
        """The pairs of which no sequence is longer."""
        kept = self.longer <= longest
        return Lengths(self.prompt[kept], self.chosen[kept], self.rejected[kept])


@dataclass(frozen=True)
class Work:
    """What one phase puts through the model.

    Attributes:
        sequences: prompts with a completion, or samples.
        tokens: expected; in scoring and training a prompt counts with each of its completions, in
            sampling the sampled tokens count alone. As summary.json counts them.
        most: the most tokens that there can be; equal to `tokens` where these are exact.
        forwarded: expected tokens with prompts that several completions share counted once.
        scored: expected tokens of completions, for which there are logits.
        squares: expected sum of squared sequence lengths, for attention.
    """

    sequences: int
    tokens: int
    most: int
    forwarded: float
    scored: float
    squares: float

    @property
    def exact(self) -> bool:
        return self.tokens == self.most

    def times(self, factor: float) -> Work:
        """The same this many times."""
        return Work(
            *(round(factor * value) for value in (self.sequences, self.tokens, self.most)),
            *(factor * value for value in (self.forwarded, self.scored, self.squares)),
        )


@dataclass(frozen=True)
class Iteration:
    """One iteration as planned.

    Attributes:
        number: t, 1-based.
        kept, bootstrapped: |D_t| in its two parts.
        steps: optimizer steps.
        phases: work by phase, as summary.json names them, and `evaluate`: the host's evaluations.
    """

    number: int
    kept: int
    bootstrapped: int
    steps: int
    phases: dict[str, Work]

    @property
    def pairs(self) -> int:
        return self.kept + self.bootstrapped


@dataclass(frozen=True)
class Counting:
    """What is counted.

    Attributes:
        method: the method's constants.
        schedule: how long each iteration is.
        pairs, held_out: lengths of the data.
        sequence_len: longest prompt and completion in tokens.
        evaluations: how often the host evaluates in an iteration.
        padding: tokens of training batches, padding included, for each without.
        sampled: mean tokens of a sample where that was measured, else None.
    """

    method: Method
    schedule: Schedule
    pairs: Lengths
    held_out: Lengths | None
    sequence_len: int | None
    evaluations: float
    padding: float
    sampled: float | None

    @property
    def limits(self) -> IntArray:
        """(N,) most tokens of a sample for each prompt, see `sampling.room`."""
        most = np.full(len(self.pairs), self.method.config.max_new_tokens, dtype=np.int64)
        room = self.sequence_len - self.pairs.prompt if self.sequence_len else most
        return np.minimum(most, room)

    @property
    def expected(self) -> npt.NDArray[np.float64]:
        """(N,) tokens expected of a sample: as measured, else as long as chosen answers are."""
        mean = self.pairs.chosen.mean() if self.sampled is None else self.sampled
        return np.minimum(mean, self.limits)

    def micro_batch_completions(self, pairs: int) -> float:
        """Completion tokens of a micro-batch of that many pairs, on average."""
        return pairs * float(self.pairs.completions.mean())

    def iterations(self) -> Iterator[Iteration]:
        """All iterations of the run."""
        for t in range(1, len(self.schedule.pairs) + 1):
            kept, bootstrapped = self.method.kept(t), self.method.sampled(t)
            phases = {"score_offline": _scoring(self.pairs)}
            if self.held_out is not None:
                phases["score_evaluation"] = _scoring(self.held_out)
            if bootstrapped:
                phases["sample"] = sampled = self._sampling()
                # Each under every policy that its reward needs, its prompt with it.
                prompts = int(self.method.config.candidates * self.pairs.prompt.sum())
                scored = replace(
                    sampled, tokens=prompts + sampled.tokens, most=prompts + sampled.most
                )
                phases["score_candidates"] = scored.times(len(self.method.candidates_under(t)))
            phases["train"] = self._training(kept, bootstrapped)
            if self.held_out is not None and self.evaluations:
                # Trainer.evaluate computes the prompt with each of its completions.
                once = _scoring(self.held_out).times(self.evaluations)
                phases["evaluate"] = replace(once, forwarded=float(once.tokens))
            yield Iteration(t, kept, bootstrapped, self.schedule.steps(t), phases)

    def _sampling(self) -> Work:
        candidates = self.method.config.candidates
        tokens = candidates * self.expected.sum()
        return Work(
            sequences=candidates * len(self.pairs),
            tokens=round(tokens),
            most=int(candidates * self.limits.sum()),
            forwarded=float(self.pairs.prompt.sum() + tokens),
            scored=float(tokens),
            squares=float(candidates * ((self.pairs.prompt + self.expected) ** 2).sum()),
        )

    def _training(self, kept: int, bootstrapped: int) -> Work:
        """One epoch over D_t: kept pairs are as long as all are on average."""
        share = kept / len(self.pairs)
        offline = _scoring(self.pairs)
        prompt = self.pairs.prompt
        of_prompt = np.repeat(2 * (prompt + self.limits), self.method.config.pairs_per_prompt)
        exact = kept == len(self.pairs) and not bootstrapped
        tokens = share * offline.tokens + bootstrapped * 2 * float((prompt + self.expected).mean())
        return Work(
            sequences=2 * (kept + bootstrapped),
            tokens=round(tokens),
            most=offline.tokens
            if exact
            else _largest(self.pairs.both, kept) + _largest(of_prompt, bootstrapped),
            forwarded=self.padding * tokens,
            scored=share * offline.scored + bootstrapped * 2 * float(self.expected.mean()),
            squares=self.padding
            * (
                share * offline.squares
                + bootstrapped * 2 * float(((prompt + self.expected) ** 2).mean())
            ),
        )


def _scoring(pairs: Lengths) -> Work:
    """Both completions of every pair."""
    tokens = int(pairs.both.sum())
    squares = (pairs.prompt + pairs.chosen) ** 2 + (pairs.prompt + pairs.rejected) ** 2
    return Work(
        sequences=2 * len(pairs),
        tokens=tokens,
        most=tokens,
        forwarded=float(tokens - pairs.prompt.sum()),
        scored=float(pairs.completions.sum()),
        squares=float(squares.sum()),
    )


def _largest(values: IntArray, count: int) -> int:
    return int(np.sort(values)[::-1][:count].sum())


def padding(pairs: Lengths, micro_batch: int, multiple: int | None, seed: int) -> float:
    """Tokens that batches of that many pairs have with padding, for each without.

    Both completions of a batch's pairs are padded to its longest sequence. One shuffle stands for
    all.
    """
    longer = pairs.longer[np.random.default_rng(seed).permutation(len(pairs))]
    padded = 0
    for start in range(0, len(longer), micro_batch):
        batch = longer[start : start + micro_batch]
        step = multiple or 1
        padded += 2 * len(batch) * -(-int(batch.max()) // step) * step
    return padded / float(pairs.both.sum())


def evaluations(strategy: Any, every: float | None, steps: int, iterations: int) -> float:
    """How often the host evaluates in an iteration.

    Args:
        strategy: `eval_strategy`: "no", "epoch" or "steps".
        every: `eval_steps`: a share of all steps below 1, else a number of them.
        steps: of all iterations.
        iterations: T.
    """
    if strategy == "epoch":
        return 1.0
    if strategy != "steps" or not every:
        return 0.0
    between = every * steps if every < 1 else every
    return steps / max(1.0, between) / iterations
