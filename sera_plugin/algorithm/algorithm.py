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
from itertools import chain

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sera_plugin.algorithm.length_control import equalizing_alpha
from sera_plugin.algorithm.method import Method, Pairs, Phases
from sera_plugin.algorithm.offline import Scorer, offline_table, require_finite
from sera_plugin.algorithm.pairing import pair_candidates
from sera_plugin.algorithm.protocols import (
    DATASET,
    CandidateSampler,
    Chunk,
    Labeler,
    Progress,
    Ranked,
    SamplingSettings,
)
from sera_plugin.algorithm.selection import select_largest
from sera_plugin.rundir.store import RunStore, make_table
from sera_plugin.rundir.tokens import TokenColumn


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
    labeler: Labeler,
    progress: Progress = _no_progress,
) -> pa.Table:
    """Score, select, bootstrap: everything between two epochs (Algorithm 1, lines 3 to 9).

    Args:
        iteration: t, 1-based. The current policy is theta_{t-1}.
        method, pairs, store: the run.
        scorer, sampler: the model's two abilities.
        settings: how to sample.
        phases: receives what each phase cost.
        labeler: ranks the samples.
        progress: told (prompts to sample, phase), opens a bar that takes finished chunks.

    Returns:
        D_t with columns prompt_ids, chosen_ids, rejected_ids (token ids), ref_chosen_logps,
        ref_rejected_logps (under the reference) and policy_chosen_logps, policy_rejected_logps
        (log pi_{t-1}): kept offline pairs in row order, then sampled pairs.

    Raises:
        ValueError: naming the row or candidate whose log-probability is not finite.
    """
    offline, reference = (
        offline_table(policy + 1, method, pairs, store, scorer, phases)
        for policy in (iteration - 1, method.reference(iteration))
    )
    if not method.sampled(iteration):
        return training_pairs(pairs, offline, reference)

    candidates = store.read(iteration, "candidates")
    if candidates is None:
        with phases.timed("sample"):
            samples = _sample(iteration, pairs, store, sampler, settings, phases, progress)
        samples = labeler.complete(samples, pairs.chosen_ids)
        candidates = _label(iteration, method, pairs, store, samples, scorer, labeler, phases)
        store.write(iteration, "candidates", candidates)
    store.remove_samples(iteration)

    bootstrapped = store.read(iteration, "bootstrapped")
    if bootstrapped is None:
        with phases.timed("select"):
            bootstrapped = _pair(iteration, method, candidates)
        store.write(iteration, "bootstrapped", bootstrapped)
    return training_pairs(pairs, offline, reference, candidates, bootstrapped)


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
    finished = store.sampled_rows(iteration)
    done = frozenset(finished.tolist())
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
    fresh = np.isin(samples["row"].to_numpy(), finished, invert=True)
    lengths = TokenColumn(samples["token_ids"]).lengths[fresh]
    phases.count("sample", len(lengths), int(lengths.sum()))
    report = json.dumps(sampler.report, sort_keys=True)
    return samples.replace_schema_metadata({"sampler": report})


def _samples_table(chunk: Chunk) -> pa.Table:
    flat = [(row, index, one) for row, found in chunk for index, one in enumerate(found)]
    lists = [one.token_ids for _, _, one in flat]
    # Flat, because pyarrow takes many times longer over a list of lists.
    tokens = np.fromiter(chain.from_iterable(lists), dtype=np.int32)
    offsets = np.cumsum([0, *map(len, lists)], dtype=np.int32)
    return make_table(
        {
            "row": [row for row, _, _ in flat],
            "candidate": [index for _, index, _ in flat],
            "token_ids": pa.ListArray.from_arrays(offsets, tokens),
            "finish_reason": [one.finish_reason for _, _, one in flat],
        }
    )


def _label(
    iteration: int,
    method: Method,
    pairs: Pairs,
    store: RunStore,
    samples: pa.Table,
    scorer: Scorer,
    labeler: Labeler,
    phases: Phases,
) -> pa.Table:
    """Score candidates under the reference and each policy their reward needs, and rank them."""
    token_ids = TokenColumn(samples["token_ids"])
    rows = samples["row"].to_numpy()
    prompts = pairs.prompt_ids.take(rows)
    ranking = method.ranking_policies(iteration)
    reference = method.reference(iteration)
    sampled = np.flatnonzero(pc.not_equal(samples["finish_reason"], DATASET).to_numpy())

    def score(policy: int) -> npt.NDArray[np.float64]:
        """Under theta_policy, which has scored the dataset's own answers before."""
        offline = offline_table(policy + 1, method, pairs, store, scorer, phases)
        found: npt.NDArray[np.float64] = offline["chosen_logp"].to_numpy()[rows]
        with phases.timed("score_candidates"):
            found[sampled] = scorer(
                policy, prompts.take(sampled), token_ids.take(sampled), "score_candidates"
            )
        return found

    logps = {policy: score(policy) for policy in dict.fromkeys([*ranking, reference])}
    for values in logps.values():
        require_finite(values, "log-probability of a candidate", rows)
    ranked = Ranked(
        iteration,
        len(samples) // len(pairs),
        prompts,
        token_ids,
        samples["finish_reason"].to_pylist(),
        [logps[policy] for policy in ranking],
    )
    with phases.timed("label"):
        reward = labeler.rewards(ranked)
    by_candidate = np.stack(ranked.logps, axis=1)
    table = samples.append_column(
        "logps",
        pa.ListArray.from_arrays(
            np.arange(len(rows) + 1, dtype=np.int32) * by_candidate.shape[1], by_candidate.ravel()
        ),
    ).append_column("reward", pa.array(reward))
    if reference != iteration - 1:
        table = table.append_column("reference_logp", pa.array(logps[reference]))
    told = {"labeler": json.dumps(labeler.report, sort_keys=True)}
    return table.replace_schema_metadata({**(table.schema.metadata or {}), **told})


