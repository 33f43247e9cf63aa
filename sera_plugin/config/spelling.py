"""Keys that are not known, and blocks that cannot be read, in one sentence each."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from pydantic import ValidationError

from sera_plugin.config.judge import JudgeConfig
from sera_plugin.config.quoting import as_written, quoted
from sera_plugin.config.sera import SeraConfig

SERA_KEYS = tuple(SeraConfig.model_fields)


def closest(name: str, known: Collection[str], cutoff: float = 0.5) -> str | None:
    """The known key that a name resembles most, if any does."""
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=cutoff)), None)


def not_a_key(where: str, name: object, known: Collection[str]) -> str:
    """What to say of a key that is unknown.

    Args:
        where: the block that it stands in, with a dot, such as `sera.`.
        name: the key.
        known: the keys of that block.
    """
    key = as_written(name)
    close = closest(key, known)
    hint = f"Did you mean `{close}`?" if close else _known(known)
    return f"{where}{key} is not a key. {hint}"


def require_block(key: str, block: Any) -> None:
    """Raises ValueError unless a value is a block of keys."""
    if not isinstance(block, Mapping):
        raise ValueError(
            f"{key}: {quoted(block)} is not a block of keys. Write `{key}:` and indent its keys."
        )


def parse_sera(block: Any) -> SeraConfig:
    """The `sera:` block; None is an empty one.

    Raises:
        ValueError: with a sentence for each key that is wrong.
    """
    block = {} if block is None else block
    require_block("sera", block)
    try:
        return SeraConfig.model_validate(dict(block))
    except ValidationError as error:
        sentences = "; ".join(map(_sentence, error.errors()))
        # Which keys are known is said at the last unknown one alone.
        before, found, after = sentences.rpartition(f" {_known(SERA_KEYS)}")
        raise ValueError(before.replace(found, "") + found + after) from None
    except (OverflowError, RecursionError) as error:
        raise ValueError(
            f"sera: {quoted(block)} has a value that cannot be read: {error}"
        ) from None


def _known(keys: Collection[str]) -> str:
    return f"Known keys: {', '.join(keys)}."


def _sentence(error: Any) -> str:
    """The key, the value, what is allowed."""
    *blocks, name = map(as_written, error["loc"] or ("",))
    where = ".".join(["sera", *blocks, ""])
    if error["type"] == "extra_forbidden":
        return not_a_key(where, name, tuple(JudgeConfig.model_fields) if blocks else SERA_KEYS)
    if error["type"] == "value_error":
        message = error["msg"].removeprefix("Value error, ")
        return f"{where}{name}: {message}" if name else f"{where}{message}"
    return f"{where}{name}: {quoted(error['input'])} is not allowed: {error['msg']}"
