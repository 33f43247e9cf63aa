"""docs/claims.md: what stands between its markers, made of the kept results alone."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from benchmarks.claims import tables
from benchmarks.claims.claims import CLAIMS, OURS
from benchmarks.claims.estimates import Record
from benchmarks.harness import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "claims" / "runs.jsonl"
REAL = RESULTS.with_name("real.jsonl")
PAGE = ROOT / "docs" / "claims.md"
PICTURES = ROOT / "docs" / "_static" / "claims"


def read(path: Path = RESULTS) -> list[Record]:
    """Every record; none without a file, and none of a line that a process died within."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with suppress(ValueError):
            records.append(json.loads(line))
    return records


def texts(records: Sequence[Record], real: Sequence[Record]) -> dict[str, str]:
    """What stands between each pair of markers."""
    results = tables.compared(records)
    return {
        "runs": tables.run_table(records),
        "criteria": tables.criteria_table(records),
        "base": tables.base_table([r for r in records if "system" in r]),
        "claims": tables.claim_table(CLAIMS, results),
        "core": tables.core_table(results),
        "iterations": tables.iteration_table(results),
        "rewards": tables.reward_table(results),
        "jaccard": tables.jaccard_table(results),
        "cost": tables.cost_table(results),
        "ours": tables.claim_table(OURS, results),
        "sweeps": tables.sweep_table(results),
        "real": tables.real_table(real),
    }


def render(page: str) -> str:
    """The page with its tables as the kept records have them.

    Raises:
        ValueError: if the markers of a table are not there once.
    """
    for name, text in texts(read(), read(REAL)).items():
        between = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        page, count = between.subn(lambda match, text=text: match[1] + text + "\n" + match[2], page)
        if count != 1:
            raise ValueError(f"{PAGE.name} has {count} places for {name}; it needs one")
    return page


def update_page() -> None:
    """Write the page's tables and pictures again."""
    from benchmarks.claims.charts import draw

    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    PICTURES.mkdir(parents=True, exist_ok=True)
    for name, svg in draw(tables.compared(read())).items():
        (PICTURES / f"{name}.svg").write_text(svg, encoding="utf-8")
