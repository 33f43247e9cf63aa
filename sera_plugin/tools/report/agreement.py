"""How far rewards agree with length and with the dataset's own columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sera_plugin.algorithm.annotations import by_side
from sera_plugin.algorithm.rewards import FloatArray
from sera_plugin.tools.report.data import SIDES, Columns, Iteration, Run

#: A column with more different values than this is not broken down by value.
_MOST_GROUPS = 12


def r_squared(x: npt.ArrayLike, y: npt.ArrayLike) -> float | None:
    """The squared correlation of two variables: the share of one's variance the other explains.

    Pairs of values of which one is not finite are left out. None with fewer than three pairs, or
    where a variable is constant.
    """
    one, other = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    good = np.isfinite(one) & np.isfinite(other)
    one, other = one[good], other[good]
    if len(one) < 3 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return None
    return float(np.corrcoef(one, other)[0, 1] ** 2)


def pooled(columns: Columns, what: str) -> FloatArray:
    """(2N,) a figure (`length`, `logp`, `reward`) of the chosen completions, then the rejected."""
    return np.concatenate([columns[f"{side}_{what}"].astype(np.float64) for side in SIDES])


def length_r2(one: Iteration, margin: FloatArray) -> dict[str, float | None]:
    """R^2 of rewards with length (Fig. 2), of margins with the difference in length."""
    columns = one.offline
    assert columns is not None
    found = {
        "reward": r_squared(pooled(columns, "length"), pooled(columns, "reward"))
        if "chosen_reward" in columns
        else None,
        "margin": r_squared(columns["chosen_length"] - columns["rejected_length"], margin),
    }
    if one.candidates is not None:
        sampled = ~one.candidates.from_dataset
        found["sampled"] = r_squared(
            one.candidates.lengths[sampled], one.candidates.reward[sampled]
        )
    return found


def score_columns(run: Run) -> dict[str, tuple[str, str] | None]:
    """Numeric score columns: what to call them, and the two columns of a score per completion.

    A column of numbers that is none of two (`facts.by_side`) is one per pair, and has None.
    """
    numeric = [name for name, values in run.scores.items() if _is_numeric(values)]
    sides = by_side(numeric)
    alone = [name for name in numeric if name not in {*sides, *sides.values()}]
    found: dict[str, tuple[str, str] | None] = {}
    for chosen, rejected in sides.items():
        short = chosen.replace("chosen", "").strip("_-. ")
        named = bool(short) and short not in found and short not in alone
        found[short if named else chosen] = (chosen, rejected)
    return found | dict.fromkeys(alone)


def numbers(values: Sequence[Any]) -> FloatArray:
    """A column as floats; what is missing is not a number."""
    return np.array([np.nan if value is None else float(value) for value in values])


def _is_numeric(values: Sequence[Any]) -> bool:
    known = [value for value in values if value is not None]
    return bool(known) and all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in known
    )


def score_difference(run: Run, columns: tuple[str, str] | None, name: str) -> FloatArray:
    """Per pair the chosen completion's score less the rejected one's, or the pair's own figure."""
    if columns is None:
        return numbers(run.scores[name])
    return numbers(run.scores[columns[0]]) - numbers(run.scores[columns[1]])


def score_r2(run: Run, one: Iteration) -> dict[str, Any]:
    """R^2 of rewards and margins with the dataset's own scores (Fig. 2, Fig. 11)."""
    offline, margin = one.offline, one.margin
    assert offline is not None
    assert margin is not None
    found = {}
    for name, columns in score_columns(run).items():
        difference = score_difference(run, columns, name)
        if len(difference) != len(margin):
            continue
        entry: dict[str, Any] = {"margin": r_squared(difference, margin)}
        if columns is not None and "chosen_reward" in offline:
            scores = np.concatenate([numbers(run.scores[column]) for column in columns])
            entry["reward"] = r_squared(scores, pooled(offline, "reward"))
        if columns is not None:
            differs = np.isfinite(difference) & (difference != 0)
            agree = (np.sign(difference) == np.sign(margin))[differs]
            entry["agreement"] = float(agree.mean()) if len(agree) else None
        found[name] = entry
    return found


def groups(run: Run, one: Iteration) -> dict[str, list[dict[str, Any]]]:
    """Columns with few different values (a source, a flag): what was kept of each."""
    margin, selected = one.margin, one.selected
    assert margin is not None
    assert selected is not None
    found = {}
    for name, values in run.scores.items():
        if len(values) != len(margin) or not all(
            isinstance(value, bool | str | int | None) for value in values
        ):
            continue
        distinct = sorted(set(values), key=lambda value: (str(type(value)), str(value)))
        if not 2 <= len(distinct) <= _MOST_GROUPS:
            continue
        of = np.array([distinct.index(value) for value in values])
        found[name] = [
            {
                "value": value,
                "pairs": int((of == index).sum()),
                "kept": float(selected[of == index].mean()),
                "median_margin": float(np.median(margin[of == index])),
            }
            for index, value in enumerate(distinct)
        ]
    return found
