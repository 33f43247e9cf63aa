"""Prompt sets: published formats as they are published, and JSON lines of one's own."""

from __future__ import annotations

from collections import Counter
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
    """What a model is asked.

    Attributes:
        turns: what the user says, a text per turn; the model answers each.
        category: as the file has it, "" without one.
        row: in the file, counted from 0.
    """

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
    """The prompts of a file, in its order.

    Args:
        path: JSON lines, a JSON list, or parquet.
        limit: how many of them, drawn with the seed; a larger limit has those of a smaller one.
        seed: of the draw.

    Raises:
        ValueError: naming the file, the row and the field, if one cannot be used.
        OSError: if it cannot be read.
    """
    prompts = [_prompt(path, row, content) for row, content in enumerate(read_rows(path))]
    if not prompts:
        raise ValueError(f"{path} holds no prompts.")
    if limit is None or limit >= len(prompts):
        return prompts
    drawn = np.random.default_rng(seed).permutation(len(prompts))[:limit]
    return [prompts[row] for row in sorted(drawn.tolist())]


def duplicates(prompts: Sequence[Prompt]) -> int:
    """How many prompts are there again."""
    return sum(count - 1 for count in Counter(prompt.turns for prompt in prompts).values())


def read_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """The rows of a file of JSON lines, a JSON list, or parquet.

    Raises:
        ValueError: naming the line or row that is none.
        OSError: if it cannot be read.
    """
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
        raise ValueError(f"{path}: row {row}: {field} is {quoted(value)}, not a list of texts")
    for turn in turns:
        if not isinstance(turn, str):
            raise ValueError(f"{path}: row {row}: {field} is {quoted(turn)}, not text")
        if not visible(turn):
            raise ValueError(f"{path}: row {row}: {field} is empty. Remove the row or mend it.")
        if not encodable(turn):
            raise ValueError(
                f"{path}: row {row}: {field} is not valid Unicode: half of a surrogate pair"
            )
    category = content.get("category", content.get(FIELDS[field] or ""))
    return Prompt(tuple(turns), "" if category is None else str(category), row)
