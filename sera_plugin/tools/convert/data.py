"""`dataset`, `eval_dataset` and `dataset_info.json` as the host's `datasets:`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sera_plugin.config.quoting import quoted
from sera_plugin.tools.convert.rows import TAGS, as_messages, has_more, read_rows, roles
from sera_plugin.tools.convert.settings import Settings

INFO = "dataset_info.json"
#: File name's end -> `ds_type`.
KINDS = {"json": "json", "jsonl": "json", "csv": "csv", "parquet": "parquet", "arrow": "arrow"}
#: LLaMA-Factory's columns where `dataset_info.json` names none.
COLUMNS = {"prompt": "instruction", "query": "input", "messages": "conversations"}
STRATEGY = "chat_template.default"


@dataclass(frozen=True)
class _Described:
    """A dataset as `dataset_info.json` describes it."""

    name: str
    info: Mapping[str, Any]
    directory: Path

    @property
    def columns(self) -> dict[str, Any]:
        """LLaMA-Factory's names of the columns -> the dataset's. One that is not named is none."""
        if "columns" in self.info:
            return dict(self.info["columns"])
        return COLUMNS

    @property
    def tags(self) -> dict[str, str]:
        return TAGS | dict(self.info.get("tags") or {})

    @property
    def conversations(self) -> bool:
        return self.info.get("formatting", "alpaca") != "alpaca"

    @property
    def read(self) -> dict[str, Any]:
        """The columns that make a row, of those that the format has."""
        other = ("prompt", "query", "history") if self.conversations else ("messages",)
        return {name: column for name, column in self.columns.items() if name not in other}


def put_datasets(settings: Settings) -> None:
    """Turn what `dataset` and `eval_dataset` name into the host's, and find rows to write anew.

    Raises:
        ValueError: if a dataset cannot be had, or is none of preference pairs in text.
    """
    if not settings.texts("dataset"):
        raise ValueError("dataset is not set")
    given = str(settings.text("dataset_dir"))
    described = _read_info(given)
    for name, to in (("dataset", "datasets"), ("eval_dataset", "test_datasets")):
        entries = []
        for one in settings.texts(name):
            if not isinstance(described.get(one), Mapping):
                known = ", ".join(list(described)[:10])
                raise ValueError(f"{name}: {quoted(one)} is not in {given}/{INFO}; {known} are")
            entries.append(_entry(settings, _Described(one, described[one], Path(given))))
        if entries:
            settings.out[to] = entries


def _read_info(given: str) -> dict[str, Any]:
    path = Path(given) / INFO
    if not path.is_file():
        raise ValueError(
            f"dataset_dir: {quoted(given, 200)} has no {INFO}. Run this where LLaMA-Factory is run "
            "(its own paths are relative to there), or set dataset_dir in the YAML"
        )
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def _entry(settings: Settings, one: _Described) -> dict[str, Any]:
    info = one.info
    for name in ("columns", "tags"):
        if not isinstance(info.get(name, {}), Mapping):
            raise ValueError(
                f"dataset: {quoted(one.name)} has {name} that are not blocks in {INFO}"
            )
    columns = one.columns
    if not info.get("ranking"):
        raise ValueError(f"dataset: {quoted(one.name)} has no `ranking: true`: it holds no pairs")
    for name in ("images", "videos", "audios"):
        if columns.get(name):
            raise ValueError(f"dataset: {quoted(one.name)} has {name}; rl: sera trains on text")
    if not columns.get("chosen") or not columns.get("rejected"):
        raise ValueError(f"dataset: {quoted(one.name)} names no columns chosen and rejected")
    for name in ("tools", "folder", "num_samples"):
        if columns.get(name) or info.get(name):
            settings.notes.append(f"{one.name}: `{name}` of {INFO} is left out. {_LOST[name]}")
    entry, rows = _source(one)
    limit = settings.whole("max_samples")
    if limit and (rows is None or limit < len(rows)):
        entry["split"] += f"[:{limit}]"
        if rows is None:
            settings.notes.append(
                f"max_samples: {one.name} has to have {limit} rows; with fewer, write its "
                "`split` without the bracket."
            )
    if rows is not None and has_more(rows, one.read):
        target = (settings.output or Path("converted.yaml")).with_suffix(f".{one.name}.jsonl")
        where = f"They are in {target} as messages."
        if settings.output is None:
            where = f"Give --output, and they are written beside it as messages ({target})."
        settings.notes.append(
            f"{one.name}: it has rows with more than the host's strategy reads (input, system or "
            f"history). {where}"
        )
        settings.rows[target] = [as_messages(row, one.read, one.tags) for row in rows]
        return {**entry, "path": str(target), "ds_type": "json", "type": STRATEGY}
    if rows is None and (unread := [n for n in ("query", "system", "history") if one.read.get(n)]):
        settings.notes.append(
            f"{one.name}: its rows were not looked at. What they have in "
            f"{', '.join(one.read[name] for name in unread)} is not trained; if there is anything, "
            "write them as messages first (docs/llama-factory.md)."
        )
    return {**entry, "type": STRATEGY, **_fields(one)}


_LOST = {
    "tools": "Descriptions of tools do not come into the prompts.",
    "folder": "Put the files' names into `data_files`.",
    "num_samples": "To take the first N rows write `split: train[:N]`.",
}


def _source(one: _Described) -> tuple[dict[str, Any], list[Any] | None]:
    """Where the dataset is, as the host has it, and its rows if it is a file that is here."""
    info = one.info
    part = {"split": info.get("split") or "train"}
    if info.get("hf_hub_url"):
        name = {"name": info["subset"]} if info.get("subset") else {}
        return {"path": info["hf_hub_url"], **name, **part}, None
    file_name = info.get("file_name")
    if not file_name:
        raise ValueError(
            f"dataset: {quoted(one.name)} comes from {', '.join(map(quoted, info)) or 'nowhere'}. "
            "The host loads files and datasets of the Hugging Face hub; download it and set "
            f"file_name in {INFO}"
        )
    path = one.directory / file_name
    if path.is_dir():
        return {"path": str(path), **part}, None
    kind = KINDS.get(path.suffix.lstrip("."))
    if kind is None:
        raise ValueError(f"dataset: {quoted(str(path), 200)} is not a {', '.join(KINDS)} file")
    entry = {"path": str(path), "ds_type": kind, **part}
    return entry, read_rows(path) if path.exists() else None


def _fields(one: _Described) -> dict[str, Any]:
    """What the host's strategy has to know of the columns, where it is not what it expects."""
    columns, tags = one.columns, one.tags
    messages = columns.get("messages" if one.conversations else "prompt")
    if not messages:
        raise ValueError(f"dataset: {quoted(one.name)} names no column of prompts")
    found: dict[str, Any] = {"field_messages": messages}
    for side in ("chosen", "rejected"):
        if columns[side] != side:
            found[f"field_{side}"] = columns[side]
    if one.conversations:
        keys = {"role": tags["role_tag"], "content": tags["content_tag"]}
        if keys != {"role": "role", "content": "content"}:
            found["message_property_mappings"] = keys
        named = roles(tags)
        if any(theirs != ours for theirs, ours in named.items()):
            found["roles"] = {ours: [theirs] for theirs, ours in named.items()}
    return found
