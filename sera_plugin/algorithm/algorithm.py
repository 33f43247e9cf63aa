"""Algorithm 1 of the paper: what iteration t trains on, against which reference.

`prepare` is the algorithm on one screen. Every phase leaves a file in the run directory and is
skipped when its file is there and whole, so a run that was cut off goes on where it stopped, and a
damaged file is made again.
"""

import json
import math
from collections.abc import Collection, Sequence
from contextlib import closing
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sera_plugin.algorithm.chunks import Sampled, all_samples, chunk_table
from sera_plugin.algorithm.fit import Reward
from sera_plugin.algorithm.method import DATASET, Iteration, Method, Ranked
from sera_plugin.algorithm.rewards import (
    FloatArray,
    equalizing_alpha,
    regressed_alpha,
    require_finite,
)
from sera_plugin.algorithm.selection import pair_candidates, select_largest
from sera_plugin.algorithm.trust import (
    SIDES,
    held_out_reward,
    labelled,
    like_a_coin,
    outranked,
    outranking,
    refused,
    reward_of,
    score_columns,
    score_pairs,
    supported,
    wanted,
)
from sera_plugin.config.kinds import SELECTIONS, labeler_kind
from sera_plugin.rundir.store import make_table
from sera_plugin.rundir.tables import candidate_places, candidates_of
from sera_plugin.rundir.tokens import TokenColumn

#: What `pair` has counted: metadata of bootstrapped.parquet.
COUNTS = ("duplicates", "ties", "too_few", "unranked")


def prepare(it: Iteration) -> pa.Table:
    """Everything between two epochs (Algorithm 1, lines 3 to 9): D_t.

    Its columns are prompt_ids, chosen_ids, rejected_ids (token ids), ref_chosen_logps,
    ref_rejected_logps (under the reference) and policy_chosen_logps, policy_rejected_logps
    (log pi_{t-1}): kept offline pairs in row order, then sampled pairs. A log-probability that is
    not finite is a ValueError that names its row, and so is an empty D_t.
    """
    restore(it, {*it.method.reward_policies(it.t), it.method.reference(it.t)})
    offline = it.once("offline", lambda: select(it, score(it)))  # lines 4 and 5
    reference = it.scores(it.method.reference(it.t))
    if not wanted(it):
        return union(it, offline, reference)
    candidates = it.once("candidates", lambda: rank(it, sample(it)))  # lines 6 and 7
    it.store.remove_samples(it.t)
    paired = it.once("bootstrapped", lambda: pair(it, candidates))  # lines 7 and 8
    if outranked(it, paired) or (refused(it, paired) and not it.method.kept(it.t)):
        offline = it.keep("offline", keep_all(it, offline))
    return union(it, offline, reference, candidates, paired)  # line 9


def score(it: Iteration) -> dict[str, FloatArray]:
    """log pi_{t-1} of the offline pairs: each policy scores them once (Algorithm 1, line 4)."""
    with it.phases.timed("score_offline"):
        return score_pairs(it.pairs, it.t - 1, it.scorer, "score_offline")


def select(it: Iteration, logps: dict[str, FloatArray]) -> pa.Table:
    """offline.parquet: rewards, margins and which pairs are kept (Algorithm 1, line 5)."""
    method, pairs = it.method, it.pairs
    columns: dict[str, Any] = {"row": np.arange(len(pairs))}
    columns |= {"prompt_length": pairs.prompt_ids.lengths, **score_columns(pairs, logps)}
    reward = held_out_reward(it) if it.t > 1 else None
    with it.phases.timed("select"):
        if reward is not None:
            earlier = [it.scores(policy) for policy in method.reward_policies(it.t)[1:]]
            chosen, rejected = rewards(it, reward, [columns, *earlier])
            columns |= {"chosen_reward": chosen, "rejected_reward": rejected}
            columns["margin"] = chosen - rejected
        columns |= _kept(it.t, method, columns)
    if method.annotations.swapped is not None:
        columns["swapped"] = method.annotations.swapped
    table = make_table(columns)
    if reward is None:
        return table
    table = table.replace_schema_metadata({"reward": json.dumps(asdict(reward))})
    return keep_all(it, table) if like_a_coin(it, reward) else table


def rewards(it: Iteration, reward: Reward, scores: Sequence[Any]) -> list[FloatArray]:
    """Implicit rewards of chosen and rejected, (N,) each, from scores, newest policy first."""
    logps = [[np.asarray(one[f"{side}_logp"]) for one in scores] for side in SIDES]
    lengths = [np.asarray(scores[0][f"{side}_length"]) for side in SIDES]
    return [reward(logps[side], lengths[side], it.method.per_token) for side in (0, 1)]


