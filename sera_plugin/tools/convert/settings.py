"""The YAML being read, the YAML being written, and the rules by which one becomes the other.

docs/llama-factory.md is written from the rules. Names and defaults are those of LLaMA-Factory's
`hparams` and of transformers' training arguments, which it takes too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sera_plugin.config.quoting import quoted
from sera_plugin.tools.convert.names import DEFAULTS


@dataclass
class Settings:
    """A conversion under way.

    Attributes:
        given: the YAML being read.
        output: where the new one will go, None if nowhere.
        out: the YAML being written, in order.
        read: the keys that have become something.
        lost: keys that become nothing -> why.
        notes: what a reader should know, a sentence or two each.
        rows: files to be written beside the new YAML -> their rows.
    """

    given: Mapping[str, Any]
    output: Path | None = None
    out: dict[str, Any] = field(default_factory=dict)
    read: dict[str, None] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    rows: dict[Path, list[Any]] = field(default_factory=dict)

    def has(self, name: str) -> bool:
        """Whether the YAML sets a key to something else than null."""
        return self.given.get(name) is not None

    def value(self, name: str) -> Any:
        """What LLaMA-Factory would use: the YAML's value, else its default, else None.

        The methods below read it as a kind of value, and raise ValueError where it is another.
        """
        self.read[name] = None
        return self.given[name] if self.has(name) else DEFAULTS.get(name)

    def text(self, name: str) -> str | None:
        value = self.value(name)
        if isinstance(value, Mapping | list):
            raise ValueError(f"{name}: {quoted(value)} is not text")
        return None if value is None else str(value)

    def texts(self, name: str) -> list[str]:
        """Several things, separated by commas or as a list."""
        value = self.value(name)
        parts = value if isinstance(value, list) else str(value or "").split(",")
        return [str(part).strip() for part in parts if str(part).strip()]

    def number(self, name: str) -> float | None:
        """5e-6 is text to YAML 1.1, and a number here."""
        value = self.value(name)
        if value is None:
            return None
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"{name}: {quoted(value)} is not a number")
        return value if isinstance(value, int) else number

    def whole(self, name: str) -> int | None:
        number = self.number(name)
        if number is not None and not float(number).is_integer():
            raise ValueError(f"{name}: {quoted(self.given.get(name))} is not a whole number")
        return None if number is None else int(number)

    def switch(self, name: str) -> bool | None:
        value = self.value(name)
        if value is None or isinstance(value, bool):
            return value
        if str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
        raise ValueError(f"{name}: {quoted(value)} is neither true nor false")

    def put(self, to: str, value: Any) -> None:
        """Write a key of the new YAML, unless there is nothing to write: null or an empty list."""
        if value is not None and value != []:
            self.out[to] = value

    def lose(self, name: str, why: str) -> None:
        """A key that is there becomes nothing, and this is why."""
        if self.has(name):
            self.lost[name] = why


@dataclass(frozen=True)
class Rule:
    """Keys that are read together, and `to`, what they become, for a reader.

    `put` raises ValueError, naming key and value, for what has nothing like it here.
    """

    keys: list[str]
    to: str
    about: str
    put: Callable[[Settings], None]


#: In the order of the YAML to be written; None begins a paragraph.
RULES: list[Rule | None] = []


def rule(names: str, to: str, about: str = "") -> Callable[[Callable[[Settings], None]], None]:
    """A function that reads keys (separated by commas) and writes what they become is a rule."""
    return lambda put: RULES.append(Rule(names.split(", "), to, about, put))


def renamed(name: str, to: str, read: Callable[[Settings, str], object]) -> None:
    rule(name, f"`{to}`")(lambda settings: settings.put(to, read(settings, name)))


def same(read: Callable[[Settings, str], object], *names: str) -> None:
    for name in names:
        renamed(name, name, read)


def paragraph() -> None:
    RULES.append(None)
