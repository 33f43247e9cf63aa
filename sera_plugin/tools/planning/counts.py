"""Pairs, steps, sequences and tokens of each iteration, counted before any of them happens.

Scoring the offline and the held-out pairs is known exactly. What is sampled is not there yet: it is
counted at an expected length, with the most that there can be beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from sera_plugin.algorithm.method import Method, Pairs, Schedule

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
    def completions(self) -> IntArray:
        return self.chosen + self.rejected

    @property
    def both(self) -> IntArray:
        """(N,) tokens of a pair, its prompt with either completion."""
        return 2 * self.prompt + self.completions

    @property
    def longer(self) -> IntArray:
        """(N,) tokens of the pair's longer sequence."""
        return self.prompt + np.maximum(self.chosen, self.rejected)

    def take(self, places: Any) -> Lengths:
        return Lengths(self.prompt[places], self.chosen[places], self.rejected[places])

    def within(self, longest: int) -> Lengths:
        """The pairs of which no sequence is longer."""
        return self.take(self.longer <= longest)


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

    @classmethod
    def sum(cls, several: Iterable[Work]) -> Work:
        return cls(*map(sum, zip(*map(astuple, several), strict=True)))

    def times(self, factor: float) -> Work:
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
    sampled: float | None = None

    @property
    def last(self) -> int:
        """T."""
        return len(self.schedule.pairs)

    @property
    def data(self) -> list[Lengths]:
        """All pairs that are scored."""
        return [each for each in (self.pairs, self.held_out) if each is not None and len(each)]

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

    def iterations(self) -> Iterator[Iteration]:
        for t in range(1, self.last + 1):
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
        candidates, prompt = self.method.config.candidates, self.pairs.prompt
        work = _passes(prompt, self.expected).times(candidates)
        return replace(
            work,
            tokens=round(work.scored),
            most=int(candidates * self.limits.sum()),
            forwarded=float(prompt.sum()) + work.scored,
        )

    def _training(self, kept: int, bootstrapped: int) -> Work:
        """One epoch over D_t: kept pairs are as long as all are on average."""
        offline, prompt, total = _scoring(self.pairs), self.pairs.prompt, len(self.pairs)
        sampled = _passes(prompt, self.expected).times(2 * bootstrapped / total)
        work = Work.sum([offline.times(kept / total), sampled])
        most = offline.tokens
        if kept != total or bootstrapped:
            of_prompt = np.repeat(2 * (prompt + self.limits), self.method.config.pairs_per_prompt)
            most = _largest(self.pairs.both, kept) + _largest(of_prompt, bootstrapped)
        return replace(
            work,
            sequences=2 * (kept + bootstrapped),
            most=most,
            forwarded=self.padding * work.tokens,
            squares=self.padding * work.squares,
        )


def _passes(prompt: IntArray, completion: npt.NDArray[Any]) -> Work:
    """A completion after each prompt."""
    both = prompt + completion
    tokens = float(both.sum())
    squares = float((both**2).sum())
    scored = float(completion.sum())
    return Work(len(both), round(tokens), round(tokens), tokens, scored, squares)


def _scoring(pairs: Lengths) -> Work:
    """Both completions of every pair."""
    work = Work.sum(_passes(pairs.prompt, each) for each in (pairs.chosen, pairs.rejected))
    return replace(work, forwarded=work.forwarded - float(pairs.prompt.sum()))


def _largest(values: IntArray, count: int) -> int:
    return int(np.sort(values)[::-1][:count].sum())


def padding(pairs: Lengths, micro_batch: int, multiple: int | None, seed: int) -> float:
    """Tokens that batches of that many pairs have with padding, for each without.

    Both completions of a batch's pairs are padded to its longest sequence. One shuffle stands for
    all.
    """
    longer = np.random.default_rng(seed).permutation(pairs.longer)
    step, padded = multiple or 1, 0
    for start in range(0, len(longer), micro_batch):
        batch = longer[start : start + micro_batch]
        padded += 2 * len(batch) * -(-int(batch.max()) // step) * step
    return padded / float(pairs.both.sum())


def evaluations(strategy: Any, every: float | None, steps: int, iterations: int) -> float:
    """How often the host evaluates in an iteration, by its `eval_strategy` and `eval_steps`.

    `eval_steps` below 1 are a share of `steps`, which are those of all `iterations`.
    """
    if strategy == "epoch":
        return 1.0
    if strategy != "steps" or not every:
        return 0.0
    between = every * steps if every < 1 else every
    return steps / max(1.0, between) / iterations


def counting_of(
    cfg: Mapping[str, Any], method: Method, pairs: Lengths, held_out: Lengths | None
) -> Counting:
    """What the host's resolved configuration makes of a method and its data, for one process."""
    size, accumulation = cfg["micro_batch_size"], cfg.get("gradient_accumulation_steps") or 1
    drop_last = bool(cfg.get("dataloader_drop_last"))
    schedule = Schedule(method.sizes, int(size), int(accumulation), drop_last)
    every = cfg.get("eval_steps")
    strategy = "steps" if every else cfg.get("eval_strategy")
    multiple = cfg.get("pad_to_multiple_of")
    return Counting(
        method=method,
        schedule=schedule,
        pairs=pairs,
        held_out=held_out,
        sequence_len=cfg.get("sequence_len"),
        evaluations=evaluations(strategy, every, schedule.total_steps, len(schedule.pairs)),
        padding=padding(pairs, int(size), multiple, int(cfg.get("seed") or 0)),
    )
