"""Rows of a LLaMA-Factory dataset, and how they read as messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.csv as pa_csv
import pyarrow.ipc as pa_ipc
import pyarrow.parquet as pq

from sera_plugin.config.quoting import quoted
from sera_plugin.data.json_rows import json_rows

#: How LLaMA-Factory names the roles of messages where `tags` does not.
TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}


def read_rows(path: Path) -> list[Any]:
    """All rows of a file.

    Args:
        path: .json (a list, or an object a line), .jsonl, .csv, .parquet or .arrow.

    Raises:
        ValueError: if it holds no rows, naming the line of JSON that is none.
        OSError: if it cannot be read.
    """
    try:
        if path.suffix == ".parquet":
            return list(pq.read_table(path).to_pylist())
        if path.suffix == ".csv":
            return list(pa_csv.read_csv(path).to_pylist())
        if path.suffix == ".arrow":
            with path.open("rb") as file:
                return list(pa_ipc.open_stream(file).read_all().to_pylist())
        return [row for _, row in json_rows(path)]
    except ValueError as error:
        raise ValueError(f"{quoted(str(path), 200)} holds no rows: {error}") from error


def has_more(rows: Sequence[Any], columns: Mapping[str, Any]) -> bool:
    """Whether any row has something in a column that the host's strategy does not read.

    Args:
        rows: as `read_rows` gives them.
        columns: LLaMA-Factory's name of a column -> the file's.
    """
    more = [columns[name] for name in ("query", "system", "history") if columns.get(name)]
    return any(isinstance(row, Mapping) and row.get(name) for row in rows for name in more)


def as_messages(row: Any, columns: Mapping[str, Any], tags: Mapping[str, str]) -> Any:
    """A row as `messages`, `chosen` and `rejected`, the host's own names.

    What is wrong with a row stays wrong: SeRA names it, and drops it or stops.

    Args:
        row: one of `read_rows`.
        columns: LLaMA-Factory's name of a column -> the file's; with `messages`, or else `prompt`.
        tags: `TAGS`, or the dataset's own.
    """
    if not isinstance(row, Mapping):
        return row
    system = row.get(columns.get("system"))
    messages = [] if not system else [{"role": "system", "content": system}]
    if columns.get("messages"):
        turns = [_message(turn, tags) for turn in row.get(columns["messages"]) or ()]
        if turns and isinstance(turns[0], dict) and turns[0].get("role") == "system":
            messages = []  # it stands in for the column, as LLaMA-Factory has it
        messages += turns
        answers = [_message(row.get(columns[side]), tags) for side in ("chosen", "rejected")]
    else:
        for turn in row.get(columns.get("history")) or ():
            said = turn if isinstance(turn, list | tuple) else [turn]
            messages += [
                {"role": role, "content": one}
                for role, one in zip(("user", "assistant"), said, strict=False)
            ]
        parts = [row.get(columns.get(name)) for name in ("prompt", "query")]
        messages.append({"role": "user", "content": "\n".join(map(str, filter(None, parts)))})
        answers = [
            {"role": "assistant", "content": row.get(columns[side])}
            for side in ("chosen", "rejected")
        ]
    return {"messages": messages, "chosen": answers[0], "rejected": answers[1]}


def _message(turn: Any, tags: Mapping[str, str]) -> Any:
    if not isinstance(turn, Mapping):
        return turn
    role = turn.get(tags["role_tag"])
    return {"role": roles(tags).get(str(role), role), "content": turn.get(tags["content_tag"])}


def roles(tags: Mapping[str, str]) -> dict[str, str]:
    """The dataset's name of a role -> the host's. Calls of tools have none there."""
    return {
        tags["user_tag"]: "user",
        tags["assistant_tag"]: "assistant",
        tags["system_tag"]: "system",
        tags["observation_tag"]: "tool",
    }
