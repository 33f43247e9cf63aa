"""The page of an evaluation: win rates with their intervals, categories, and answers to read."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Any

from sera_plugin.tools.evaluation.results import Evaluation, tables
from sera_plugin.tools.report.output import fill, number, shown_name, shown_text

#: Examples of each kind per model, and the longest text of one.
_EXAMPLES, _LONGEST = 8, 4_000


def page(found: Evaluation, figures: Mapping[str, Any]) -> str:
    """The page as HTML."""
    return fill(
        "eval.html",
        title=f"Evaluation on {shown_name(found.path.name)}",
        figures=figures,
        facts=_facts(figures),
        intervals=_intervals(figures),
        tables=tables(figures),
        groups=_groups(found),
        settings=_settings(figures),
    )


def _facts(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    judge = figures["judge"]
    facts = [
        ("baseline", figures["baseline"]),
        ("prompts", f"{figures['prompts']['number']:,}"),
        ("judge", "none" if judge is None else shown_name(judge["name"], 120)),
    ]
    inconsistent = [one.get("inconsistent") for one in figures["models"]]
    known = [share for share in inconsistent if share is not None]
    if known:
        mean = sum(known) / len(known)
        facts.append(("verdicts that turn with the order", number(mean, ".0%")))
    if judge is not None:
        usage = judge["usage"]
        replies = usage["asked"]["count"] + usage["cached"]["count"]
        if replies:
            facts.append(("replies of the judge", f"{replies:,}"))
        if judge.get("cost") is not None:
            facts.append(("price", number(judge["cost"] + judge["cached_cost"], ".2f")))
    return facts


def _intervals(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Where each model's rate, interval and length-controlled rate are, 0 to 100."""
    found = []
    for one in figures["models"]:
        rate = one.get("win_rate")
        if rate is None or not rate["wins"] + rate["ties"] + rate["losses"]:
            continue
        places = {name: 100 * rate[name] for name in ("rate", "low", "high")}
        controlled = 100 * one["length_controlled"]
        found.append({"name": one["name"], **places, "controlled": controlled})
    return found


def _groups(found: Evaluation) -> list[dict[str, Any]]:
    """For each model some answers that lost and some that won, drawn by the seed."""
    groups = []
    for index in range(1, len(found.judged)):
        outcomes = found.judged[index].outcomes
        model = found.models[index].name
        for kind, rows in (
            ("loses", [row for row, one in enumerate(outcomes) if one < 0.5]),
            ("wins", [row for row, one in enumerate(outcomes) if one > 0.5]),
        ):
            drawn = Random(found.decoding.seed).sample(rows, min(_EXAMPLES, len(rows)))
            examples = [_example(found, index, row) for row in sorted(drawn)]
            if examples:
                groups.append({"title": f"{model} {kind}", "model": model, "examples": examples,
                               "of": len(rows)})  # fmt: skip
    return groups


def _example(found: Evaluation, index: int, row: int) -> dict[str, Any]:
    prompt, judged = found.prompts[row], found.judged[index]
    mine, theirs = found.answers[index][row], found.answers[0][row]
    assert mine is not None
    assert theirs is not None
    facts = {"outcome": number(float(judged.outcomes[row]), ".2f")}
    if judged.scores is not None and found.judged[0].scores is not None:
        scores = [one.scores[row] for one in (judged, found.judged[0]) if one.scores is not None]
        facts["scores"] = " against ".join(number(float(score)) for score in scores)
    if prompt.category:
        facts["category"] = shown_name(prompt.category)
    return {
        "row": prompt.row,
        "facts": facts,
        "prompt": shown_text(prompt.question, _LONGEST),
        "mine": shown_text(mine.text, _LONGEST),
        "theirs": shown_text(theirs.text, _LONGEST),
    }


def _settings(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    settings = [("prompts", figures["prompts"]["file"])]
    settings += [(f"model {one['name']}", one["source"]) for one in figures["models"]]
    settings += list(figures["decoding"].items())
    if figures["judge"] is not None:
        settings += [(f"judge: {k}", v) for k, v in figures["judge"]["description"].items()]
    return [(shown_text(str(key), 80), shown_text(str(value), 300)) for key, value in settings]
