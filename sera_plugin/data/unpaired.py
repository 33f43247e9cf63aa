"""Single answers with a thumb up or down (KTO's rows): paired within a prompt, as far as they go.

The i-th good answer to a prompt and the i-th bad one are a pair, in the order of the dataset; each
answer is in one pair at most. Of two that are equal one gets another partner, if there is any. What
is left over is a row that holds no pair, and named like others.
"""

import json
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sera_plugin.config.quoting import quoted
from sera_plugin.data.marks import CONTENT
from sera_plugin.data.text import visible

#: Place and digest of an answer.
_Answer = tuple[int, bytes]
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
    waiting: dict[str, tuple[list[_Answer], list[_Answer]]] = defaultdict(lambda: ([], []))
    problems: dict[int, str] = {}
    columns = table.select([*same, completion, label])
    for place, row in enumerate(_rows(columns)):
        value, answer = row.pop(label), row.pop(completion)
        is_talk = isinstance(answer, list)
        history, last = (answer[:-1], answer[-1:]) if is_talk else (None, answer)
        if (kind := _label(value)) is None:
            problems[place] = f"{label} is {quoted(value)}, not true or false"
        elif not _says(last):
            problems[place] = f"{completion} is {'null' if answer is None else 'empty'}"
        else:
            key = json.dumps([row, history], sort_keys=True, default=str)
            text = json.dumps(last, sort_keys=True, default=str).encode()
            waiting[key][kind].append((place, blake2b(text, digest_size=16).digest()))
    found: list[tuple[int, int]] = []
    for bad, good in waiting.values():
        _part_equals(good, bad)
        found += ((one[0], other[0]) for one, other in zip(good, bad, strict=False))
        few = min(len(good), len(bad))
        problems |= {place: ALONE for place, _ in (*good[few:], *bad[few:])}
    found.sort()
    left = sorted(problems)
    return PairedUp(
        np.array([*(good for good, _ in found), *left], dtype=np.int64),
        np.array([*(bad for _, bad in found), *(-1 for _ in left)], dtype=np.int64),
        [*("" for _ in found), *(problems[place] for place in left)],
    )


def _label(value: Any) -> bool | None:
    """What a label says, also as 1 and 0 or in words; None of any other value."""
    if isinstance(value, str):
        # In quotes where a file has both text and others there: it is then read as JSON.
        return {"true": True, "false": False}.get(value.strip(' "').lower())
    return bool(value) if isinstance(value, (bool, int, float)) and value in (0, 1) else None


def _says(answer: Any) -> bool:
    """Whether an answer, text or messages, has anything to read or to call."""
    if isinstance(answer, list):
        return any(map(_says, answer))
    if isinstance(answer, Mapping):
        return any(_says(said) for key, said in answer.items() if key not in ("role", "from"))
    return visible(answer) if isinstance(answer, str) else answer is not None


def _part_equals(good: list[_Answer], bad: list[_Answer]) -> None:
    """Change places where the i-th of both read the same, as far as that leaves no others so."""
    few, most = min(len(good), len(bad)), max(len(good), len(bad))
    for i in range(few):
        for j in range(most if good[i][1] == bad[i][1] else 0):
            longer = good if len(good) > few and j >= few else bad
            longer[i], longer[j] = longer[j], longer[i]
            pairs = [(good[at][1], bad[at][1]) for at in (i, j) if at < few]
            if all(one != other for one, other in pairs):
                break
            longer[i], longer[j] = longer[j], longer[i]


def _rows(table: pa.Table) -> Any:
    """A row at a time, some thousands of them in memory."""
    for batch in table.to_batches(4_096):
        yield from batch.to_pylist()
