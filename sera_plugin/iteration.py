"""Algorithm 1 of the paper: what iteration t trains on, against which reference.

`prepare_iteration` is the algorithm on one screen. It talks to protocols: a scorer that knows the
policies by number, and a candidate sampler. Every phase leaves a file in the run directory and is
skipped when its file is there and whole, so a run that was cut off goes on where it stopped, and a
damaged file is made again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sera_plugin.args import SeraConfig
from sera_plugin.bootstrap import pair_candidates
from sera_plugin.rewards import FloatArray, implicit_reward, reward_weights
from sera_plugin.sampling import CandidateSampler, Chunk, SamplingSettings
from sera_plugin.selection import select_largest
from sera_plugin.store import RunStore, TokenColumn, make_table


class Scorer(Protocol):
    """log pi(completion | prompt) under any of the policies that are still at hand."""

    def __call__(
        self, policy: int, prompts: Sequence[Any], completions: Sequence[Any], phase: str
    ) -> FloatArray:
        """(n,) summed log-probabilities in nats under theta_policy."""
        ...


@dataclass(frozen=True)
class Pairs:
    """Preference pairs as token ids, (N,) each."""

    prompt_ids: TokenColumn
    chosen_ids: TokenColumn
    rejected_ids: TokenColumn

    @classmethod
    def from_table(cls, table: pa.Table) -> Pairs:
        return cls(
            *(TokenColumn(table[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected"))
        )

    def __len__(self) -> int:
        return len(self.prompt_ids)


@dataclass
class Phases:
    """Seconds, sequences and tokens forwarded per phase of an iteration."""

    seconds: dict[str, float] = field(default_factory=dict)
    forwarded: dict[str, dict[str, int]] = field(default_factory=dict)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        start = perf_counter()
        try:
            yield
        finally:
            self.spend(phase, perf_counter() - start)

    def spend(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = round(self.seconds.get(phase, 0.0) + seconds, 3)

    def count(self, phase: str, sequences: int, tokens: int) -> None:
        entry = self.forwarded.setdefault(phase, {"sequences": 0, "tokens": 0})
        entry["sequences"] += sequences
        entry["tokens"] += tokens


@dataclass(frozen=True)
class Method:
    """The method's constants, fixed for the run.

    Attributes:
        config: the `sera:` block.
        reference_free: whether the loss has no reference (SimPO).
        per_token: whether the loss averages its reward over tokens; the margin follows it.
        total: N, the number of offline pairs.
    """

    config: SeraConfig
    reference_free: bool
    per_token: bool
    total: int

    @property
    def kept(self) -> int:
        """k = round(selection_ratio N)."""
        return round(self.config.selection_ratio * self.total)

    @property
    def bootstrapped(self) -> int:
        """k~ = round(bootstrap_ratio N)."""
        return round(self.config.bootstrap_ratio * self.total)

    def weights(self, iteration: int) -> tuple[float, ...]:
        return reward_weights(iteration, self.config.gamma, self.reference_free)

    def oldest_policy(self, iteration: int) -> int:
        """The oldest policy that iteration t's phases score under."""
        return iteration - len(self.weights(iteration)) if iteration > 1 else 0

    def reward(
        self, logps: Sequence[npt.ArrayLike], iteration: int, lengths: npt.ArrayLike
    ) -> FloatArray:
        weights = self.weights(iteration)
        return implicit_reward(np.stack(logps), weights, lengths if self.per_token else None)


#: Given (prompts to sample, phase), a block with a callable that takes finished chunks.
Progress = Callable[[int, str], AbstractContextManager[Callable[[Chunk], None]]]


def _no_progress(total: int, phase: str) -> AbstractContextManager[Callable[[Chunk], None]]:
    return nullcontext(lambda chunk: None)


def prepare_iteration(
    iteration: int,
    method: Method,
    pairs: Pairs,
    store: RunStore,
    scorer: Scorer,
    sampler: CandidateSampler,
    settings: SamplingSettings,
    phases: Phases,
    progress: Progress = _no_progress,
) -> pa.Table:
    """Score, select, bootstrap: everything between two epochs (Algorithm 1, lines 3 to 9).

    Args:
        iteration: t, 1-based. The current policy is theta_{t-1}.
        method, pairs, store: the run.
        scorer, sampler: the model's two abilities.
        settings: how to sample.
        phases: receives what each phase cost.
        progress: told (prompts to sample, phase), opens a bar that takes finished chunks.

    Returns:
        D_t with columns prompt_ids, chosen_ids, rejected_ids (token ids) and ref_chosen_logps,
        ref_rejected_logps (log pi_{t-1}): kept offline pairs in row order, then sampled pairs.

    Raises:
        ValueError: naming the row or candidate whose log-probability is not finite.
    """
    offline = offline_table(iteration, method, pairs, store, scorer, phases)
    if iteration == 1 or method.bootstrapped == 0:
        return training_pairs(pairs, offline)

    candidates = store.read(iteration, "candidates")
    if candidates is None:
        with phases.timed("sample"):
            samples = _sample(iteration, pairs, store, sampler, settings, phases, progress)
        candidates = _score_candidates(iteration, method, pairs, samples, scorer, phases)
        store.write(iteration, "candidates", candidates)
        store.remove_samples(iteration)

    bootstrapped = store.read(iteration, "bootstrapped")
    if bootstrapped is None:
        with phases.timed("select"):
            bootstrapped = _pair(method, candidates, settings.candidates)
        store.write(iteration, "bootstrapped", bootstrapped)
    return training_pairs(pairs, offline, candidates, bootstrapped, settings.candidates)