def keep_all(it: Iteration, offline: pa.Table) -> pa.Table:
    """offline.parquet with every pair selected, as in iterative DPO: where margins select, or where
    the samples that are not taken would have been all."""
    by_margin = SELECTIONS[it.method.config.selection].by_margin
    return select_rows(offline, True) if by_margin or not it.method.kept(it.t) else offline


def select_rows(table: pa.Table, whether: bool) -> pa.Table:
    """A table with all its rows `selected`, or none."""
    place = table.column_names.index("selected")
    return table.set_column(place, "selected", pa.array([whether] * len(table)))


def _kept(t: int, method: Method, columns: dict[str, Any]) -> dict[str, Any]:
    """`selected`, and `priority` where pairs are not ranked by `margin` as it stands."""
    kept, margin = method.kept(t), columns.get("margin")
    if margin is None and kept == method.total:
        return {}
    controlled, alpha = margin, method.config.offline_length_control
    if margin is not None and alpha != "none":
        longer = columns["chosen_length"].astype(np.float64) - columns["rejected_length"]
        if alpha == "auto":
            alpha = regressed_alpha(margin[None], longer[None])
        controlled = margin - alpha * longer
    # As the loss reduces its reward: summed over tokens, or averaged.
    tokens = [columns[f"{side}_length"] if method.per_token else 1 for side in SIDES]
    gap = columns["chosen_logp"] / tokens[0] - columns["rejected_logp"] / tokens[1]
    priority = method.selection.priority(t, controlled, gap)
    found = {"selected": select_largest(priority, kept)}
    return found if priority is margin else {"priority": priority, **found}


def restore(it: Iteration, policies: Collection[int]) -> None:
    """Make the offline scores under earlier policies again where a file is missing or damaged.

    A table's rewards need the policies before: found newest first and made oldest first.
    """
    needed, missing = set(policies), []
    for policy in range(it.t - 2, -1, -1):
        if policy in needed and it.at(policy + 1).read("offline") is None:
            missing.append(policy)
            needed |= {*it.method.reward_policies(policy + 1)[1:]}
    for policy in reversed(missing):
        earlier = it.at(policy + 1)
        earlier.keep("offline", select(earlier, score(earlier)))


def sample(it: Iteration) -> pa.Table:
    """R candidates per prompt from theta_{t-1}, in the order of (row, candidate).

    Finished chunks are kept at once, and those on disk are not made again.
    """
    ranks, total = it.store.ranks, len(it.prompts)
    with it.phases.timed("sample"):
        found, fresh = Sampled(total, it.settings), Sampled(total, it.settings)
        it.store.set_aside_samples(it.t, found.problem)
        before = ranks.sum(found.ends)  # rank 0 alone has read what there is
        done = frozenset(np.flatnonzero(before[:, 0]).tolist())
        mine = math.ceil((total - len(done)) / ranks.world)
        # Closed at once, whatever happens here: an engine may be running behind it.
        with (
            it.progress(mine, "sample") as advance,
            closing(it.sampler.sample(it.prompts, it.settings, skip=done)) as chunks,
        ):
            for chunk in chunks:
                table = chunk_table(chunk)
                it.store.append_samples(it.t, table)
                fresh.add(table)
                advance(chunk)
        added = ranks.sum(fresh.ends)  # once all have sampled
        for name, spent in it.sampler.seconds.items():
            it.phases.spend(name, spent)
        samples = all_samples(it.store, it.t, before + added)
    it.phases.count("sample", int(np.count_nonzero(added)), int(np.abs(added).sum()))
    report = json.dumps(it.sampler.report, sort_keys=True)
    return samples.replace_schema_metadata({"sampler": report})


