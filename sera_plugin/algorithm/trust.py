"""Iteration t's reward on held-out pairs, and whether samples are ranked by it."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sera_plugin.algorithm.fit import CHANCE, OUTRANKING, Reward, judged, within_support
from sera_plugin.algorithm.method import Iteration, Scorer
from sera_plugin.algorithm.pairs import Labelled, Pairs
from sera_plugin.algorithm.rewards import FloatArray, require_finite
from sera_plugin.config.kinds import labeler_kind
from sera_plugin.rundir.store import make_table
from sera_plugin.rundir.tokens import TokenColumn

#: The two answers of a pair.
SIDES = ("chosen", "rejected")


def score_pairs(pairs: Pairs, policy: int, scorer: Scorer, phase: str) -> dict[str, FloatArray]:
    """log pi_policy of the chosen and rejected completions, (N,) each, in finite nats."""
    prompts = pairs.prompt_ids.joined(pairs.prompt_ids)
    both = scorer(policy, prompts, pairs.chosen_ids.joined(pairs.rejected_ids), phase)
    logps = {"chosen": both[: len(pairs)], "rejected": both[len(pairs) :]}
    for side, values in logps.items():
        require_finite(values, f"log-probability of {side}", np.arange(len(pairs)))
    return logps


def score_columns(pairs: Pairs, logps: dict[str, FloatArray]) -> dict[str, Any]:
    lengths = {"chosen": pairs.chosen_ids.lengths, "rejected": pairs.rejected_ids.lengths}
    named = {f"{side}_length": values for side, values in lengths.items()}
    return named | {f"{side}_logp": values for side, values in logps.items()}


def score_held_out(it: Iteration) -> dict[str, FloatArray]:
    """The held-out pairs' log-probabilities under iteration t's reference, (M,) each.

    Every policy that the iteration's reward needs scores them once (evaluation.parquet).
    """
    pairs, method = it.held_out, it.method
    assert pairs is not None
    for t in range(max(1, method.oldest_policy(it.t) + 1), it.t + 1):
        if it.at(t).read("evaluation") is None:
            with it.phases.timed("score_evaluation"):
                logps = score_pairs(pairs, t - 1, it.scorer, "score_evaluation")
            columns = {"row": np.arange(len(pairs)), **score_columns(pairs, logps)}
            it.at(t).keep("evaluation", make_table(columns))
    reference = it.at(method.reference(it.t) + 1).table("evaluation")
    return {side: reference[f"{side}_logp"].to_numpy() for side in SIDES}


def held_out_reward(it: Iteration) -> Reward:
    """Iteration t's reward, t >= 2, fitted to the held-out pairs' labels or judged by them."""
    paper = it.method.paper_weights(it.t)
    found = labelled(it)
    if found is None:
        return Reward(paper)
    return judged(paper, found.differences, it.method.config.reward == "fitted")


def labelled(it: Iteration) -> Labelled | None:
    """The held-out pairs with the features of iteration t's reward, t >= 2; None without any."""
    if it.held_out is None:
        return None
    score_held_out(it)
    scores = [it.at(policy + 1).table("evaluation") for policy in it.method.reward_policies(it.t)]
    chosen, rejected = (_features(scores, side, it.method.per_token) for side in SIDES)
    return Labelled(it.held_out, it.beside_held_out, chosen - rejected)


def _features(scores: Sequence[pa.Table], side: str, per_token: bool) -> FloatArray:
    """(M, policies + 1): log-probabilities as the loss reduces them, and tokens, of one side."""
    length = scores[0][f"{side}_length"].to_numpy().astype(np.float64)
    logps = [one[f"{side}_logp"].to_numpy() for one in scores]
    return np.stack([*(one / length if per_token else one for one in logps), length], axis=1)


def reward_of(it: Iteration) -> Reward:
    """Iteration t's reward, t >= 2, as `select` has recorded it."""
    recorded = (it.table("offline").schema.metadata or {}).get(b"reward")
    return Reward(**json.loads(recorded)) if recorded else Reward(it.method.paper_weights(it.t))


