"""A LLaMA-Factory DPO YAML as an Axolotl YAML for `rl: sera`, and what there is to say about it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from textwrap import wrap
from typing import Any

import yaml

from sera_plugin.config.block import closest
from sera_plugin.config.quoting import MASK, is_secret, plain
from sera_plugin.data.rows import encodable
from sera_plugin.rundir.checksums import write_text
from sera_plugin.tools.command import read_yaml
from sera_plugin.tools.convert import model, training  # noqa: F401  their rules, in this order
from sera_plugin.tools.convert.names import DEFAULTS, LEFT_OUT
from sera_plugin.tools.convert.settings import RULES as RULES
from sera_plugin.tools.convert.settings import Settings

RULE_KEYS = frozenset(name for rule in RULES if rule for name in rule.keys)
#: Every key that is known by its whole name.
KNOWN = RULE_KEYS | {one for names in LEFT_OUT for one in names.split() if "*" not in one}


@dataclass(frozen=True)
class Converted:
    """The new YAML, files to be written beside it -> their rows, and what to tell about it."""

    text: str
    rows: Mapping[Path, list[Any]]
    said: str

    def write(self, path: Path) -> None:
        """Write the YAML, and its rows beside it: all of the files, or none.

        Raises:
            FileExistsError: if any of the files is there.
            OSError: if one cannot be written, with what to do about it.
        """
        for each in (path, *self.rows):
            if each.exists():
                raise FileExistsError(f"{each} is there, and nothing is overwritten. Move it away.")
        texts = {each: "".join(map(_line, rows)) for each, rows in self.rows.items()}
        with ExitStack() as undo:
            for each, text in (texts | {path: self.text}).items():
                write_text(each, text)
                undo.callback(each.unlink)
            undo.pop_all()


def _line(row: Any) -> str:
    line = json.dumps(row, ensure_ascii=False)
    # Half of a surrogate pair cannot be written as itself; training names the row.
    return (line if encodable(line) else json.dumps(row)) + "\n"


def convert(path: Path, output: Path | None = None) -> Converted:
    """Read a LLaMA-Factory YAML and the datasets it names.

    Paths in the YAML are relative to the working directory, as LLaMA-Factory reads them. `output`
    is where the new one will go, for the paths in it.

    Raises:
        ValueError: if there is nothing like what it trains here, naming the key and its value.
        OSError: if something cannot be read.
    """
    settings = Settings(read_yaml(path), output)
    ends = [0]
    for rule in RULES:
        if rule is None:
            ends.append(len(settings.out))
        else:
            rule.put(settings)
    items = list(settings.out.items())
    text = f"# {path.name}, converted by `axolotl sera convert`.\n" + "\n".join(
        yaml.safe_dump(dict(items[first:last]), sort_keys=False, allow_unicode=True, width=100)
        for first, last in pairwise([*ends, len(items)])
        if last > first
    )
    return Converted(text, settings.rows, _say(path, settings))


def _say(path: Path, settings: Settings) -> str:
    unknown, lost = {}, dict(settings.lost)
    for name, value in settings.given.items():
        if value is None or name in settings.read or name in lost:
            continue
        whys = [why for names, why in LEFT_OUT.items() for one in names.split()
               if fnmatchcase(str(name), one)]  # fmt: skip
        if name in RULE_KEYS:
            lost[name] = "it has no effect beside the other keys."
        elif whys:
            lost[name] = whys[0]
        else:
            close = closest(str(name), KNOWN, cutoff=0.75)
            unknown[name] = f"Did you mean {close}?" if close else "Not a key that this knows."
    converted = sum(settings.has(name) and name not in lost for name in settings.read)
    lines = [f"{path}: {converted} of {len(settings.given)} keys converted."]
    for title, found in (("Left out:", lost), ("Unknown and left out:", unknown)):
        if found:
            lines += ["", title]
        for name, why in found.items():
            lines += [f"  {plain(str(name))}: {_shown(name, settings.given[name])}"]
            lines += wrap(why, 98, initial_indent=" " * 6, subsequent_indent=" " * 6)
    lines += ["", "To know:"]
    unset = [name for name in settings.read if name in DEFAULTS and not settings.has(name)]
    defaults = ", ".join(f"{name} {_shown(name, DEFAULTS[name])}" for name in unset)
    for note in [*settings.notes, f"What the YAML does not say is LLaMA-Factory's: {defaults}."]:
        lines += wrap(note, 98, initial_indent="  - ", subsequent_indent="    ")
    return "\n".join(lines)


def _shown(name: object, value: Any) -> str:
    """A value of the YAML as the YAML has it, escaped; never a secret."""
    if is_secret(str(name)):
        return MASK
    return str(value).lower() if isinstance(value, bool) else plain(str(value))