def rank(it: Iteration, samples: pa.Table) -> pa.Table:
    """candidates.parquet: log-probabilities under the policies that matter, and rewards."""
    samples = it.labeler.complete(samples, it.pairs.chosen_ids)
    token_ids = TokenColumn(samples["token_ids"])
    rows = samples["row"].to_numpy()
    prompts = it.prompts.take(rows)
    is_given = pc.equal(samples["finish_reason"], DATASET).to_numpy()
    sampled = np.flatnonzero(~is_given)

    def under(policy: int) -> FloatArray:
        """Log-probabilities; theta_policy has scored the dataset's own answers before."""
        found = np.empty(len(rows))
        found[is_given] = it.scores(policy)["chosen_logp"].to_numpy()[rows[is_given]]
        with it.phases.timed("score_candidates"):
            found[sampled] = it.scorer(
                policy, prompts.take(sampled), token_ids.take(sampled), "score_candidates"
            )
        require_finite(found, "log-probability of a candidate", rows)
        return found

    logps = {policy: under(policy) for policy in it.method.candidates_under(it.t)}
    ranking = [logps[policy] for policy in it.method.ranking_policies(it.t)]
    per_prompt = candidates_of(samples, len(it.prompts))
    with it.phases.timed("label"):
        by = reward_of(it) if it.t > 1 else None
        aside = labelled(it) if labeler_kind(it.method.config.labeler).mixed else None
        ranked = Ranked(
            *(it.t, per_prompt, prompts, token_ids, ranking, it.sampler, it.settings, by),
            about=lambda place: it.beside.about(int(rows[place])),
            named=lambda place: f"row {rows[place]}",
            labelled=aside,
        )
        reward = it.labeler.rewards(ranked)
        if labeler_kind(it.method.config.labeler).implicit and it.method.config.reward == "fitted":
            reward[~supported(it, token_ids.lengths, ranking[-1])] = np.nan
    by_candidate = np.stack(ranking, axis=1)
    offsets = np.arange(len(rows) + 1, dtype=np.int32) * by_candidate.shape[1]
    lists = pa.ListArray.from_arrays(offsets, by_candidate.ravel())
    table = samples.append_column("logps", lists).append_column("reward", pa.array(reward))
    reference = it.method.reference(it.t)
    if reference != it.t - 1:
        table = table.append_column("reference_logp", pa.array(logps[reference]))
    report = {"labeler": json.dumps(it.labeler.report, sort_keys=True)}
    return table.replace_schema_metadata({**(table.schema.metadata or {}), **report})


def pair(it: Iteration, candidates: pa.Table) -> pa.Table:
    """bootstrapped.parquet: best with worst within each prompt, the largest margins selected."""
    config = it.method.config
    with it.phases.timed("select"):
        rows = candidates["row"].to_numpy()
        per_prompt = candidates_of(candidates)
        tokens = TokenColumn(candidates["token_ids"])
        identity = tokens.numbered(per_prompt)
        lengths = tokens.lengths.reshape(-1, per_prompt)
        rewards = candidates["reward"].to_numpy().reshape(-1, per_prompt)

        def longer(controlled: FloatArray) -> FloatArray:
            found = pair_candidates(identity, controlled, it.method.pairs_per_prompt)
            chosen = lengths[found.prompt, found.chosen].astype(np.float64)
            return chosen - lengths[found.prompt, found.rejected]

        alpha = 0.0 if config.length_control == "none" else config.length_control
        if alpha == "auto":
            alpha = equalizing_alpha(rewards, lengths, longer)
        found = pair_candidates(identity, rewards - alpha * lengths, it.method.pairs_per_prompt)
        table = make_table(
            {
                "row": rows[found.prompt * per_prompt],
                "chosen_candidate": found.chosen,
                "rejected_candidate": found.rejected,
                "margin": found.margin,
                "selected": select_largest(found.margin, it.method.sampled(it.t)),
            }
        )
    report = {name: str(getattr(found, name)) for name in COUNTS} | {"alpha": str(alpha)}
    if (gap := outranking(it, candidates)) is not None:
        report["outranking"] = str(gap)
    ranked = json.loads((candidates.schema.metadata or {}).get(b"labeler", b"{}"))
    if chance := ranked.get("reward"):
        report["by_chance"] = str(chance["by_chance"])
    table = table.replace_schema_metadata(report)
    return select_rows(table, False) if refused(it, table) else table


def union(
    it: Iteration,
    offline: pa.Table,
    reference: pa.Table,
    candidates: pa.Table | None = None,
    bootstrapped: pa.Table | None = None,
) -> pa.Table:
    """D_t from the iteration's tables, the last two if it samples; ValueError if it is empty.

    `reference` is offline.parquet of the iteration that began from the reference.
    """
    pairs = it.pairs
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
        kinds = {"policy": policy, "ref": policy}
        if "reference_logp" in candidates.column_names:
            kinds["ref"] = candidates["reference_logp"].to_numpy()
        for side, places in candidate_places(selected, len(candidates) // len(it.prompts)).items():
            token_ids[side] = token_ids[side].joined(sampled.take(places))
            for kind, values in kinds.items():
                name = f"{kind}_{side}_logps"
                logps[name] = np.concatenate([logps[name], values[places]])
    if not len(rows):
        raise ValueError(
            "nothing is left to train on: no offline pair is kept and no two candidates of a "
            "prompt differ in reward. Raise sera.selection_ratio, sera.temperature or "
            "sera.candidates."
        )
    return make_table(
        {
            "prompt_ids": it.prompts.take(rows),
            **{f"{side}_ids": column for side, column in token_ids.items()},
            **logps,
        }
    )
