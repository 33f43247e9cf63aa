"""Blocks of a YAML: read once into a frozen type, and what is wrong with one in a sentence each."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from sera_plugin.config.quoting import as_written, is_secret, quoted


def closest(name: str, known: Collection[str], cutoff: float = 0.5) -> str | None:
    """The known key that a name resembles most, if any does."""
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=cutoff)), None)


def not_a_key(where: str, name: object, known: Collection[str]) -> str:
    """What to say of an unknown key; `where` comes before it: its block and a dot (`sera.`)."""
    key = as_written(name)
    close = closest(key, known)
    hint = f"Did you mean `{close}`?" if close else f"Known keys: {', '.join(known)}."
    return f"{where}{key} is not a key. {hint}"


def require_block(key: str, block: Any) -> None:
    """Raises ValueError unless a value is a block of keys."""
    if not isinstance(block, Mapping):
        raise ValueError(
            f"{key}: {quoted(block)} is not a block of keys. Write `{key}:` and indent its keys."
        )


def _on_one_line(schema: dict[str, Any]) -> None:
    for key in schema["properties"].values():
        key["description"] = " ".join(key["description"].split())


class Block(BaseModel):
    """A block of a YAML: unknown keys are errors, and the docstring of a key is its description."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,
        json_schema_extra=_on_one_line,
    )

    @classmethod
    def parse(cls, block: Any, where: str) -> Self:
        """The block as a YAML has it; `where` comes before the keys that are named (`sera.`).

        Raises:
            ValueError: with a sentence for each key that is wrong. With `hide_input_in_errors` no
                value is repeated: any of them could be a secret.
        """
        try:
            return cls.model_validate(dict(block))
        except ValidationError as error:
            shown = not cls.model_config.get("hide_input_in_errors")
            errors = error.errors(include_input=shown, include_url=False)
            said = "; ".join(cls._sentence(one, where) for one in errors)
        except (OverflowError, RecursionError) as error:
            said = (
                f"{where.rstrip('.: ')}: {quoted(block)} has a value that cannot be read: {error}"
            )
        # Which keys are known is said at the last unknown one alone.
        before, known, after = said.rpartition(f" Known keys: {', '.join(cls.model_fields)}.")
        raise ValueError(before.replace(known, "") + known + after)

    @classmethod
    def _sentence(cls, error: Mapping[str, Any], where: str) -> str:
        """The key, the value, what is allowed."""
        key = ".".join(map(as_written, error["loc"]))
        if error["type"] == "extra_forbidden":
            if is_secret(key):
                return (
                    f"{where}{key}: no key belongs in a file. Export it in an environment variable "
                    "and give that variable's name as api_key_env"
                )
            return not_a_key(where, key, cls.model_fields)
        if error["type"] == "missing":
            return f"{where}{key} is missing"
        place = f"{where}{key}: " if key else where
        if error["type"] == "value_error":
            return place + error["msg"].removeprefix("Value error, ")
        value = f"{quoted(error['input'])} is not allowed: " if "input" in error else ""
        return f"{place}{value}{error['msg']}"
