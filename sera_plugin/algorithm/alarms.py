"""Which warnings hold: pure functions of the summaries (summary.json) of the iterations so far.

Each alarm compares one figure with one threshold and says which key of the YAML to turn; none stops
a run. docs/alarms.md has the same thresholds in a table, with what each of them means.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sera_plugin.algorithm.fit import CHANCE, OUTRANKING

Summary = Mapping[str, Any]

#: The fall in accuracy, in standard errors, that chance would give in one of 40 comparisons. The
#: earlier accuracy is the best of several and so a little lucky: one error would cry wolf.
STANDARD_ERRORS = 2.0
#: A figure is bad above its threshold, that of `constant_*` below.
THRESHOLDS = {
    # Ratio of mean lengths. Preference tuning that exploits length is known to end near twice the
    # length of its data (Park et al. 2024, "Disentangling Length from Quality in DPO"); half of
    # that way is time to look.
    "sampled_length": 1.5,
    # Lengths of answers scatter by about their own mean's 0.7; over 100 candidates the ratio of two
    # means is then known to 0.1, and a growth of a quarter is not chance.
    "length_growth": 1.25,
    # The data's own taste for length is the user's; selection and ranking add little.
    "chosen_length": 1.25,
    # The policy's perplexity on the offline chosen answers has changed by a factor of e^0.5 = 1.65.
    "drift": 0.5,
    # Smallest fall worth a word, however many pairs there are.
    "held_out_accuracy": 0.03,
    "offline_accuracy": 0.03,
    # R candidates are worth R / 2: half of what sampling and scoring cost is wasted.
    "duplicates": 0.5,
    # Those left are the prompts on which the policy is least sure, and D_t leans towards them.
    "without_pair": 0.25,
    # With one cut candidate in four, half of all pairs of two have one (1 - C(3,2) / C(4,2)).
    "unfinished": 0.25,
    # One-sided 95 %: what a coin seldom does.
    "coin": CHANCE,
    "outranking": OUTRANKING,
    # What the step-0 gate allows as rounding of one value in float32, in nats per token. In low
    # precision it is more where a margin's noise was measured to be more (`summarize`).
    "constant_rewards": 1e-3,
    "constant_margins": 1e-3,
}
#: Alarms that advise to move the policy less. One of them is not contradicted.
_TOO_FAR = {"sampled_length", "length_growth", "drift", "outranking"}
_TOO_FAR |= {"held_out_accuracy", "offline_accuracy"}
_NOT_TRUSTED = "this iteration does not follow it (sera.trust: act)."
_TRUSTED = "set sera.trust: act, and such an iteration does not follow it."
_HARDLY_MOVED = (
    "If the policy has hardly moved, raise learning_rate or lower rl_beta; else hold out more "
    "pairs (sera.held_out)."
)
_HOLD_OUT = "Hold out more pairs (sera.held_out) to tell it better."
_MOVED_BEFORE = (
    "Another alarm says that it has moved far before: stop at an earlier iteration with num_epochs."
)
_TEXTS = {
    "sampled_length": "sampled answers have {sampled:.1f} tokens on average, {figure:.2f} times "
    "the {chosen:.1f} of the offline chosen ones: lower sera.bootstrap_ratio or "
    "learning_rate, set sera.length_control: auto, or rank per token with sera.loss: ipo or "
    "simpo.",
    "length_growth": "sampled answers have grown from {before:.1f} tokens in iteration {first} to "
    "{sampled:.1f}, {figure:.2f} times as many: raise rl_beta, lower learning_rate, or stop "
    "at an earlier iteration with num_epochs.",
    "chosen_length": "in the pairs to train on chosen answers are {trained:.2f} times as long as "
    "rejected ones, in the offline pairs {offline:.2f} times: selection and ranking prefer "
    "length. Set sera.length_control: auto, rank per token with sera.loss: ipo or simpo, or "
    "lower sera.bootstrap_ratio.",
    "drift": "the policy is {of_chosen:+.3f} nats per token from the initial one on the offline "
    "chosen answers ({of_rejected:+.3f} on the rejected): raise rl_beta or lower "
    "learning_rate.",
    "accuracy": "the implicit reward ranks {now:.1%} of {pairs} {kind} pairs as labelled, {by} "
    "{best:.1%}, and chance would explain a fall of {chance:.1%}: stop at an earlier iteration "
    "with num_epochs, lower learning_rate or sera.bootstrap_ratio, or raise rl_beta.",
    "coin": "the {what} ranks {accuracy:.1%} of {pairs} held-out pairs as labelled, and a coin's "
    "margins would be as good {figure:.0%} of the time: {done} {remedy}",
    "outranking": "the policy's own samples outrank the data's good answers by {figure:.2f} "
    "standard deviations, so its reward does not rank them any more: {done} Lower learning_rate or "
    "raise rl_beta for samples that can be used.",
    "duplicates": "{figure:.0%} of {sampled} candidates repeat another one of their prompt: raise "
    "sera.temperature or sera.top_p.",
    "without_pair": "{figure:.0%} of {prompts} prompts have fewer than two distinct candidates "
    "and give no pair: raise sera.temperature, sera.top_p or sera.candidates.",
    "unfinished": "{figure:.0%} of {sampled} candidates were cut before their end: raise "
    "sera.max_new_tokens (and sequence_len, if prompt and candidate fill it).",
    "constant": "{what} {figure:.2g} nats per token, no more than rounding: the last iteration has "
    "hardly changed the policy. {remedy}",
    "unranked": "{figure:.0%} of {prompts} prompts have fewer than two distinct candidates with a "
    "reward and give no pair, and {unranked} candidates have none: with sera.reward: fitted "
    "they are unlike the data's answers, else `labeler` in summary.json says why. Where they "
    "are few, raise sera.temperature, sera.top_p or sera.candidates.",
}


@dataclass(frozen=True)
class Alarm:
    """One alarm that could be judged, named as in docs/alarms.md, which has its figure's unit."""

    name: str
    figure: float
    threshold: float
    raised: bool
    text: str


