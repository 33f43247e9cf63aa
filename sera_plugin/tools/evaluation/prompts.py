"""Prompt sets: published formats as they are published, and JSON lines of one's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sera_plugin.config.quoting import quoted
from sera_plugin.data.files import json_rows
from sera_plugin.data.texts import encodable, visible

#: Where a row's prompt is, the first of these that it has, and where its category is if it has no
#: `category`.
FIELDS = {
    "turns": None,  # MT-Bench, Vicuna (llm_judge): a list of texts
    "instruction": "dataset",  # AlpacaEval
    "Instruction": "Skill",  # Evol-Instruct (WizardLM's test set)
    "prompt": None,  # UltraFeedback's test sets
    "text": None,  # Vicuna (the older table)
}


@dataclass(frozen=True)
class Prompt:
    """What a model is asked in each turn, its category ("" without one), its row from 0."""

    turns: tuple[str, ...]
    category: str
    row: int

    @property
    def question(self) -> str:
        """All turns in one text, for a judge and for export."""
        return joined(self.turns)


def joined(turns: Sequence[str]) -> str:
    """The texts of several turns in one, numbered; one turn is its own text."""
    if len(turns) == 1:
        return turns[0]
    return "\n\n".join(f"[Turn {number}]\n{text}" for number, text in enumerate(turns, start=1))


def read_prompts(path: Path, limit: int | None = None, seed: int = 0) -> list[Prompt]:
    """The prompts of a file of JSON lines, a JSON list or parquet, in its order.

    `limit` of them are drawn with the seed; a larger limit has those of a smaller one.

    Raises:
        ValueError: naming the file, the row and the field, if one cannot be used.
        OSError: if it cannot be read.
    """
    prompts = [_prompt(path, row, content) for row, content in enumerate(read_rows(path))]
    if not prompts:
        raise ValueError(f"{path} holds no prompts.")
    drawn = np.random.default_rng(seed).permutation(len(prompts))[:limit]
    return [prompts[row] for row in sorted(drawn.tolist())]


def read_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """The rows of a file of JSON lines, a JSON list, or parquet. Raises as `read_prompts`."""
    try:
        if path.suffix == ".parquet":
            yield from pq.read_table(path).to_pylist()
            return
        for where, row in json_rows(path):
            if not isinstance(row, dict):
                raise ValueError(f"{where} is {quoted(row)}, not an object with fields")
            yield row
    except pa.ArrowException as error:
        raise ValueError(f"{path} is not a parquet file: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _prompt(path: Path, row: int, content: Mapping[str, Any]) -> Prompt:
    field = next((name for name in FIELDS if name in content), None)
    if field is None:
        raise ValueError(
            f"{path}: row {row} has no prompt. A prompt is in {', '.join(FIELDS)}; this row has "
            f"{', '.join(map(quoted, content)) or 'no fields'}."
        )
    value = content[field]
    turns = value if field == "turns" else [value]
    if not isinstance(turns, list) or not turns:
        problem = f"{quoted(value)}, not a list of texts"
    else:
        problem = next(filter(None, map(_problem, turns)), "")
    if problem:
        raise ValueError(f"{path}: row {row}: {field} is {problem}")
    category = content.get("category", content.get(FIELDS[field] or ""))
    return Prompt(tuple(turns), "" if category is None else str(category), row)


def _problem(turn: Any) -> str:
    if not isinstance(turn, str):
        return f"{quoted(turn)}, not text"
    if not visible(turn):
        return "empty. Remove the row or mend it."
    return "" if encodable(turn) else "not valid Unicode: half of a surrogate pair"
