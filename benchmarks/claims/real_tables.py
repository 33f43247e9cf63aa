"""The tables of runs on a dataset, each a function of kept records alone."""

import json
from collections.abc import Iterable, Sequence
from statistics import mean

from benchmarks.claims.estimates import Estimate, Record
from benchmarks.claims.tables import shown
from benchmarks.harness import markdown


def real_table(records: Sequence[Record]) -> str:
    """What rewards follow and what ways to select keep, on a dataset with scores."""
    trained = [one for one in records if "iterations" in one]
    if not trained:
        return "No run on a dataset yet."
    one = trained[0]
    parts = [
        f"{one['pairs']} pairs of `{one['data']}`, model `{one['model']}`, "
        f"{mean(r['seconds'] for r in trained):.0f} s a run; `{json.dumps(one['settings'])}`.",
        "What the implicit reward r_t follows on the pairs that are trained on, and how many "
        "margins are above 0:",
        markdown(
            ("trained on", "t", "R^2 with score", "R^2 with length", "above 0"), _follows(trained)
        ),
        "What each way to select would keep under iterative DPO's policies:",
        markdown(
            ("would keep by", "t", "score gap", "length gap", "longer", "Jaccard with irm"),
            _would_keep([r for r in trained if r["real"] == "iterative DPO"]),
        ),
    ]
    if held_out := [r for r in trained if "held_out" in r]:
        about = held_out[0]["held_out"]
        parts += [
            f"What log π_t - log π_0 follows on {about['answers']} scored answers to "
            f"{about['prompts']} other prompts; the scores' own R^2 with length is "
            f"{about['score_r2_length']:.3f}:",
            markdown(
                (
                    "trained on",
                    "after",
                    "R^2 with score",
                    "R^2 with length",
                    "in the scores' order",
                ),
                _held_out(held_out),
            ),
        ]
    judged = [r["self_judging"] for r in records if "self_judging" in r]
    if judged:
        said, unread = (sum(found[name] for found in judged) for name in ("replies", "unparsed"))
        parts.append(
            f"As a judge of its own answers the policy gave {said:,} replies, of which {unread:,} "
            "held no score."
        )
    return "\n\n".join(parts)


def _runs(records: Sequence[Record]) -> dict[str, list[Record]]:
    names = dict.fromkeys(one["real"] for one in records)
    return {name: [one for one in records if one["real"] == name] for name in names}


def _over(values: Iterable[float | None], digits: int = 3, sign: str = "") -> str:
    found = [value for value in values if value is not None]
    return shown(Estimate.over(found), digits, sign)


def _follows(records: Sequence[Record]) -> list[list[str]]:
    return [
        [
            name if place == 0 else "",
            str(found[0]["iterations"][place]["iteration"]),
            *(
                _over(one["iterations"][place][figure] for one in found)
                for figure in ("r2_score", "r2_length", "accuracy")
            ),
        ]
        for name, found in _runs(records).items()
        for place in range(len(found[0]["iterations"]))
    ]


def _would_keep(records: Sequence[Record]) -> list[list[str]]:
    rows = []
    for place, first in enumerate(records[0]["iterations"] if records else ()):
        for name in first["kept"]:
            kept = [one["iterations"][place]["kept"][name] for one in records]
            rows.append(
                [
                    name,
                    str(first["iteration"]),
                    _over((one["score_gap"] for one in kept), sign="+"),
                    _over((one["length_gap"] for one in kept), 1, "+"),
                    _over(one["longer"] for one in kept),
                    _over(one["jaccard_irm"] for one in kept),
                ]
            )
    return rows


def _held_out(records: Sequence[Record]) -> list[list[str]]:
    return [
        [
            name if place == 0 else "",
            str(place + 1),
            *(
                _over(one["held_out"]["policies"][place][figure] for one in found)
                for figure in ("r2_score", "r2_length", "order")
            ),
        ]
        for name, found in _runs(records).items()
        for place in range(len(found[0]["held_out"]["policies"]))
    ]
