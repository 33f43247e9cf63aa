"""Which pairs of a run are worth reading, as texts that can be shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sera_plugin.config.kinds import LABELERS
from sera_plugin.tools.report.data import Iteration, Run
from sera_plugin.tools.report.pairs import Pair, mislabelled, offline_pair, sampled_pair, swapped
from sera_plugin.tools.report.tokens import Texts, shown_name, shown_text

#: A report stays small, and a screen readable: `inspect --row` shows the whole of a pair.
_LONGEST = {"prompt": 1_200, "chosen": 1_600, "rejected": 1_600}
_FEW, _SUSPECTS = 8, 25


@dataclass(frozen=True)
class Example:
    """A pair to read, with `prompt`, `chosen` and `rejected` as texts, made printable and cut."""

    pair: Pair
    text: Mapping[str, str]
    facts: Mapping[str, str]


@dataclass(frozen=True)
class Examples:
    """Pairs with one thing in common: `title` names it, `meaning` says how to read them."""

    name: str
    title: str
    meaning: str
    pairs: Sequence[Example]


def examples(run: Run, texts: Texts) -> list[Examples]:
    """The pairs of the newest iteration with margins that say most about run and data."""
    if run.tokens is None:
        return []
    found: list[Examples] = []
    chosen = [one for one in run.iterations if one.margin is not None]
    if chosen:
        found += _offline(run, chosen[-1], texts)
    sampled = [
        one
        for one in run.iterations
        if one.bootstrapped is not None and one.candidates is not None and len(one.candidates.row)
    ]
    if sampled:
        found += _sampled(run, sampled[-1], texts)
    return [group for group in found if group.pairs]


def printable_facts(facts: Mapping[str, Any]) -> dict[str, str]:
    """A pair's facts as they can be shown."""
    return {shown_name(name): shown_text(_short(value), 200) for name, value in facts.items()}


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _example(pair: Pair, texts: Texts, more: Mapping[str, str] | None = None) -> Example:
    text = {name: shown_text(texts.exact(pair.ids[name]), most) for name, most in _LONGEST.items()}
    return Example(pair, text, {**printable_facts(pair.facts), **(more or {})})


def _offline(run: Run, one: Iteration, texts: Texts) -> list[Examples]:
    margin = one.margin
    assert margin is not None
    order = np.argsort(margin, kind="stable")
    when = f"in iteration {one.number}"
    by_margin = one.offline is not None and "priority" not in one.offline
    first = ", and selection keeps them first" if by_margin else ""
    sets = [
        (
            "mislabelled",
            "The policy disagrees with the label",
            f"Most negative margins {when}: the policy has come to prefer the answer that the data "
            "calls rejected. Read these first: wrong labels collect here, and so do pairs that "
            "are merely hard.",
            mislabelled(run, _SUSPECTS)[1],
        ),
        (
            "decided",
            "Most decided",
            f"Largest margins {when}: training has moved these pairs furthest{first}. If they "
            "share something trivial (length, a phrase, a format), that is what the policy learns.",
            order[::-1][:_FEW],
        ),
        (
            "undecided",
            "Least decided",
            f"Margins closest to 0 {when}: the policy has learnt nothing about which answer is "
            "better.",
            np.argsort(np.abs(margin), kind="stable")[:_FEW],
        ),
    ]
    return [
        Examples(
            name,
            title,
            meaning,
            [
                _example(offline_pair(run, one, row), texts, swapped(run, row))
                for row in rows.tolist()
            ],
        )
        for name, title, meaning, rows in sets
    ]


def _sampled(run: Run, one: Iteration, texts: Texts) -> list[Examples]:
    pairs = one.bootstrapped
    assert pairs is not None
    kept = np.flatnonzero(pairs["selected"])
    order = kept[np.argsort(-pairs["margin"][kept], kind="stable")].tolist()
    sampler = f"theta_{one.number - 1}"
    if LABELERS[run.labeler].adds_dataset_answer:
        sets = [
            (
                "bootstrapped",
                "Bootstrapped pairs",
                f"The dataset's chosen answers before samples of {sampler}. Can you tell which is "
                "which? Where nobody can, there is nothing left to learn.",
                order[:_FEW],
            )
        ]
    else:
        sets = [
            (
                "best-bootstrapped",
                "Best bootstrapped pairs",
                f"Sampled answers of {sampler} that {LABELERS[run.labeler].ranks_by} tells "
                "apart most. Is the one it calls chosen better, or only longer?",
                order[:_FEW],
            ),
            (
                "worst-bootstrapped",
                "Worst bootstrapped pairs",
                "The smallest margins among the sampled pairs that are still trained on.",
                order[_FEW:][::-1][:_FEW],
            ),
        ]
    return [
        Examples(
            name,
            title,
            meaning,
            [_example(sampled_pair(run, one, index), texts) for index in indices],
        )
        for name, title, meaning, indices in sets
    ]
