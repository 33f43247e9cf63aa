"""Single answers with a thumb up or down (KTO's rows): paired within a prompt, as far as they go.

The i-th good answer to a prompt and the i-th bad one are a pair, in the order of the dataset; each
answer is in one pair at most. What is left over is a row that holds no pair, and named like others.
"""

import json
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sera_plugin.config.quoting import quoted
from sera_plugin.data.marks import CONTENT

ALONE = "no answer with the other label is left for its prompt"


@dataclass(frozen=True)
class BothAnswers:
    """A strategy of the host for single answers, as one for pairs."""

    transform: Any  # a row with `completion` to `prompt` and `completion`

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The texts of a row with `chosen` and `rejected`."""
        sides = {name: {**row, "completion": row[name]} for name in ("chosen", "rejected")}
        made = {name: self.transform(side) for name, side in sides.items()}
        answers = {name: one["completion"] for name, one in made.items()}
        return {"prompt": made["chosen"]["prompt"], **answers}


@dataclass(frozen=True)
class PairedUp:
    """Rows that are pairs, then those that are not. Arrays are (n,)."""

    rows: npt.NDArray[np.int64]  # places of the chosen answers, then of what is left over
    rejected: npt.NDArray[np.int64]  # places of the rejected answers, -1 without
    problems: list[str]  # "" of a pair, else why there is none

    @property
    def pairs(self) -> int:
        return int((self.rejected >= 0).sum())


def pair_up(table: pa.Table, completion: str, label: str, prompt: Collection[str] = ()) -> PairedUp:
    """Pairs of rows whose `prompt` columns, and all that say something for any type, are equal.

    Where `completion` holds messages, those before the last one belong to the prompt too.
    """
    same = [one for one in table.column_names if one in CONTENT.union(prompt) - {completion}]
    waiting: dict[str, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    problems: dict[int, str] = {}
    columns = table.select([*same, completion, label])
    for place, row in enumerate(_rows(columns)):
        value, answer = row.pop(label), row.pop(completion)
        if isinstance(value, (bool, int)) and value in (0, 1):
            history = answer[:-1] if isinstance(answer, list) else None
            key = json.dumps([row, history], sort_keys=True, default=str)
            waiting[key][bool(value)].append(place)
        else:
            problems[place] = f"{label} is {quoted(value)}, not true or false"
    found: list[tuple[int, int]] = []
    for bad, good in waiting.values():
        found += zip(good, bad, strict=False)
        few = min(len(good), len(bad))
        problems |= dict.fromkeys((*good[few:], *bad[few:]), ALONE)
    found.sort()
    left = sorted(problems)
    return PairedUp(
        np.array([*(good for good, _ in found), *left], dtype=np.int64),
        np.array([*(bad for _, bad in found), *(-1 for _ in left)], dtype=np.int64),
        [*("" for _ in found), *(problems[place] for place in left)],
    )


def _rows(table: pa.Table) -> Any:
    """A row at a time, some thousands of them in memory."""
    for batch in table.to_batches(4_096):
        yield from batch.to_pylist()
