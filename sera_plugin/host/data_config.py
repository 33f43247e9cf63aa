"""What the `datasets:` and `test_datasets:` of a configuration may say."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from sera_plugin.config.quoting import quoted
from sera_plugin.config.spelling import closest

#: The host's strategy for rows that are prompt, chosen and rejected already. Without any type it
#: would not look at such rows at all before it measures their length.
READY_MADE = "passthrough.default"
_EXAMPLE = "`datasets: [{path: pairs.jsonl, type: chat_template.default}]`"


def check_datasets(cfg: Mapping[str, Any]) -> None:
    """Refuse datasets that the host would stumble over, or read otherwise than they were meant.

    Args:
        cfg: the raw configuration.

    Raises:
        ValueError: naming the key, the value, and what to do.
    """
    if cfg.get("datasets") is None:
        raise ValueError(f"datasets is not set. Name preference pairs, for example {_EXAMPLE}.")
    for key in ("datasets", "test_datasets"):
        entries = cfg.get(key)
        if entries is None:
            continue
        if not isinstance(entries, (list, tuple)) or not entries:
            raise _refused(key, entries, f"not a list of datasets. Write for example {_EXAMPLE}")
        for index, entry in enumerate(entries):
            _check_entry(f"{key}[{index}]", entry)


def _refused(key: str, value: Any, why: str) -> ValueError:
    return ValueError(f"{key}: {quoted(value)} is {why}.")


def _check_entry(key: str, entry: Any) -> None:
    from axolotl.utils.schemas import datasets as schemas

    if not isinstance(entry, Mapping):
        raise _refused(key, entry, "not a block of keys. Write `path:` and `type:` under it")
    kinds = (schemas.SFTDataset, schemas.DPODataset, schemas.KTODataset)
    _check_spelling(key, entry, [name for model in kinds for name in model.model_fields])
    path = entry.get("path")
    if not isinstance(path, str) or not path.strip() or "\0" in path:
        why = "not a path. Name a file, a directory or a dataset of the Hugging Face hub"
        raise _refused(f"{key}.path", path, why)
    kind = entry.get("type")
    if isinstance(kind, Mapping):
        _check_spelling(f"{key}.type", kind, list(schemas.UserDefinedDPOType.model_fields))
        for name, value in kind.items():
            if value is not None and not isinstance(value, str):
                raise _refused(f"{key}.type.{name}", value, "not text. Quote it")
    elif kind is not None and not (isinstance(kind, str) and kind.strip(". ")):
        raise _refused(
            f"{key}.type",
            kind,
            "not a strategy. Use chat_template.default or another one of "
            "axolotl.prompt_strategies.dpo, or a block of field names",
        )
    for name in ("preprocess_shards", "name"):
        value = entry.get(name)
        if isinstance(value, (list, tuple)) or (name == "preprocess_shards" and value):
            raise ValueError(
                f"{key}.{name}: {quoted(value)} makes several datasets of one, which the host "
                "cannot do for preference pairs. Give each an entry of its own."
            )


def _check_spelling(key: str, block: Mapping[Any, Any], known: Collection[str]) -> None:
    """The host drops keys that it does not know without a word."""
    for name in block:
        if not isinstance(name, str):
            raise _refused(key, name, "not a key. Keys are words, such as `path`")
        close = closest(name, known, 0.75)
        if name not in known and close:
            raise ValueError(f"{key}.{name[:60]!a} is not a key. Did you mean `{close}`?")


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
