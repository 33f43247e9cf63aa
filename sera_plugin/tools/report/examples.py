"""Which pairs of a run are worth reading, as texts that can be shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sera_plugin.config.kinds import LABELERS
from sera_plugin.tools.report.data import Iteration, Run
from sera_plugin.tools.report.tokens import Texts, shown_name, shown_text

#: A report stays small, and a screen readable: `inspect --row` shows the whole of a pair.
_PROMPT, _COMPLETION = 1_200, 1_600
_FEW, _SUSPECTS = 8, 25


@dataclass(frozen=True)
class Example:
    """A pair to read.

    Attributes:
        row: of the dataset.
        margins: by iteration, what each policy thought of the pair.
        kept: whether the iteration trains on it.
        prompt, chosen, rejected: texts, made printable and cut.
        facts: the dataset's own columns; of sampled pairs what is unusual about an answer.
    """

    row: int
    margins: Mapping[int, float]
    kept: bool
    prompt: str
    chosen: str
    rejected: str
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
    found: list[Examples] = []
    chosen = [one for one in run.iterations if one.margin is not None]
    if chosen and run.tokens is not None:
        found += _offline(run, chosen[-1], texts)
    sampled = [
        one
        for one in run.iterations
        if one.bootstrapped is not None and one.candidates is not None and len(one.candidates.row)
    ]
    if sampled and run.tokens is not None:
        found += _bootstrapped(run, sampled[-1], texts)
    return [group for group in found if group.pairs]


def mislabelled(run: Run, most: int) -> tuple[Iteration, npt.NDArray[np.intp]]:
    """The newest iteration with margins, and its rows of negative margin, lowest first.

    Raises:
        ValueError: if no iteration has margins yet.
    """
    for one in reversed(run.iterations):
        if one.margin is not None:
            order = np.argsort(one.margin, kind="stable")
            return one, order[one.margin[order] < 0][:most]
    raise ValueError(
        f"{run.root} has no margins yet: they exist from iteration 2 on, once its offline pairs "
        "are scored."
    )


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
            name, title, meaning, [_offline_example(run, one, int(row), texts) for row in rows]
        )
        for name, title, meaning, rows in sets
    ]


def _offline_example(run: Run, one: Iteration, row: int, texts: Texts) -> Example:
    assert run.tokens is not None
    assert one.selected is not None
    return Example(
        row=row,
        margins=margins_of(run, row),
        kept=bool(one.selected[row]),
        prompt=shown_text(texts.exact(run.tokens["prompt_ids"][row]), _PROMPT),
        chosen=shown_text(texts.exact(run.tokens["chosen_ids"][row]), _COMPLETION),
        rejected=shown_text(texts.exact(run.tokens["rejected_ids"][row]), _COMPLETION),
        facts=facts(run, row) | swapped(run, row),
    )


def swapped(run: Run, row: int) -> dict[str, str]:
    """Says of a pair whose label was swapped on purpose that it was."""
    return {"label": "swapped on purpose"} if run.swapped is not None and run.swapped[row] else {}


def margins_of(run: Run, row: int) -> dict[int, float]:
    """An offline pair's margin in each iteration that has one."""
    return {one.number: float(one.margin[row]) for one in run.iterations if one.margin is not None}


def facts(run: Run, row: int) -> dict[str, str]:
    """What the dataset's own columns say of a pair."""
    return {
        shown_name(name): shown_text(str(_short(values[row])), 200)
        for name, values in run.scores.items()
    }


def _short(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value


def _bootstrapped(run: Run, one: Iteration, texts: Texts) -> list[Examples]:
    pairs, candidates = one.bootstrapped, one.candidates
    assert pairs is not None
    assert candidates is not None
    assert run.tokens is not None
    kept = np.flatnonzero(pairs["selected"])
    order = kept[np.argsort(-pairs["margin"][kept], kind="stable")]
    at = {side: one.sampled(side) for side in ("chosen", "rejected")}
    prompts = run.tokens["prompt_ids"]

    def example(pair: int) -> Example:
        row = int(pairs["row"][pair])
        text = {
            side: shown_text(texts.exact(candidates.tokens[int(index[pair])]), _COMPLETION)
            for side, index in at.items()
        }
        cut = [side for side, index in at.items() if candidates.unfinished[index[pair]]]
        given = [side for side, index in at.items() if candidates.from_dataset[index[pair]]]
        return Example(
            row=row,
            margins={one.number: float(pairs["margin"][pair])},
            kept=bool(pairs["selected"][pair]),
            prompt=shown_text(texts.exact(prompts[row]), _PROMPT),
            facts={
                name: " and ".join(sides)
                for name, sides in (("cut at the longest length", cut), ("the dataset's", given))
                if sides
            },
            **text,
        )

    sampler = f"theta_{one.number - 1}"
    if LABELERS[run.labeler].adds_dataset_answer:
        return [
            Examples(
                "bootstrapped",
                "Bootstrapped pairs",
                f"The dataset's chosen answers before samples of {sampler}. Can you tell which is "
                "which? Where nobody can, there is nothing left to learn.",
                [example(int(pair)) for pair in order[:_FEW]],
            )
        ]
    return [
        Examples(
            "best-bootstrapped",
            "Best bootstrapped pairs",
            f"Sampled answers of {sampler} that {LABELERS[run.labeler].ranks_by} tells apart "
            "most. Is the one it calls chosen better, or only longer?",
            [example(int(pair)) for pair in order[:_FEW]],
        ),
        Examples(
            "worst-bootstrapped",
            "Worst bootstrapped pairs",
            "The smallest margins among the sampled pairs that are still trained on.",
            [example(int(pair)) for pair in order[::-1][:_FEW] if pair not in order[:_FEW]],
        ),
    ]
