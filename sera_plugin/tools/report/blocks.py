"""What a page is made of: charts, tables and sections, with text in every cell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from markupsafe import Markup

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