def _pair(iteration: int, method: Method, candidates: pa.Table) -> pa.Table:
    """Pair best with worst within each prompt, keep the pairs with the largest margin."""
    rows = candidates["row"].to_numpy()
    per_prompt = len(rows) // len(np.unique(rows))
    tokens = TokenColumn(candidates["token_ids"])
    identity = tokens.numbered(per_prompt)
    lengths = tokens.lengths.reshape(-1, per_prompt)
    rewards = candidates["reward"].to_numpy().reshape(-1, per_prompt)

    def longer(controlled: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        found = pair_candidates(identity, controlled, method.config.pairs_per_prompt)
        chosen, rejected = (
            lengths[found.prompt, one].astype(np.float64) for one in (found.chosen, found.rejected)
        )
        return chosen - rejected

    setting = method.config.length_control
    alpha = 0.0 if setting == "none" else setting
    if alpha == "auto":
        alpha = equalizing_alpha(rewards, lengths, longer)
    found = pair_candidates(identity, rewards - alpha * lengths, method.config.pairs_per_prompt)
    table = make_table(
        {
            "row": rows[found.prompt * per_prompt],
            "chosen_candidate": found.chosen,
            "rejected_candidate": found.rejected,
            "margin": found.margin,
            "selected": select_largest(found.margin, method.sampled(iteration)),
        }
    )
    counts = {name: getattr(found, name) for name in ("duplicates", "ties", "too_few", "unranked")}
    told = counts | {"alpha": alpha}
    return table.replace_schema_metadata({name: str(value) for name, value in told.items()})


def candidate_places(
    candidates: pa.Table, bootstrapped: pa.Table
) -> dict[str, npt.NDArray[np.int64]]:
    """Where in candidates.parquet each sampled pair has its chosen and its rejected one."""
    first = np.searchsorted(candidates["row"].to_numpy(), bootstrapped["row"].to_numpy())
    return {
        side: first + bootstrapped[f"{side}_candidate"].to_numpy()
        for side in ("chosen", "rejected")
    }


def training_pairs(
    pairs: Pairs,
    offline: pa.Table,
    reference: pa.Table,
    candidates: pa.Table | None = None,
    bootstrapped: pa.Table | None = None,
) -> pa.Table:
    """D_t from the run directory's tables: token ids and log-probabilities.

    Args:
        pairs: the offline pairs.
        offline: the iteration's offline.parquet.
        reference: offline.parquet of the iteration that began from the reference.
        candidates, bootstrapped: the iteration's, if it samples.

    Raises:
        ValueError: if D_t is empty.
    """
    rows = np.arange(len(pairs))
    if "selected" in offline.column_names:
        rows = np.flatnonzero(offline["selected"].to_numpy(zero_copy_only=False))
    token_ids = {"chosen": pairs.chosen_ids.take(rows), "rejected": pairs.rejected_ids.take(rows)}
    logps = {
        f"{kind}_{side}_logps": table[f"{side}_logp"].to_numpy()[rows]
        for kind, table in (("ref", reference), ("policy", offline))
        for side in token_ids
    }
    if candidates is not None and bootstrapped is not None:
        selected = bootstrapped.filter(bootstrapped["selected"])
        rows = np.concatenate([rows, selected["row"].to_numpy()])
        sampled = TokenColumn(candidates["token_ids"])
        policy = pc.list_element(candidates["logps"], 0).to_numpy()
        other = "reference_logp" in candidates.column_names
        kinds = {"policy": policy, "ref": candidates["reference_logp"] if other else policy}
        for side, places in candidate_places(candidates, selected).items():
            token_ids[side] = token_ids[side].joined(sampled.take(places))
            for kind, values in kinds.items():
                name = f"{kind}_{side}_logps"
                logps[name] = np.concatenate([logps[name], np.asarray(values)[places]])
    if not len(rows):
        raise ValueError(
            "nothing is left to train on: no offline pair is kept and no two candidates of a "
            "prompt differ in reward. Raise sera.selection_ratio, sera.temperature or "
            "sera.candidates."
        )
    return make_table(
        {
            "prompt_ids": pairs.prompt_ids.take(rows),
            **{f"{side}_ids": column for side, column in token_ids.items()},
            **logps,
        }
    )