def judge(summaries: Sequence[Summary]) -> list[Alarm]:
    """Every alarm, raised or not, that can be judged after the summaries of iterations 1 to t.

    One whose figures are missing (nothing sampled, nothing held out, no earlier iteration) is not.
    """
    now, found = summaries[-1], []

    def add(name: str, figure: float, chance: float = 0, text: str = "", **values: Any) -> None:
        threshold = max(THRESHOLDS[name], chance)
        if name.startswith("constant_"):
            threshold = max(THRESHOLDS[name], now.get("rounding") or 0)
        raised = figure < threshold if name.startswith("constant_") else figure > threshold
        said = _TEXTS[text or name].format(figure=figure, chance=chance, **values)
        found.append(Alarm(name, figure, threshold, raised, said))

    lengths, drift = now["lengths"], now["drift"]
    if "sampled" in lengths:
        add("sampled_length", lengths["sampled"] / lengths["chosen"], **lengths)
        first = next(one for one in summaries if "sampled" in one["lengths"])
        if first is not now:
            before = first["lengths"]["sampled"]
            values = {"before": before, "first": first["iteration"], **lengths}
            add("length_growth", lengths["sampled"] / before, **values)
    trained = lengths["trained_chosen"] / lengths["trained_rejected"]
    offline = lengths["chosen"] / lengths["rejected"]
    add("chosen_length", trained / offline, trained=trained, offline=offline)
    # Sums over tokens divided by tokens: the mean over all tokens, not over completions.
    chosen, rejected = (drift[side] / lengths[side] for side in ("chosen", "rejected"))
    add("drift", abs(chosen), of_chosen=chosen, of_rejected=rejected)
    spread = now.get("spread", {}).get("offline")
    rounding = max(THRESHOLDS["constant_margins"], now.get("rounding") or 0)
    rounded = spread is not None and spread < rounding
    for kind, key in (("held-out", "accuracy"), ("offline", "offline_accuracy")):
        if rounded:
            continue  # the signs of what is rounding
        known = [{**one, **one.get("evaluation", {})} for one in summaries]
        if f"{key}_error" in known[-1]:
            pairs = now["evaluation" if key == "accuracy" else "pairs"]
            count = pairs["pairs" if key == "accuracy" else "offline"]
            fall, chance, values = _fall(known, key, count)
            values |= {"kind": kind, "pairs": count}
            add(kind.replace("-", "_") + "_accuracy", fall, chance, "accuracy", **values)
    mixed = now.get("labeler", {}).get("reward")
    alone = "reward without scores" if mixed else "reward"
    rewards = {alone: now.get("reward", {}), "reward with scores": mixed or {}}

    def done(reward: Summary) -> str:
        return _TRUSTED if reward.get("followed") else _NOT_TRUSTED

    if now.get("outranking") is not None:
        add("outranking", now["outranking"], done=done(mixed or rewards[alone]))
    far = any(one.raised and one.name in _TOO_FAR for one in found)
    rank = [name for name, one in rewards.items() if {"by_chance", "followed"} <= one.keys()]
    if rank:  # else nothing is ranked by a reward
        worst = max(rank, key=lambda name: float(rewards[name]["by_chance"]))
        reward, remedy = rewards[worst], _HOLD_OUT if far else _HARDLY_MOVED
        add("coin", reward["by_chance"], what=worst, done=done(reward), remedy=remedy, **reward)
    if samples := now.get("samples"):
        unranked = "unranked" if samples.get("unranked") else ""
        add("duplicates", samples["duplicates"] / samples["sampled"], **samples)
        add("without_pair", samples["too_few"] / samples["prompts"], text=unranked, **samples)
        add("unfinished", samples["unfinished"] / samples["sampled"], **samples)
    for name, of, what in (
        ("rewards", "sampled", "best and worst candidate of the middle prompt differ by"),
        ("margins", "offline", "the middle half of the offline margins lies within"),
    ):
        if now.get("spread", {}).get(of) is not None:
            remedy = _MOVED_BEFORE if far else "Raise learning_rate, or lower rl_beta."
            value = now["spread"][of]
            add(f"constant_{name}", value, text="constant", what=what, remedy=remedy)
    return found