def acts(it: Iteration) -> bool:
    """Whether a reward that is not to be trusted is not followed, where it ranks anything."""
    return it.method.config.trust == "act" and it.method.config.ranks_by_reward


def ranks_alone(it: Iteration) -> bool:
    """Whether something is ranked by the reward without further labelers' scores."""
    config = it.method.config
    mixed = labeler_kind(config.labeler).mixed
    return config.selects_by_reward if mixed else config.ranks_by_reward


def like_a_coin(it: Iteration, reward: Reward) -> bool:
    """Whether iteration t does not follow `reward`, because a coin ranks as well."""
    return acts(it) and ranks_alone(it) and not reward.beats_coin


def wanted(it: Iteration) -> int:
    """How many sampled pairs iteration t asks for: none by a reward that ranks like a coin."""
    labeler = labeler_kind(it.method.config.labeler)
    # What is mixed may rank where the implicit reward alone does not; `pair` knows it.
    by_reward = it.t > 1 and labeler.implicit and not labeler.mixed
    return 0 if by_reward and like_a_coin(it, reward_of(it)) else it.method.sampled(it.t)


def follows(it: Iteration) -> bool:
    """Whether iteration t, which is prepared, trains on what its reward alone has ranked."""
    paired = it.read("bootstrapped") if wanted(it) else None
    return not like_a_coin(it, reward_of(it)) and (paired is None or not outranked(it, paired))


def outranked(it: Iteration, bootstrapped: pa.Table) -> bool:
    """Whether samples outrank the data's good answers, so that what is ranked is not followed."""
    known = bootstrapped.schema.metadata or {}
    return acts(it) and float(known.get(b"outranking", "-inf")) > OUTRANKING


def refused(it: Iteration, bootstrapped: pa.Table) -> bool:
    """Whether sampled pairs are not taken: samples outrank the data's good answers, or what several
    labelers' scores are mixed to ranks held-out pairs like a coin."""
    known = bootstrapped.schema.metadata or {}
    mixed_coin = acts(it) and float(known.get(b"by_chance", 0)) >= CHANCE
    return mixed_coin or outranked(it, bootstrapped)


def outranking(it: Iteration, candidates: pa.Table) -> float | None:
    """By how much theta_{t-1}'s samples outrank the offline chosen answers, in standard deviations.

    The mean of (log pi_{t-1} - log pi_{t-2}) / |y| over the samples less that over the chosen
    answers, by the deviation over all offline answers: so it has no unit that steps, lengths or
    models would change. Samples to prompts without a pair are left out: no answer to those is
    compared with. None where candidates are not scored under both policies.
    """
    if len(it.method.ranking_policies(it.t)) < 2:
        return None
    candidates = candidates.slice(0, len(candidates) // len(it.prompts) * len(it.pairs))
    newest, before = (pc.list_element(candidates["logps"], at).to_numpy() for at in (0, 1))
    ours = (newest - before) / TokenColumn(candidates["token_ids"]).lengths
    offline = [it.scores(it.t - back) for back in (1, 2)]
    gained = {}
    for side in SIDES:
        newest, before = (one[f"{side}_logp"].to_numpy() for one in offline)
        gained[side] = (newest - before) / offline[0][f"{side}_length"].to_numpy()
    deviation = float(np.std([gained[side] for side in SIDES]))
    return float(ours.mean() - gained["chosen"].mean()) / deviation if deviation else 0.0


def supported(it: Iteration, lengths: Any, logps: FloatArray) -> npt.NDArray[np.bool_]:
    """Which candidates the fit need not extrapolate for; nats under the reward's oldest policy."""
    offline = it.scores(it.method.reward_policies(it.t)[-1])
    both = [
        np.concatenate([offline[f"{side}_{what}"].to_numpy() for side in SIDES])
        for what in ("length", "logp")
    ]
    return within_support(lengths, logps, *both)
