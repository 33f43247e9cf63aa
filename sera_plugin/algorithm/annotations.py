"""What a dataset says of its pairs beside their texts: scores, equal prompts, swapped labels.

Labels are swapped on purpose for the paper's robustness experiment on anyone's data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sera_plugin.algorithm.rewards import FloatArray
from sera_plugin.config.kinds import SELECTIONS
from sera_plugin.config.quoting import quoted
from sera_plugin.config.sera import SeraConfig
from sera_plugin.rundir.tokens import TokenColumn

#: (N,) values each, by name.
Columns = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class Annotations:
    """What a dataset says of its pairs beside their texts, where selection reads it; (N,) each."""

    score_gap: FloatArray | None = None  # the dataset's score of chosen less that of rejected
    prompts: npt.NDArray[np.int32] | None = None  # numbers, equal where the prompts are
    swapped: npt.NDArray[np.bool_] | None = None  # which had their answers swapped on purpose


def by_side(names: Sequence[str]) -> dict[str, str]:
    """Columns that say something of one answer: the chosen one's name to the rejected one's.

    `score_chosen` and `score_rejected` are one score of two answers.
    """
    other = {name: name.replace("chosen", "rejected") for name in names}
    return {name: side for name, side in other.items() if side != name and side in names}


def annotate(
    config: SeraConfig,
    prompt_ids: TokenColumn,
    columns: Columns,
    swapped: npt.NDArray[np.bool_] | None,
) -> Annotations:
    """What the configuration's selection needs to know of the N offline pairs.

    `columns` are those of `score_columns`, as `swap` leaves them; `swapped` is None without noise.

    Raises:
        ValueError: if selection is by a score and there is none, naming the row that lacks it.
    """
    if not SELECTIONS[config.selection].reads_scores:
        return Annotations(swapped=swapped)
    prompts = prompt_ids.numbered(len(prompt_ids)).ravel()
    return Annotations(score_gap(columns, swapped), prompts, swapped)


def score_gap(columns: Columns, swapped: npt.NDArray[np.bool_] | None = None) -> FloatArray:
    """(N,) score of chosen less that of rejected, by the first column that has numbers.

    Two columns of a score have followed a swapped label to the other side; a column that is a gap
    turns its sign there.

    Raises:
        ValueError: if no column has, or a row of it has none.
    """
    rejected = by_side(list(columns))
    for name, values in columns.items():
        if name in rejected.values() or not any(map(_is_number, values)):
            continue
        gap = _numbers(name, values)
        if name in rejected:
            return gap - _numbers(rejected[name], columns[rejected[name]])
        return gap if swapped is None else np.where(swapped, -gap, gap)
    raise ValueError(
        f"sera.score_columns: {', '.join(map(quoted, columns))} has no numbers to select by. Name "
        "a score of each answer, such as [score_chosen, score_rejected]."
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _numbers(name: str, values: Sequence[Any]) -> FloatArray:
    for row, value in enumerate(values):
        if not _is_number(value) or not np.isfinite(value):
            raise ValueError(
                f"column {quoted(name)} is {quoted(value)} in row {row}, and sera.selection ranks "
                "by it. Give every row a number, or leave such rows out of the dataset."
            )
    return np.asarray(values, dtype=np.float64)


def swapped_rows(total: int, share: float, seed: int) -> npt.NDArray[np.bool_]:
    """(N,) bool: round(share N) rows at random, the same for the same seed."""
    order = np.random.default_rng((seed, total)).permutation(total)
    return np.isin(np.arange(total), order[: round(share * total)])


def swap(columns: Columns, swapped: npt.NDArray[np.bool_]) -> dict[str, Sequence[Any]]:
    """The columns with what belongs to an answer on the other side where `swapped`, (N,)."""
    found = dict(columns)
    for chosen, rejected in by_side(list(columns)).items():
        pairs = zip(columns[chosen], columns[rejected], swapped, strict=True)
        both = [(other, one) if turned else (one, other) for one, other, turned in pairs]
        found[chosen], found[rejected] = ([pair[side] for pair in both] for side in (0, 1))
    return found
