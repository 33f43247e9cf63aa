"""What a page is made of: charts, tables and sections, with text in every cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from markupsafe import Markup

from sera_plugin.tools.report.terminal import plain_table

NOTHING = "-"


@dataclass(frozen=True)
class Chart:
    """A picture, its title, and a sentence on how it is made."""

    title: str
    svg: Markup
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Cells as text; `shades` are 0 to 1 per cell, for a matrix."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    shades: Sequence[Sequence[float | None]] | None = None

    @classmethod
    def of(cls, title: str, rows: Sequence[Mapping[str, str]], note: str = "") -> Table:
        """From rows that each name their cells, the columns of the first one."""
        head = list(rows[0]) if rows else []
        return cls(title, head, [[row[name] for name in head] for row in rows], note)

    @classmethod
    def square(
        cls, title: str, names: Sequence[str], matrix: Sequence[Sequence[float | None]], note: str
    ) -> Table:
        """Values from 0 to 1 of each with each, shaded."""
        rows = [
            [name, *(number(value, ".2f") for value in values)]
            for name, values in zip(names, matrix, strict=True)
        ]
        return cls(title, ["", *names], rows, note, [[None, *values] for values in matrix])

    def text(self) -> str:
        """The table for a terminal."""
        return "\n".join([self.title, plain_table(self.head, self.rows), self.note]).rstrip()


@dataclass(frozen=True)
class Section:
    """A part of the page; one without charts and tables is not shown."""

    name: str
    title: str
    lead: str
    charts: list[Chart] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


def number(value: float | None, form: str = ".3g") -> str:
    """A figure as the page shows it."""
    return NOTHING if value is None or not np.isfinite(value) else format(value, form)


def value_at(figures: Any, *keys: str) -> Any:
    """A value inside nested figures, or None where a level of them is missing."""
    for key in keys:
        figures = (figures or {}).get(key)
    return figures
