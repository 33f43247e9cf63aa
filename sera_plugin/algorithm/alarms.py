"""Which warnings hold: pure functions of the summaries (summary.json) of the iterations so far.

Each alarm compares one figure with one threshold and says which key of the YAML to turn. None of
them stops a run: they say where to look. docs/alarms.md has the same thresholds in a table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

#: Sampled answers against the offline chosen ones, as a ratio of mean lengths. Preference tuning
#: that exploits length is known to end near twice the length of its data (Park et al. 2024,
#: "Disentangling Length from Quality in DPO"); half of that way is time to look.
SAMPLED_LENGTH = 1.5
#: Sampled answers against those of the first iteration that sampled. Lengths of answers scatter by
#: about their own mean's 0.7; over 100 candidates the ratio of two means is then known to 0.1, and
#: a growth of a quarter is not chance.
LENGTH_GROWTH = 1.25
#: How much longer chosen than rejected answers are in D_t, relative to the same in the offline
#: pairs. The data's own taste for length is the user's; selection and ranking should add little.
CHOSEN_LENGTH = 1.25
#: Nats per token. At 0.5 the policy's perplexity on the offline chosen answers has changed by a
#: factor of e^0.5 = 1.65: down, it unlearns what the data calls good; up, it learns it by heart.
DRIFT = 0.5
#: Smallest fall in accuracy worth a word, however many pairs there are...
ACCURACY_FALL = 0.03
#: ...and the fall in standard errors that chance would give in one of 40 comparisons. The earlier
#: accuracy is the best of several and so a little lucky: one standard error would cry wolf.
STANDARD_ERRORS = 2.0
#: Share of candidates that repeat another one of their prompt. At one half R candidates are worth
#: R / 2: what is paid for sampling and scoring is wasted by half.
DUPLICATES = 0.5
#: Share of prompts with fewer than two distinct candidates that have a reward, which give no pair.
#: Those left are the prompts on which the policy is least sure, and D_t leans towards them.
WITHOUT_PAIR = 0.25
#: Share of candidates without an end token. With one cut candidate in four, half of all pairs of
#: two have one (1 - C(3,2) / C(4,2)): trained as chosen they teach the policy not to stop.
UNFINISHED = 0.25
#: Nats per token. What the step-0 gate allows as rounding between two computations of the same
#: value in float32: rewards that differ by less are ranked by rounding.
SPREAD = 1e-3


@dataclass(frozen=True)
class Alarm:
    """One alarm that could be judged.

    Attributes:
        name: of the alarm, as in docs/alarms.md.
        figure: what was compared.
        threshold: with what. Figure and threshold share a unit, which docs/alarms.md names.
        raised: whether it holds.
        text: one sentence with the figures and what to change.
    """

    name: str
    figure: float
    threshold: float
    raised: bool
    text: str


Summaries = Sequence[Mapping[str, Any]]
#: What a check finds: the figure, its threshold, and the text; None without the figures it needs.
Found = tuple[float, float, str] | None


def judge(summaries: Summaries) -> list[Alarm]:
    """Every alarm that can be judged after the last of the summaries.

    Args:
        summaries: of iterations 1 to t, as summary.json has them; at least one.

    Returns:
        Raised and unraised alarms. One whose figures are missing (nothing sampled, nothing held
        out, no earlier iteration) is left out.
    """
    alarms = []
    for name, check in _CHECKS.items():
        found = check(summaries)
        if found is not None:
            figure, threshold, text = found
            raised = figure < threshold if name in _RAISED_BELOW else figure > threshold
            alarms.append(Alarm(name, figure, threshold, raised, text))
    return alarms


def records(alarms: Iterable[Alarm]) -> list[dict[str, Any]]:
    """The raised alarms as summary.json keeps them."""
    return [
        {key: value for key, value in asdict(alarm).items() if key != "raised"}
        for alarm in alarms
        if alarm.raised
    ]


def alarm_metrics(alarms: Iterable[Alarm]) -> dict[str, float]:
    """`sera/alarm/<name>` for the trackers: 1.0 raised, 0.0 judged and not raised."""
    return {f"sera/alarm/{alarm.name}": float(alarm.raised) for alarm in alarms}


def _sampled_length(summaries: Summaries) -> Found:
    lengths = summaries[-1]["lengths"]
    if "sampled" not in lengths:
        return None
    figure = lengths["sampled"] / lengths["chosen"]
    text = (
        f"sampled answers have {lengths['sampled']:.1f} tokens on average, {figure:.2f} times the "
        f"{lengths['chosen']:.1f} of the offline chosen ones: lower sera.bootstrap_ratio or "
        "learning_rate, set sera.length_control: auto, or rank per token with sera.loss: ipo or "
        "simpo."
    )
    return figure, SAMPLED_LENGTH, text


def _length_growth(summaries: Summaries) -> Found:
    sampled = [one for one in summaries if "sampled" in one["lengths"]]
    if len(sampled) < 2 or sampled[-1] is not summaries[-1]:
        return None
    before, now = (one["lengths"]["sampled"] for one in (sampled[0], sampled[-1]))
    text = (
        f"sampled answers have grown from {before:.1f} tokens in iteration "
        f"{sampled[0]['iteration']} to {now:.1f}, {now / before:.2f} times as many: raise rl_beta, "
        "lower learning_rate, or stop at an earlier iteration with num_epochs."
    )
    return now / before, LENGTH_GROWTH, text


def _chosen_length(summaries: Summaries) -> Found:
    lengths = summaries[-1]["lengths"]
    trained = lengths["trained_chosen"] / lengths["trained_rejected"]
    offline = lengths["chosen"] / lengths["rejected"]
    text = (
        f"in the pairs to train on chosen answers are {trained:.2f} times as long as rejected "
        f"ones, in the offline pairs {offline:.2f} times: selection and ranking prefer length. Set "
        "sera.length_control: auto, rank per token with sera.loss: ipo or simpo, or lower "
        "sera.bootstrap_ratio."
    )
    return trained / offline, CHOSEN_LENGTH, text


def _drift(summaries: Summaries) -> Found:
    drift, lengths = summaries[-1]["drift"], summaries[-1]["lengths"]
    # Sums over tokens divided by tokens: the mean over all tokens, not over completions.
    chosen, rejected = (drift[side] / lengths[side] for side in ("chosen", "rejected"))
    text = (
        f"the policy is {chosen:+.3f} nats per token from the initial one on the offline chosen "
        f"answers ({rejected:+.3f} on the rejected): raise rl_beta or lower learning_rate."
    )
    return abs(chosen), DRIFT, text


#: (accuracy, its standard error, pairs) of an iteration, None where it has none.
_Accuracy = tuple[float, float, int] | None


def _of_held_out(summary: Mapping[str, Any]) -> _Accuracy:
    found = summary.get("evaluation", {})
    if "accuracy_error" not in found:
        return None
    return found["accuracy"], found["accuracy_error"], found["pairs"]


def _of_offline(summary: Mapping[str, Any]) -> _Accuracy:
    if "offline_accuracy_error" not in summary:
        return None
    accuracy, error = summary["offline_accuracy"], summary["offline_accuracy_error"]
    return accuracy, error, summary["pairs"]["offline"]


def _fallen(
    summaries: Summaries, kind: str, accuracy_of: Callable[[Mapping[str, Any]], _Accuracy]
) -> Found:
    """The fall below the best earlier iteration, or below a coin, beyond chance.

    The errors are added as if two iterations were judged on different pairs. They are the same
    pairs, so the true error is smaller: the alarm is slow rather than nervous.
    """
    found = accuracy_of(summaries[-1])
    if found is None:
        return None
    now, error_now, pairs = found
    earlier = [("a coin", 0.5, 0.0)] + [
        (f"iteration {summary['iteration']}", *before[:2])
        for summary in summaries[:-1]
        if (before := accuracy_of(summary)) is not None
    ]
    by, best, error = max(earlier, key=lambda one: one[1])
    chance = STANDARD_ERRORS * math.hypot(error, error_now)
    text = (
        f"the implicit reward ranks {now:.1%} of {pairs} {kind} pairs as labelled, {by} "
        f"{best:.1%}, and chance would explain a fall of {chance:.1%}: stop at an earlier "
        "iteration with num_epochs, lower learning_rate or sera.bootstrap_ratio, or raise "
        "rl_beta."
    )
    return best - now, max(ACCURACY_FALL, chance), text


def _share(summaries: Summaries, part: str, whole: str, threshold: float, text: str) -> Found:
    """A share of what was sampled: two counts of the summary's `samples`."""
    samples = summaries[-1].get("samples")
    if samples is None:
        return None
    figure = samples[part] / samples[whole]
    return figure, threshold, f"{figure:.0%} of {samples[whole]} {text}"


