"""What a line of a table of keys asks of a configuration (host/keys.py, host/refused.py)."""

import contextlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sera_plugin.config.kinds import LOSSES
from sera_plugin.config.quoting import as_written
from sera_plugin.config.sera import SeraConfig


def number(value: Any) -> float | None:
    """A finite number out of a YAML value (0.1 or "0.1"); None where there is none."""
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            if math.isfinite(found := float(value)):
                return found
    return None


def deepspeed_config(value: Any) -> Mapping[str, Any] | None:
    """DeepSpeed's configuration, which a YAML has as a block or a file; None for neither."""
    if isinstance(value, Mapping):
        return value
    with contextlib.suppress(OSError, TypeError, ValueError, RecursionError):
        found = json.loads(Path(value).read_text(encoding="utf-8"))
        return found if isinstance(found, Mapping) else None
    return None


class Given:
    """A configuration, or a block of it at `where`, as the conditions of the tables ask it."""

    def __init__(self, cfg: Mapping[str, Any], sera: SeraConfig, where: str = "") -> None:
        self.cfg, self.sera, self.where = cfg, sera, where
        self.sharded = cfg.get("fsdp_config") is not None or bool(cfg.get("fsdp"))
        #: None where the loss is the host's, in place of `sera.loss`.
        self.loss = LOSSES[sera.loss] if cfg.get("dpo_loss_type") is None else None
        self.smooths = self.loss.label_smoothing if self.loss else None
        self.smoothing = number(cfg.get("dpo_label_smoothing")) or 0.0
        self.says_keep = "keep" in sera.model_fields_set

    def zero(self, key: str) -> Any:
        """The value of `block.key` in DeepSpeed's configuration, None where it has none."""
        found: Any = deepspeed_config(self.get("deepspeed"))
        for part in key.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        return found

    def get(self, key: str) -> Any:
        """The value of a key; `block.key` is one inside a block, where that is one."""
        if key == "fsdp_version":  # read as the host does, in three places
            inside = self.get("fsdp_config.fsdp_version") or self.get("fsdp_config.version")
            return self.cfg.get("fsdp_version") or inside
        block, _, inner = key.partition(".")
        if block == "sera":
            return getattr(self.sera, inner)
        value = self.cfg.get(block)
        return value.get(inner) if inner and isinstance(value, Mapping) else value


@dataclass(frozen=True)
class Refusal:
    """A line of a table, about one or more keys, separated by commas."""

    keys: str
    #: Why, and what to do instead. `{key}` is the key, `{loss}` and `{keep}` are `sera`'s.
    remedy: str
    #: Of the value and all that is given. Unless set: whatever is not off, or one of `values`.
    when: Callable[[Any, Given], object] | None = None
    #: Which ones are refused if not all, as a YAML has them; for a reader alone beside `when`.
    values: str = ""

    def check(self, given: Given, problem: str = "") -> None:
        """Raises ValueError if one of the keys has a value that is refused."""
        for key in self.keys.split(", "):
            value = given.get(key)
            if self.when is not None:
                refused = self.when(value, given)
            else:
                refused = as_written(value) in self.values.split(", ") if self.values else value
            if refused:
                remedy = self.remedy.format(key=key, loss=given.sera.loss, keep=given.sera.keep)
                raise ValueError(f"{given.where}{key}: {as_written(value)} {problem}{remedy}.")
