"""Algorithm 1 of the paper: what iteration t trains on, against which reference.

`prepare_iteration` is the algorithm on one screen. It talks to protocols: a scorer that knows the
policies by number, and a candidate sampler. Every phase leaves a file in the run directory and is
skipped when its file is there and whole, so a run that was cut off goes on where it stopped, and a
damaged file is made again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sera_plugin.bootstrap import pair_candidates
from sera_plugin.method import Method, Pairs, Phases
from sera_plugin.offline import Scorer, offline_table, require_finite
from sera_plugin.sampling import CandidateSampler, Chunk, SamplingSettings
from sera_plugin.selection import select_largest
from sera_plugin.store import RunStore, TokenColumn, make_table

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
        require_finite(values, "log-probability of a candidate", rows)
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