def _duplicates(summaries: Summaries) -> Found:
    text = (
        "candidates repeat another one of their prompt: raise sera.temperature or sera.top_p, or "
        "lower sera.candidates."
    )
    return _share(summaries, "duplicates", "sampled", DUPLICATES, text)


def _without_pair(summaries: Summaries) -> Found:
    text = (
        "prompts have fewer than two distinct candidates and give no pair: raise "
        "sera.temperature, sera.top_p or sera.candidates."
    )
    unranked = summaries[-1].get("samples", {}).get("unranked")
    if unranked:
        text = (
            "prompts have fewer than two distinct candidates with a reward and give no pair, and "
            f"{unranked} candidates have none: `labeler` in summary.json says what became of "
            "them. Where they are few, raise sera.temperature, sera.top_p or sera.candidates."
        )
    return _share(summaries, "too_few", "prompts", WITHOUT_PAIR, text)


def _unfinished(summaries: Summaries) -> Found:
    text = (
        "candidates were cut before their end: raise sera.max_new_tokens (and sequence_len, if "
        "prompt and candidate fill it)."
    )
    return _share(summaries, "unfinished", "sampled", UNFINISHED, text)


def _constant(summaries: Summaries, of: str, what: str) -> Found:
    figure = summaries[-1].get("spread", {}).get(of)
    if figure is None:
        return None
    text = (
        f"{what} {figure:.2g} nats per token, no more than rounding: the last iteration has hardly "
        "changed the policy. Raise learning_rate, or lower rl_beta."
    )
    return figure, SPREAD, text


_CHECKS: Mapping[str, Callable[[Summaries], Found]] = {
    "sampled_length": _sampled_length,
    "length_growth": _length_growth,
    "chosen_length": _chosen_length,
    "drift": _drift,
    "held_out_accuracy": lambda summaries: _fallen(summaries, "held-out", _of_held_out),
    "offline_accuracy": lambda summaries: _fallen(summaries, "offline", _of_offline),
    "duplicates": _duplicates,
    "without_pair": _without_pair,
    "unfinished": _unfinished,
    "constant_rewards": lambda summaries: _constant(
        summaries, "sampled", "best and worst candidate of the middle prompt differ by"
    ),
    "constant_margins": lambda summaries: _constant(
        summaries, "offline", "the middle half of the offline margins lies within"
    ),
}
#: Those that are raised where the figure is too small.
_RAISED_BELOW = ("constant_rewards", "constant_margins")
