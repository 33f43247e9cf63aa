"""`dataset`, `eval_dataset` and `dataset_info.json` as the host's `datasets:`, and their rows."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.csv as pa_csv
import pyarrow.ipc as pa_ipc
import pyarrow.parquet as pq

from sera_plugin.config.quoting import quoted
from sera_plugin.data.files import json_rows
from sera_plugin.tools.convert.settings import COLUMNS, DATASET_KEYS, TAGS, Settings

_INFO = "dataset_info.json"
#: File name's end -> `ds_type`.
_KINDS = {"json": "json", "jsonl": "json"} | {kind: kind for kind in ("csv", "parquet", "arrow")}
_READERS: dict[str, Any] = {
    ".csv": pa_csv.read_csv,
    ".parquet": pq.read_table,
    ".arrow": lambda file: pa_ipc.open_stream(file).read_all(),
}
_TYPE = {"type": "chat_template.default"}
_SIDES = ("chosen", "rejected")


def datasets(settings: Settings) -> dict[str, Any]:
    """What `dataset` and `eval_dataset` name as the host's; rows to write anew go to `settings`.

    Raises:
        ValueError: if a dataset cannot be had, or is none of preference pairs in text.
    """
    if not settings.texts("dataset"):
        raise ValueError("dataset is not set")
    given = str(settings.text("dataset_dir"))
    described = _read_info(given)
    out: dict[str, Any] = {"datasets": [], "test_datasets": []}
    for key, entries in zip(("dataset", "eval_dataset"), out.values(), strict=True):
        for name in settings.texts(key):
            if not isinstance(described.get(name), Mapping):
                known = ", ".join(list(described)[:10])
                raise ValueError(f"{key}: {quoted(name)} is not in {given}/{_INFO}; {known} are")
            entries.append(_entry(settings, name, described[name], Path(given)))
    return out


def _read_info(given: str) -> dict[str, Any]:
    path = Path(given) / _INFO
    if not path.is_file():
        raise ValueError(
            f"dataset_dir: {quoted(given, 200)} has no {_INFO}. Run this where LLaMA-Factory is "
            "run (its own paths are relative to there), or set dataset_dir in the YAML"
        )
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def _entry(settings: Settings, name: str, info: Mapping[str, Any], directory: Path) -> Any:
    """One of the host's `datasets:`."""

    def refused(why: str) -> ValueError:
        return ValueError(f"dataset: {quoted(name)} {why}")

    for part in ("columns", "tags"):
        if not isinstance(info.get(part, {}), Mapping):
            raise refused(f"has {part} that are not blocks in {_INFO}")
    columns, tags = dict(info.get("columns", COLUMNS)), TAGS | dict(info.get("tags", {}))
    if not info.get("ranking"):
        raise refused("has no `ranking: true`: it holds no pairs")
    for part in ("images", "videos", "audios"):
        if columns.get(part):
            raise refused(f"has {part}; rl: sera trains on text")
    if not all(map(columns.get, _SIDES)):
        raise refused("names no columns chosen and rejected")
    for part, remedy in DATASET_KEYS.items():
        if columns.get(part) or info.get(part):
            settings.notes.append(f"{name}: `{part}` of {_INFO} is left out. {remedy}")
    if not info.get("hf_hub_url") and not info.get("file_name"):
        raise refused(
            f"comes from {', '.join(map(quoted, info)) or 'nowhere'}. The host loads files and "
            f"datasets of the Hugging Face hub; download it and set file_name in {_INFO}"
        )
    entry, rows = _source(info, directory)
    limit = settings.whole("max_samples")
    if limit and (rows is None or limit < len(rows)):
        entry["split"] += f"[:{limit}]"
        if rows is None:
            settings.notes.append(
                f"max_samples: {name} has to have {limit} rows; with fewer, write its "
                "`split` without the bracket."
            )
    talks = info.get("formatting", "alpaca") != "alpaca"
    for unused in ("prompt", "query", "history") if talks else ("messages",):
        columns.pop(unused, None)
    more = [columns[one] for one in ("query", "system", "history") if columns.get(one)]
    if any(isinstance(row, Mapping) and row.get(one) for row in rows or () for one in more):
        target = (settings.output or Path("converted.yaml")).with_suffix(f".{name}.jsonl")
        where = f"They are in {target} as messages."
        if settings.output is None:
            where = f"Give --output, and they are written beside it as messages ({target})."
        settings.notes.append(
            f"{name}: it has rows with more than the host's strategy reads (input, system or "
            f"history). {where}"
        )
        settings.rows[target] = [_as_messages(row, columns, tags) for row in rows or ()]
        return {**entry, "path": str(target), "ds_type": "json", **_TYPE}
    if rows is None and more:
        settings.notes.append(
            f"{name}: its rows were not looked at. What they have in {', '.join(more)} is not "
            "trained; if there is anything, write them as messages first (docs/llama-factory.md)."
        )
    messages = columns.get("messages" if talks else "prompt")
    if not messages:
        raise refused("names no column of prompts")
    fields: dict[str, Any] = {"field_messages": messages}
    fields |= {f"field_{side}": columns[side] for side in _SIDES if columns[side] != side}
    keys, roles = {"role": tags["role_tag"], "content": tags["content_tag"]}, _roles(tags)
    if talks and any(theirs != ours for ours, theirs in keys.items()):
        fields["message_property_mappings"] = keys
    if talks and any(theirs != ours for theirs, ours in roles.items()):
        fields["roles"] = {ours: [theirs] for theirs, ours in roles.items()}
    return {**entry, **_TYPE, **fields}


