"""Implicit rewards on labelled pairs in figures, tables and on the page."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from sera_plugin import __version__
from sera_plugin.tools.evaluation.results import FORMAT_VERSION
from sera_plugin.tools.evaluation.rewards import CATEGORIES, Labelled, Ranking
from sera_plugin.tools.evaluation.tables import best_of, percent, shares_table, told, within
from sera_plugin.tools.evaluation.winrate import FloatArray, by_group, share
from sera_plugin.tools.report.output import Table, fill, number, shown_name


def figures(
    path: Path,
    pairs: Sequence[Labelled],
    prompt_format: str | None,
    found: Sequence[tuple[Ranking, FloatArray]],
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """The evaluation as plain values, from each reward and its (n,) outcomes."""
    subsets = np.array([pair.subset for pair in pairs], dtype=object)
    rewards: list[dict[str, Any]] = []
    for ranking, outcome in found:
        of_subset = by_group(share, outcome, subsets)
        accuracies = {name: one["rate"] for name, one in of_subset.items() if one["number"]}
        categories = by_category(accuracies)
        rewards.append(
            {
                "name": ranking.name,
                "weights": ranking.weights,
                "per_token": ranking.per_token,
                "accuracy": asdict(share(outcome)),
                "subsets": of_subset,
                "categories": categories,
                "average": float(np.mean(list(categories.values()))) if categories else None,
            }
        )
    loud, quiet = told(
        (one["accuracy"]["missing"] / len(pairs), f"{one['name']}: {one['accuracy']['missing']} of "
         f"{len(pairs)} pairs do not fit into a model's context and are left out.")
        for one in rewards
    )  # fmt: skip
    return {
        "format_version": FORMAT_VERSION,
        "sera_plugin": __version__,
        "pairs": {
            "file": str(path),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "number": len(pairs),
        },
        "prompt_format": prompt_format,
        "rewards": rewards,
        "notes": [*notes, *loud],
        "remarks": quiet,
    }


def by_category(accuracies: Mapping[str, float]) -> dict[str, float]:
    """RewardBench's categories of which there are subsets, from the accuracy on each subset.

    As its leaderboard has them: weighted by `CATEGORIES`; the benchmark's figure is their mean.
    """
    found = {}
    for name, weights in CATEGORIES.items():
        there = {subset: weight for subset, weight in weights.items() if subset in accuracies}
        if there:
            total = sum(accuracies[subset] * weight for subset, weight in there.items())
            found[name] = total / sum(there.values())
    return found


def tables(figures: Mapping[str, Any]) -> list[Table]:
    """A line per reward, and accuracies by subset where there are several."""
    rewards = figures["rewards"]
    categories = list(rewards[0]["categories"])
    head = ["reward", "accuracy", "95% interval", "pairs", *categories]
    head += ["average"] if categories else []
    rows = []
    for one in rewards:
        rate = one["accuracy"]
        cells = [one["name"], percent(rate["rate"]), within(rate), number(rate["number"], ",")]
        cells += [percent(one["categories"].get(name)) for name in categories]
        rows.append(cells + ([percent(one["average"])] if categories else []))
    note = "How often the chosen answer has the larger reward; a tie counts half."
    if categories:
        absent = [name for name in CATEGORIES if name not in categories]
        note += " Average: the mean of RewardBench's categories"
        note += f"; not in the file: {', '.join(absent)}." if absent else "."
    best = best_of([one["accuracy"]["rate"] for one in rewards])
    found = [Table("Accuracy of rewards", head, rows, note, best=best)]
    subsets = {one["name"]: one["subsets"] for one in rewards}
    if len(rewards[0]["subsets"]) > 1:
        note = "With its 95% interval."
        found.append(shares_table("Accuracy by subset", ("subset", "pairs"), subsets, note))
    return found


def shown(figures: Mapping[str, Any]) -> str:
    """The evaluation for a terminal."""
    return fill("eval.txt", figures=figures, tables=tables(figures), judge=None).strip()


def page(figures: Mapping[str, Any], models: Mapping[str, str]) -> str:
    """The page as HTML; `models` are those that the command line names, with their source."""
    file = Path(figures["pairs"]["file"])
    settings = [("pairs", str(file)), ("prompt_format", figures["prompt_format"])]
    settings += [(f"model {name}", source) for name, source in models.items()]
    for one in figures["rewards"]:
        weighs = " ".join(f"{weight:+.3g} {name}" for name, weight in one["weights"].items())
        unit = ", log-probabilities per token" if one["per_token"] else ""
        settings.append((one["name"], weighs + unit))
    return fill(
        "eval.html",
        title=f"Rewards on {shown_name(file.name)}",
        figures=figures,
        facts=[("pairs", number(figures["pairs"]["number"], ","))],
        tables=tables(figures),
        rated=[],
        groups=[],
        settings=settings,
    )
