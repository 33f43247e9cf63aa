"""Shares in tables, and what is said about an evaluation in a line or in a warning."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from sera_plugin.tools.report.output import NOTHING, Table, number, shown_name

#: What concerns at most this share of the answers is said in a line, not in a warning.
_FEW = 0.05


def told(remarks: Iterable[tuple[float, str]]) -> tuple[list[str], list[str]]:
    """Sentences about a share of the answers: those that warn, and those that are only said."""
    found: tuple[list[str], list[str]] = ([], [])
    for part, text in remarks:
        if part > 0:
            found[part <= _FEW].append(text)
    return found


def percent(share: float | None) -> str:
    """A share as tables have it."""
    return number(share, ".1%")


def within(share: Mapping[str, Any]) -> str:
    """The interval of a `Share`."""
    return f"{percent(share['low'])} to {percent(share['high'])}" if share["number"] else NOTHING


def best_of(rates: Sequence[float]) -> int | None:
    """Where the highest rate is, if there are several to choose from and one is alone."""
    known = [rate for rate in rates if not np.isnan(rate)]
    if len(known) < 2 or known.count(max(known)) > 1:
        return None
    return list(rates).index(max(known))


def check_tables(spec: str, checked: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """The share of each model's answers that passes, and by category where there are several."""
    name = shown_name(spec)
    rows = [[model, percent(one["rate"]), within(one), number(one["number"], ",")]
            for model, one in checked.items()]  # fmt: skip
    best = best_of([one["rate"] for one in checked.values()])
    head, note = ["model", "passes", "95% interval", "answers"], "The share of answers that pass."
    found = [Table(f"Check {name}", head, rows, note, best=best)]
    categories = {model: one["categories"] for model, one in checked.items()}
    if len(next(iter(categories.values()))) > 1:
        note = "The share that passes, with its 95% interval."
        title = f"Check {name} by category"
        found.append(shares_table(title, ("category", "prompts"), categories, note))
    return found


def shares_table(
    title: str,
    head: Sequence[str],
    shares: Mapping[str, Mapping[str, Mapping[str, Any]]],
    note: str,
) -> Table:
    """`Share`s of each column by name: a line per name, shaded; `head` is of names and numbers."""
    rows: list[list[str]] = []
    shades: list[list[float | None]] = []
    for name, first in next(iter(shares.values())).items():
        each = [of_name[name] for of_name in shares.values()]
        cells = [f"{percent(one['rate'])} ({within(one)})" if one["number"] else NOTHING
                 for one in each]  # fmt: skip
        total = first["number"] + first["missing"]
        rows.append([shown_name(name) or "(none)", number(total, ","), *cells])
        shades.append([None, None, *(one["rate"] if one["number"] else None for one in each)])
    return Table(title, [*head, *shares], rows, note, shades)
