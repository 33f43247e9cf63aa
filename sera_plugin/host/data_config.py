"""What the `datasets:` and `test_datasets:` of a configuration may say."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from sera_plugin.config.quoting import quoted

#: The host's strategy for rows that are prompt, chosen and rejected already. Without any type it
#: would not look at such rows at all before it measures their length.
READY_MADE = "passthrough.default"


def check_datasets(
    cfg: Mapping[str, Any], entry_keys: Collection[str], type_keys: Collection[str]
) -> None:
    """Refuse datasets that the host would stumble over, or read otherwise than they were meant.

    Args:
        cfg: the raw configuration.
        entry_keys: the host's keys of a dataset.
        type_keys: the host's keys of a `type:` block.

    Raises:
        ValueError: naming the key, the value, and what to do.
    """
    example = "`datasets: [{path: pairs.jsonl, type: chat_template.default}]`"
    if cfg.get("datasets") is None:
        raise ValueError(f"datasets is not set. Name preference pairs, for example {example}.")
    for key in ("datasets", "test_datasets"):
        entries = cfg.get(key)
        if entries is None:
            continue
        if not isinstance(entries, (list, tuple)) or not entries:
            raise ValueError(
                f"{key}: {quoted(entries)} is not a list of datasets. Write for example {example}."
            )
        for index, entry in enumerate(entries):
            _check_entry(f"{key}[{index}]", entry, entry_keys, type_keys)


def _check_entry(
    key: str, entry: Any, entry_keys: Collection[str], type_keys: Collection[str]
) -> None:
    if not isinstance(entry, Mapping):
        raise ValueError(
            f"{key}: {quoted(entry)} is not a block of keys. Write `path:` and `type:` under it."
        )
    _check_spelling(key, entry, entry_keys)
    path = entry.get("path")
    if not isinstance(path, str) or not path.strip() or "\0" in path:
        raise ValueError(
            f"{key}.path: {quoted(path)} is not a path. Name a file, a directory or a dataset of "
            "the Hugging Face hub."
        )
    kind = entry.get("type")
    if isinstance(kind, Mapping):
        _check_spelling(f"{key}.type", kind, type_keys)
        for name, value in kind.items():
            if value is not None and not isinstance(value, str):
                raise ValueError(f"{key}.type.{name}: {quoted(value)} is not text. Quote it.")
    elif kind is not None and not (isinstance(kind, str) and kind.strip(". ")):
        raise ValueError(
            f"{key}.type: {quoted(kind)} is not a strategy. Use chat_template.default or another "
            "of axolotl.prompt_strategies.dpo, or a block of field names."
        )
    if isinstance(entry.get("name"), (list, tuple)) or entry.get("preprocess_shards"):
        which = "preprocess_shards" if entry.get("preprocess_shards") else "name"
        raise ValueError(
            f"{key}.{which}: {quoted(entry[which])} makes several datasets of one, which the host "
            "cannot do for preference pairs. Give each an entry of its own."
        )


def _check_spelling(key: str, block: Mapping[Any, Any], known: Collection[str]) -> None:
    """The host drops keys that it does not know without a word."""
    for name in block:
        if not isinstance(name, str):
            raise ValueError(f"{key}: {quoted(name)} is not a key. Keys are words, such as `path`.")
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
        if name not in known and close:
            raise ValueError(f"{key}.{name[:60]!a} is not a key. Did you mean `{close[0]}`?")


def name_types(cfg: Mapping[str, Any]) -> None:
    """Give datasets without a type the host's strategy for rows that need none."""
    for key in ("datasets", "test_datasets"):
        for entry in cfg.get(key) or ():
            if not entry.get("type"):
                entry["type"] = READY_MADE


def restore_entries(cfg: Mapping[str, Any], entries: Mapping[str, Any]) -> None:
    """Put back what the host's validation lost of the datasets' keys.

    axolotl 0.19 reads an entry as the first of five schemas that accepts it, and all accept
    anything. A `type:` block of two field names comes out empty, and the dataset is then read as
    if it had none; a `name:` beside a longer block is gone.

    Args:
        cfg: the validated configuration.
        entries: `datasets` and `test_datasets` as they were before.
    """
    for key, raw in entries.items():
        for entry, before in zip(cfg.get(key) or (), raw or (), strict=False):
            for name, value in before.items():
                if value is not None and (entry.get(name) is None or isinstance(value, Mapping)):
                    entry[name] = type(entry)(value) if isinstance(value, Mapping) else value