def score_pairs(pairs: Pairs, policy: int, scorer: Scorer, phase: str) -> dict[str, FloatArray]:
    """log pi_policy of the chosen and rejected completions, (N,) each, in nats.

    Raises:
        ValueError: naming the first row whose log-probability is not finite.
    """
    both = scorer(
        policy,
        [*pairs.prompt_ids, *pairs.prompt_ids],
        [*pairs.chosen_ids, *pairs.rejected_ids],
        phase,
    )
    logps = {"chosen": both[: len(pairs)], "rejected": both[len(pairs) :]}
    for side, values in logps.items():
        _require_finite(values, f"log-probability of {side}", np.arange(len(pairs)))
    return logps


def offline_table(
    iteration: int, method: Method, pairs: Pairs, store: RunStore, scorer: Scorer, phases: Phases
) -> pa.Table:
    """Iteration t's offline.parquet: log pi_{t-1} of all pairs, and from t = 2 the selection.

    Each policy scores the offline set once; earlier policies' values are read back.
    """
    table = store.read(iteration, "offline")
    if table is not None:
        return table
    with phases.timed("score_offline"):
        logps = score_pairs(pairs, iteration - 1, scorer, "score_offline")
    columns: dict[str, Any] = {
        "row": np.arange(len(pairs)),
        "prompt_length": pairs.prompt_ids.lengths,
        "chosen_length": pairs.chosen_ids.lengths,
        "rejected_length": pairs.rejected_ids.lengths,
        "chosen_logp": logps["chosen"],
        "rejected_logp": logps["rejected"],
    }
    if iteration > 1:
        earlier = [
            offline_table(iteration - back, method, pairs, store, scorer, phases)
            for back in range(1, len(method.weights(iteration)))
        ]
        with phases.timed("select"):
            for side in ("chosen", "rejected"):
                columns[f"{side}_reward"] = method.reward(
                    [logps[side], *(each[f"{side}_logp"].to_numpy() for each in earlier)],
                    iteration,
                    columns[f"{side}_length"],
                )
            columns["margin"] = columns["chosen_reward"] - columns["rejected_reward"]
            columns["selected"] = select_largest(columns["margin"], method.kept)
    table = make_table(columns)
    store.write(iteration, "offline", table)
    return table


def held_out_table(
    iteration: int, pairs: Pairs, store: RunStore, scorer: Scorer, phases: Phases
) -> pa.Table:
    """Iteration t's evaluation.parquet: log pi_{t-1} of the held-out pairs."""
    table = store.read(iteration, "evaluation")
    if table is not None:
        return table
    with phases.timed("score_evaluation"):
        logps = score_pairs(pairs, iteration - 1, scorer, "score_evaluation")
    table = make_table(
        {
            "row": np.arange(len(pairs)),
            "chosen_length": pairs.chosen_ids.lengths,
            "rejected_length": pairs.rejected_ids.lengths,
            "chosen_logp": logps["chosen"],
            "rejected_logp": logps["rejected"],
        }
    )
    store.write(iteration, "evaluation", table)
    return table


def _sample(
    iteration: int,
    pairs: Pairs,
    store: RunStore,
    sampler: CandidateSampler,
    settings: SamplingSettings,
    phases: Phases,
    progress: Progress,
) -> pa.Table:
    """Sample every prompt whose candidates are not on disk yet, chunk by chunk."""
    finished = store.read_samples(iteration)
    done = frozenset(finished["row"].to_pylist()) if finished is not None else frozenset()
    # No rank may add to what another one is still reading.
    store.ranks.barrier()
    mine = math.ceil((len(pairs) - len(done)) / store.ranks.world)
    # Closed at once, whatever happens here: an engine may be running behind it.
    with (
        progress(mine, "sample") as advance,
        closing(sampler.sample(pairs.prompt_ids, settings, skip=done)) as chunks,
    ):
        for chunk in chunks:
            store.append_samples(iteration, _samples_table(chunk))
            advance(chunk)
    store.ranks.barrier()
    for name, spent in sampler.seconds.items():
        phases.spend(name, spent)
    samples = store.read_samples(iteration)
    assert samples is not None  # N >= 1, so at least one chunk was written
    fresh = samples.filter(pc.invert(pc.is_in(samples["row"], pa.array(done, pa.int64()))))
    phases.count("sample", len(fresh), int(TokenColumn(fresh["token_ids"]).lengths.sum()))
    report = json.dumps(sampler.report, sort_keys=True)
    return samples.replace_schema_metadata({"sampler": report})


