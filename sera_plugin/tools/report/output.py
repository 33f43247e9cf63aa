"""Texts, figures and tables for a page, a terminal and machines.

Texts of models and datasets are made printable here, and escaped by the template engine. If both
failed, a page's own policy still lets no other script run and no address be asked: the only script
allowed is ours, by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

from sera_plugin import __version__
from sera_plugin.config.quoting import printable

NOTHING = "-"


def number(value: float | None, form: str = ".3g") -> str:
    """A figure as people read it."""
    return NOTHING if value is None or not isfinite(value) else format(value, form)


def shown_text(text: object, limit: int) -> str:
    """At most `limit` characters; every one that hides or reorders others is escaped."""
    text = str(text)
    lines = text[:limit].split("\n")
    cut = f"\n[... {len(text) - limit:,} more characters]" if len(text) > limit else ""
    return "\n".join(map(printable, lines)) + cut


def shown_name(name: object, limit: int = 60) -> str:
    """A column's name or a value on one line, its end cut."""
    name = str(name)
    return printable(name[:limit]) + ("..." if len(name) > limit else "")


class Table(NamedTuple):
    """Cells as text; `shades` are 0 to 1 per cell, for a matrix; `best` is a row to mark."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    shades: Sequence[Sequence[float | None]] | None = None
    best: int | None = None

    @classmethod
    def square(
        cls, title: str, names: Sequence[str], matrix: Sequence[Sequence[float | None]], note: str
    ) -> Table:
        """Values from 0 to 1 of each with each, shaded."""
        lines = list(zip(names, matrix, strict=True))
        rows = [[name, *(number(value, ".2f") for value in values)] for name, values in lines]
        return cls(title, ["", *names], rows, note, [[None, *values] for values in matrix])

    def text(self) -> str:
        """The table for a terminal."""
        return "\n".join([self.title, plain_table(self.head, self.rows), self.note]).rstrip()


def plain_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in text: the first column left, the others right aligned."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = []
    for first, *others in (head, *rows):
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def json_text(value: Any) -> str:
    """JSON in ASCII; what is not finite is null, and a date or the like its text."""
    plain = json.loads(json.dumps(value, default=str), parse_constant=lambda _: None)
    return json.dumps(plain, indent=2)


def fill(template: str, **content: Any) -> str:
    """A template, filled; in HTML all but `Markup` is escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=jinja2.select_autoescape(disabled_extensions=("txt",), default=True),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {one.__name__: one for one in (number, shown_name, shown_text)}
    script = environment.get_template("page.js").render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    filled = environment.get_template(template)
    return filled.render(script_hash=digest, version=__version__, made=made, **content)
