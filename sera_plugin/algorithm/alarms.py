"""Which warnings hold: pure functions of the summaries (summary.json) of the iterations so far.

Each alarm compares one figure with one threshold and says which key of the YAML to turn. None of
them stops a run: they say where to look. docs/alarms.md has the same thresholds in a table.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    """One alarm that could be judged, named as in docs/alarms.md, which has its figure's unit."""

    name: str
    figure: float
    threshold: float
    raised: bool
    text: str


Summary = Mapping[str, Any]


def judge(summaries: Sequence[Summary]) -> list[Alarm]:
    """Every alarm, raised or not, that can be judged after the last of the summaries.

    One whose figures are missing (nothing sampled, nothing held out, no earlier iteration) is left
    out. `summaries` are those of iterations 1 to t, at least one.
    """
    now = summaries[-1]
    held_out = [{**one, **one.get("evaluation", {})} for one in summaries]
    return [
        *_of_lengths(summaries, now["lengths"]),
        _of_drift(now["drift"], now["lengths"]),
        *_of_accuracy("held-out", "accuracy", held_out),
        *_of_accuracy("offline", "offline_accuracy", summaries),
        *(_of_samples(now["samples"]) if "samples" in now else ()),
        *_of_spread(now.get("spread", {})),
    ]


def records(alarms: Iterable[Alarm]) -> list[dict[str, Any]]:
    """The raised alarms as summary.json keeps them."""
    kept = [asdict(alarm) for alarm in alarms if alarm.raised]
    return [{key: one[key] for key in ("name", "figure", "threshold", "text")} for one in kept]


def alarm_metrics(alarms: Iterable[Alarm]) -> dict[str, float]:
    """`sera/alarm/<name>` for the trackers: 1.0 raised, 0.0 judged and not raised."""
    return {f"sera/alarm/{alarm.name}": float(alarm.raised) for alarm in alarms}


def _above(name: str, figure: float, threshold: float, text: str) -> Alarm:
    return Alarm(name, figure, threshold, figure > threshold, text)


def _of_lengths(summaries: Sequence[Summary], lengths: Mapping[str, float]) -> Iterator[Alarm]:
    if "sampled" in lengths:
        now, ratio = lengths["sampled"], lengths["sampled"] / lengths["chosen"]
        text = (
            f"sampled answers have {now:.1f} tokens on average, {ratio:.2f} times the "
            f"{lengths['chosen']:.1f} of the offline chosen ones: lower sera.bootstrap_ratio or "
            "learning_rate, set sera.length_control: auto, or rank per token with sera.loss: ipo "
            "or simpo."
        )
        yield _above("sampled_length", ratio, SAMPLED_LENGTH, text)
        first = next(one for one in summaries if "sampled" in one["lengths"])
        if first is not summaries[-1]:
            before = first["lengths"]["sampled"]
            text = (
                f"sampled answers have grown from {before:.1f} tokens in iteration "
                f"{first['iteration']} to {now:.1f}, {now / before:.2f} times as many: raise "
                "rl_beta, lower learning_rate, or stop at an earlier iteration with num_epochs."
            )
            yield _above("length_growth", now / before, LENGTH_GROWTH, text)
    trained = lengths["trained_chosen"] / lengths["trained_rejected"]
    offline = lengths["chosen"] / lengths["rejected"]
    text = (
        f"in the pairs to train on chosen answers are {trained:.2f} times as long as rejected "
        f"ones, in the offline pairs {offline:.2f} times: selection and ranking prefer length. Set "
        "sera.length_control: auto, rank per token with sera.loss: ipo or simpo, or lower "
        "sera.bootstrap_ratio."
    )
    yield _above("chosen_length", trained / offline, CHOSEN_LENGTH, text)


def _of_drift(drift: Mapping[str, float], lengths: Mapping[str, float]) -> Alarm:
    # Sums over tokens divided by tokens: the mean over all tokens, not over completions.
    chosen, rejected = (drift[side] / lengths[side] for side in ("chosen", "rejected"))
    text = (
        f"the policy is {chosen:+.3f} nats per token from the initial one on the offline chosen "
        f"answers ({rejected:+.3f} on the rejected): raise rl_beta or lower learning_rate."
    )
    return _above("drift", abs(chosen), DRIFT, text)


def _of_accuracy(kind: str, key: str, found: Sequence[Summary]) -> Iterator[Alarm]:
    """The fall below the best earlier iteration, or below a coin, beyond chance.

    The errors are added as if two iterations were judged on different pairs. They are the same
    pairs, so the true error is smaller: the alarm is slow rather than nervous.
    """
    *earlier, last = found
    if f"{key}_error" not in last:
        return
    now, pairs = last[key], last["pairs"]
    pairs = pairs["offline"] if kind == "offline" else pairs
    known = [("a coin", 0.5, 0.0)] + [
        (f"iteration {one['iteration']}", one[key], one[f"{key}_error"])
        for one in earlier
        if f"{key}_error" in one
    ]
    by, best, error = max(known, key=lambda one: one[1])
    chance = STANDARD_ERRORS * math.hypot(error, last[f"{key}_error"])
    text = (
        f"the implicit reward ranks {now:.1%} of {pairs} {kind} pairs as labelled, {by} "
        f"{best:.1%}, and chance would explain a fall of {chance:.1%}: stop at an earlier "
        "iteration with num_epochs, lower learning_rate or sera.bootstrap_ratio, or raise "
        "rl_beta."
    )
    name = kind.replace("-", "_") + "_accuracy"
    yield _above(name, best - now, max(ACCURACY_FALL, chance), text)


def _of_samples(samples: Mapping[str, int]) -> Iterator[Alarm]:
    def share(name: str, part: str, whole: str, threshold: float, text: str) -> Alarm:
        figure = samples[part] / samples[whole]
        return _above(name, figure, threshold, f"{figure:.0%} of {samples[whole]} {text}")

    text = (
        "candidates repeat another one of their prompt: raise sera.temperature or sera.top_p, or "
        "lower sera.candidates."
    )
    yield share("duplicates", "duplicates", "sampled", DUPLICATES, text)
    text = (
        "prompts have fewer than two distinct candidates and give no pair: raise "
        "sera.temperature, sera.top_p or sera.candidates."
    )
    if unranked := samples.get("unranked"):
        text = (
            "prompts have fewer than two distinct candidates with a reward and give no pair, and "
            f"{unranked} candidates have none: `labeler` in summary.json says what became of "
            "them. Where they are few, raise sera.temperature, sera.top_p or sera.candidates."
        )
    yield share("without_pair", "too_few", "prompts", WITHOUT_PAIR, text)
    text = (
        "candidates were cut before their end: raise sera.max_new_tokens (and sequence_len, if "
        "prompt and candidate fill it)."
    )
    yield share("unfinished", "unfinished", "sampled", UNFINISHED, text)


def _of_spread(spread: Mapping[str, float | None]) -> Iterator[Alarm]:
    for name, of, what in (
        ("rewards", "sampled", "best and worst candidate of the middle prompt differ by"),
        ("margins", "offline", "the middle half of the offline margins lies within"),
    ):
        if (figure := spread.get(of)) is not None:
            text = (
                f"{what} {figure:.2g} nats per token, no more than rounding: the last iteration "
                "has hardly changed the policy. Raise learning_rate, or lower rl_beta."
            )
            yield Alarm(f"constant_{name}", figure, SPREAD, figure < SPREAD, text)