def _samples_table(chunk: Chunk) -> pa.Table:
    flat = [(row, index, one) for row, found in chunk for index, one in enumerate(found)]
    return make_table(
        {
            "row": [row for row, _, _ in flat],
            "candidate": [index for _, index, _ in flat],
            "token_ids": [one.token_ids for _, _, one in flat],
            "finish_reason": [one.finish_reason for _, _, one in flat],
        }
    )


def _score_candidates(
    iteration: int,
    method: Method,
    pairs: Pairs,
    samples: pa.Table,
    scorer: Scorer,
    phases: Phases,
) -> pa.Table:
    """Score candidates under each policy their reward needs, and under theta_{t-1}."""
    token_ids = TokenColumn(samples["token_ids"])
    rows = samples["row"].to_numpy()
    prompts = [pairs.prompt_ids[row] for row in rows]
    with phases.timed("score_candidates"):
        logps = [
            scorer(iteration - back, prompts, token_ids, "score_candidates")
            for back in range(1, len(method.weights(iteration)) + 1)
        ]
    for values in logps:
        _require_finite(values, "log-probability of a candidate", rows)
    reward = method.reward(logps, iteration, token_ids.lengths)
    by_candidate = np.stack(logps, axis=1)
    return samples.append_column(
        "logps",
        pa.ListArray.from_arrays(
            np.arange(len(rows) + 1, dtype=np.int32) * by_candidate.shape[1], by_candidate.ravel()
        ),
    ).append_column("reward", pa.array(reward))


def _pair(method: Method, candidates: pa.Table, per_prompt: int) -> pa.Table:
    """Pair best with worst within each prompt, keep the pairs with the largest margin."""
    token_ids = TokenColumn(candidates["token_ids"])
    rows = candidates["row"].to_numpy()
    rewards = candidates["reward"].to_numpy().reshape(-1, per_prompt)
    identities = [
        [token_ids[first + i].tobytes() for i in range(per_prompt)]
        for first in range(0, len(rows), per_prompt)
    ]
    found = pair_candidates(identities, list(rewards), method.config.pairs_per_prompt)
    table = make_table(
        {
            "row": rows[found.prompt * per_prompt],
            "chosen_candidate": found.chosen,
            "rejected_candidate": found.rejected,
            "margin": found.margin,
            "selected": select_largest(found.margin, method.bootstrapped),
        }
    )
    counts = {"duplicates": found.duplicates, "ties": found.ties, "too_few": found.too_few}
    return table.replace_schema_metadata({name: str(value) for name, value in counts.items()})


def training_pairs(
    pairs: Pairs,
    offline: pa.Table,
    candidates: pa.Table | None = None,
    bootstrapped: pa.Table | None = None,
    per_prompt: int = 1,
) -> pa.Table:
    """D_t from the run directory's tables: token ids and reference log-probabilities.

    Raises:
        ValueError: if D_t is empty.
    """
    kept = np.arange(len(pairs))
    if "selected" in offline.column_names:
        kept = np.flatnonzero(offline["selected"].to_numpy(zero_copy_only=False))
    columns: dict[str, list[Any]] = {
        "prompt_ids": [pairs.prompt_ids[row] for row in kept],
        "chosen_ids": [pairs.chosen_ids[row] for row in kept],
        "rejected_ids": [pairs.rejected_ids[row] for row in kept],
        "ref_chosen_logps": list(offline["chosen_logp"].to_numpy()[kept]),
        "ref_rejected_logps": list(offline["rejected_logp"].to_numpy()[kept]),
    }
    if candidates is not None and bootstrapped is not None:
        token_ids = TokenColumn(candidates["token_ids"])
        first = dict(
            zip(
                candidates["row"].to_numpy()[::per_prompt],
                range(0, len(token_ids), per_prompt),
                strict=True,
            )
        )
        reference = np.stack(candidates["logps"].to_numpy(zero_copy_only=False))[:, 0]
        selected = bootstrapped.filter(bootstrapped["selected"])
        for row, chosen, rejected in zip(
            *(selected[c].to_numpy() for c in ("row", "chosen_candidate", "rejected_candidate")),
            strict=True,
        ):
            columns["prompt_ids"].append(pairs.prompt_ids[row])
            for side, index in (
                ("chosen", first[row] + chosen),
                ("rejected", first[row] + rejected),
            ):
                columns[f"{side}_ids"].append(token_ids[index])
                columns[f"ref_{side}_logps"].append(reference[index])
    if not columns["prompt_ids"]:
        raise ValueError(
            "nothing is left to train on: no offline pair is kept and no two candidates of a "
            "prompt differ in reward. Raise sera.selection_ratio, sera.temperature or "
            "sera.candidates."
        )
    return make_table(columns)


def _require_finite(values: FloatArray, what: str, rows: npt.NDArray[Any]) -> None:
    broken = np.flatnonzero(~np.isfinite(values))
    if broken.size:
        raise ValueError(
            f"the {what} in row {rows[broken[0]]} is {values[broken[0]]} ({broken.size} such "
            "values). The policy has diverged or overflows: lower learning_rate, or train with "
            "bf16 or float32 instead of fp16."
        )