def _fall(
    summaries: Sequence[Summary], key: str, pairs: int
) -> tuple[float, float, dict[str, Any]]:
    """The fall of accuracy below the best earlier iteration or a coin, and what chance explains.

    The errors are added as if two iterations were judged on different pairs. They are the same
    pairs, so the true error is smaller: the alarm is slow rather than nervous. A coin's own error
    on this many pairs is known.
    """
    *earlier, (_, now, error) = (
        (f"iteration {one['iteration']}", one[key], one[f"{key}_error"])
        for one in summaries
        if f"{key}_error" in one
    )
    errors = [(by, share, math.hypot(error, other)) for by, share, other in earlier]
    by, best, scatter = max([("a coin", 0.5, 0.5 / math.sqrt(pairs)), *errors], key=lambda e: e[1])
    chance = STANDARD_ERRORS * scatter
    return best - now, chance, {"now": now, "by": by, "best": best}


def records(alarms: Iterable[Alarm]) -> list[dict[str, Any]]:
    """The raised alarms as summary.json keeps them."""
    kept = ("name", "figure", "threshold", "text")
    return [{key: getattr(one, key) for key in kept} for one in alarms if one.raised]


def alarm_metrics(alarms: Iterable[Alarm]) -> dict[str, float]:
    """`sera/alarm/<name>` for the trackers: 1.0 raised, 0.0 judged and not raised."""
    return {f"sera/alarm/{alarm.name}": float(alarm.raised) for alarm in alarms}
