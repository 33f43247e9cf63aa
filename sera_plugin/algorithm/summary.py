"""What an iteration did, in figures: summary.json and the `sera/*` metrics."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from sera_plugin.algorithm.algorithm import COUNTS, rewards
from sera_plugin.algorithm.method import DATASET, Iteration
from sera_plugin.algorithm.noise import margin_noise
from sera_plugin.algorithm.rewards import FloatArray
from sera_plugin.algorithm.selection import BoolArray
from sera_plugin.algorithm.trust import SIDES, follows, ranks_alone, refused, reward_of, wanted
from sera_plugin.config.kinds import SELECTIONS, labeler_kind
from sera_plugin.rundir.tables import candidate_places, candidates_of
from sera_plugin.rundir.tokens import TokenColumn

_QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


def quantiles(values: npt.NDArray[Any] | Sequence[float]) -> dict[str, float] | None:
    """Quantiles by name ("0.5" is the median), or None of nothing."""
    if not np.size(values):
        return None
    return dict(zip(map(str, _QUANTILES), np.quantile(values, _QUANTILES).tolist(), strict=True))


def jaccard(one: BoolArray, other: BoolArray) -> float:
    """|A and B| / |A or B| of two selections; 1 when both are empty."""
    union = int((one | other).sum())
    return 1.0 if union == 0 else int((one & other).sum()) / union


def accuracy(name: str, margin: FloatArray, right: float | None = None) -> dict[str, float]:
    """The share of margins above 0, a tie being half right, and its standard error as
    `<name>_error`.

    `right` says how many are right where the margins' own signs do not. For the error two pairs of
    either kind are added (Agresti and Coull, 1998), lest a small set that is all right or all wrong
    seem to be without any.
    """
    total = len(margin)
    if right is None:
        right = float((margin > 0).sum() + (margin == 0).sum() / 2)
    share = (right + 2) / (total + 4)
    error = float(np.sqrt(share * (1 - share) / (total + 4)))
    return {name: right / total, f"{name}_error": error}


def noise_found(
    selection: str, swapped: BoolArray | None, kept: BoolArray
) -> dict[str, float | None] | None:
    """How well `sera.selection` found the labels that were swapped on purpose; (N,) each.

    By chance `precision` (of the dropped pairs) is the share that was swapped, and `recall` (of the
    swapped ones; None of none) the share that is dropped. None without label noise, where all pairs
    are kept or none, and under a curriculum, where what is not kept has its turn another time.
    """
    if swapped is None or not SELECTIONS[selection].rejects or kept.all() or not kept.any():
        return None
    found, all_swapped = int((swapped & ~kept).sum()), int(swapped.sum())
    return {
        "swapped": all_swapped,
        "swapped_dropped": found,
        "precision": found / int((~kept).sum()),
        "recall": found / all_swapped if all_swapped else None,
    }


def summarize(it: Iteration, moved: Mapping[str, Sequence[float]] | None = None) -> dict[str, Any]:
    """The content of summary.json before the iteration has trained: what its phases have left.

    `moved` is what `score_again` gives, None where computation is not in low precision.
    """
    method, table = it.method, it.table("offline")
    offline = {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}
    kept = offline.get("selected", np.ones(len(table), dtype=bool))
    pairs = {"offline": len(table), "kept": int(kept.sum()), "dropped": int((~kept).sum())}
    pairs |= {"bootstrapped_wanted": wanted(it)}
    pairs |= {"bootstrapped_found": 0, "bootstrapped_kept": 0, "trained": pairs["kept"]}
    initial = it.scores(0)
    summary: dict[str, Any] = {
        "iteration": it.t,
        "pairs": pairs,
        "lengths": {name: float(offline[f"{name}_length"].mean()) for name in ("prompt", *SIDES)},
        "drift": {
            side: float((offline[f"{side}_logp"] - initial[f"{side}_logp"].to_numpy()).mean())
            for side in SIDES
        },
        "seconds": dict(it.phases.seconds),
        "forwarded": {phase: dict(counts) for phase, counts in it.phases.forwarded.items()},
    }
    if noise := noise_found(method.config.selection, offline.get("swapped"), kept):
        summary["label_noise"] = noise
    if moved is not None:
        summary["noise"] = dict(moved)
    if (margin := offline.get("margin")) is not None:
        parts = {"offline": margin, "kept": margin[kept], "dropped": margin[~kept]}
        summary["margins"] = {name: quantiles(values) for name, values in parts.items()}
        summary |= accuracy("offline_accuracy", margin)
        tokens = np.mean([offline[f"{side}_length"] for side in SIDES])
        unit = 1.0 if method.per_token else float(tokens)
        spread = np.subtract(*np.quantile(margin, (0.75, 0.25)))
        summary["spread"] = {"offline": float(spread) / unit}
        if moved is not None:
            earlier = [it.store.summary(p + 1) for p in method.reward_policies(it.t)[1:]]
            found = margin_noise(it, [moved, *(one.get("noise", {}) for one in earlier)])
            summary["noise"] |= found
            # Half of all margins are nearer to their median than half of their middle half is wide.
            summary |= {"rounding": 2 * found["margin"] / unit} if found else {}
    if it.t > 2:
        previous = it.scores(it.t - 2)["selected"].to_numpy(zero_copy_only=False)
        summary["jaccard_with_previous"] = jaccard(kept, previous)
    trained = {side: offline[f"{side}_length"][kept] for side in SIDES}
    if wanted(it):
        for side, lengths in _add_samples(summary, it).items():
            trained[side] = np.concatenate([trained[side], lengths])
    for side, lengths in trained.items():
        summary["lengths"][f"trained_{side}"] = float(lengths.mean())
    if it.t > 1:
        policies, reward = method.reward_policies(it.t), reward_of(it)
        summary["reward"] = reward.record(policies)
        if ranks_alone(it):
            summary["reward"]["followed"] = follows(it)
        if it.read("evaluation") is not None:
            scores = [it.at(policy + 1).table("evaluation") for policy in policies]
            margin = np.subtract(*rewards(it, reward, scores))
            right = None if reward.accuracy is None else reward.accuracy * len(margin)
            found = accuracy("accuracy", margin, right)
            summary["evaluation"] = {"pairs": len(margin), **found, "margin": quantiles(margin)}
    return summary


def not_followed(summary: Mapping[str, Any]) -> str:
    """Which reward the iteration does not follow, in words; empty where it follows what it has."""
    mixed = summary.get("labeler", {}).get("reward", {})
    alone = not summary.get("reward", {}).get("followed", True)
    if not mixed.get("followed", True):
        return "reward" if alone else "reward with scores"
    return ("reward without scores" if mixed else "reward") if alone else ""


def _add_samples(summary: dict[str, Any], it: Iteration) -> dict[str, npt.NDArray[np.int32]]:
    """Count samples and sampled pairs; returns the lengths of the pairs kept, by side."""
    candidates, bootstrapped = it.table("candidates"), it.table("bootstrapped")
    selected = bootstrapped.filter(bootstrapped["selected"])
    count = candidates_of(candidates)
    tokens = TokenColumn(candidates["token_ids"])
    lengths, numbers = tokens.lengths, tokens.numbered(count)
    differ = (numbers != numbers[:, :1]).any(axis=1)
    for who in ("sampler", "labeler"):
        summary[who] = json.loads((candidates.schema.metadata or {}).get(who.encode(), b"{}"))
    metadata = bootstrapped.schema.metadata or {}
    if b"outranking" in metadata:
        summary["outranking"] = float(metadata[b"outranking"])
    reasons = candidates["finish_reason"]
    sampled = pc.not_equal(reasons, DATASET).to_numpy()
    summary["samples"] = {
        "prompts": len(differ),
        "sampled": int(sampled.sum()),
        "unfinished": int(pc.equal(reasons, "length").to_numpy().sum()),
        **{name: int(metadata.get(name.encode(), 0)) for name in COUNTS},
    }
    if mixed := summary["labeler"].get("reward"):
        mixed["followed"] = not refused(it, bootstrapped)
    if it.method.config.length_control != "none":
        summary["samples"]["length_control"] = float(metadata[b"alpha"])
    summary["pairs"]["bootstrapped_found"] = len(bootstrapped)
    summary["pairs"]["bootstrapped_kept"] = len(selected)
    summary["pairs"]["trained"] += len(selected)
    margins = summary.setdefault("margins", {})
    margins["bootstrapped"] = quantiles(selected["margin"].to_numpy())
    summary["lengths"]["sampled"] = float(lengths[sampled].mean())
    if labeler_kind(it.method.config.labeler).implicit:
        reward = np.ma.masked_invalid(candidates["reward"].to_numpy().reshape(-1, count))
        spread = np.ma.ptp(reward, axis=1).filled(0)
        if not it.method.per_token:
            spread = spread / lengths.reshape(-1, count).mean(axis=1)
        # Only where ranked candidates differ: equal ones say nothing about the reward.
        known = spread[differ & (reward.count(axis=1) > 1)]
        summary["spread"]["sampled"] = float(np.median(known)) if len(known) else None
    places = candidate_places(selected, count)
    kept = {side: lengths[place] for side, place in places.items()}
    for side, values in kept.items():
        summary["lengths"][f"bootstrapped_{side}"] = float(values.mean()) if len(values) else None
    return kept


#: Keys that a tracker has in a group with others.
_GROUPED = {
    "evaluation": "held_out",
    "held_out_loss": "held_out/loss",
    "offline_accuracy": "offline/accuracy",
    "offline_accuracy_error": "offline/accuracy_error",
    "jaccard_with_previous": "offline/jaccard_with_previous",
}


def metrics(summary: Mapping[str, Any], prefix: str = "sera") -> dict[str, float]:
    """The summary's numbers under `sera/GROUP/...` names for the host's trackers."""
    flat: dict[str, float] = {}
    for key, value in summary.items():
        key = _GROUPED.get(key, key)
        if isinstance(value, Mapping):
            flat |= metrics(value, f"{prefix}/{key}")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[f"{prefix}/{key}"] = float(value)
    return flat