def _source(info: Mapping[str, Any], directory: Path) -> tuple[dict[str, Any], list[Any] | None]:
    """Where the dataset is, as the host has it, and its rows if it is a file that is here."""
    split = {"split": info.get("split") or "train"}
    if info.get("hf_hub_url"):
        subset = {"name": info["subset"]} if info.get("subset") else {}
        return {"path": info["hf_hub_url"], **subset, **split}, None
    path = directory / info["file_name"]
    if path.is_dir():
        return {"path": str(path), **split}, None
    kind = _KINDS.get(path.suffix.lstrip("."))
    if kind is None:
        raise ValueError(f"dataset: {quoted(str(path), 200)} is not a {', '.join(_KINDS)} file")
    entry = {"path": str(path), "ds_type": kind, **split}
    return entry, read_rows(path) if path.exists() else None


def read_rows(path: Path) -> list[Any]:
    """All rows of a file of one of `_KINDS`; ValueError names a line of JSON that is none."""
    try:
        if path.suffix in (".json", ".jsonl"):
            return [row for _, row in json_rows(path)]
        with path.open("rb") as file:
            return list(_READERS[path.suffix](file).to_pylist())
    except ValueError as error:
        raise ValueError(f"{quoted(str(path), 200)} holds no rows: {error}") from error


def _as_messages(row: Any, columns: Mapping[str, Any], tags: Mapping[str, str]) -> Any:
    """A row as `messages`, `chosen` and `rejected`, the host's own names.

    What is wrong with a row stays wrong: SeRA names it, and drops it or stops.
    """
    if not isinstance(row, Mapping):
        return row
    given = {name: row.get(column) for name, column in columns.items()}
    messages = [_message("system", given["system"])] if given.get("system") else []
    if columns.get("messages"):
        turns = [_renamed(turn, tags) for turn in given["messages"] or ()]
        if turns and isinstance(turns[0], dict) and turns[0].get("role") == "system":
            messages = []  # it stands in for the column, as LLaMA-Factory has it
        answers = {side: _renamed(given[side], tags) for side in _SIDES}
        return {"messages": messages + turns, **answers}
    for turn in given.get("history") or ():
        said = turn if isinstance(turn, list | tuple) else [turn]
        messages += map(_message, ("user", "assistant"), said)
    parts = filter(None, map(given.get, ("prompt", "query")))
    messages.append(_message("user", "\n".join(map(str, parts))))
    return {"messages": messages} | {side: _message("assistant", given[side]) for side in _SIDES}


def _message(role: Any, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _renamed(turn: Any, tags: Mapping[str, str]) -> Any:
    if not isinstance(turn, Mapping):
        return turn
    role = turn.get(tags["role_tag"])
    return _message(_roles(tags).get(str(role), role), turn.get(tags["content_tag"]))


def _roles(tags: Mapping[str, str]) -> dict[str, str]:
    """The dataset's name of a role -> the host's. Calls of tools have none there."""
    names = {"user": "user", "assistant": "assistant", "system": "system", "observation": "tool"}
    return {tags[f"{theirs}_tag"]: ours for theirs, ours in names.items()}
