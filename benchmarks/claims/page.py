"""docs/claims*.md: what stands between their markers, made of the kept results alone."""

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from benchmarks.claims import comparison, real_tables, tables
from benchmarks.claims.claims import CLAIMS, OURS
from benchmarks.claims.estimates import Record
from benchmarks.claims.systems import FRESH
from benchmarks.claims.world import WORLDS
from benchmarks.harness import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "claims" / "runs.jsonl"
REAL = RESULTS.with_name("real.jsonl")
COMPARISON = RESULTS.with_name("comparison.jsonl")
#: What was found; how it was measured, with every table; and how far the runs have moved.
PAGES = tuple(ROOT / "docs" / f"{name}.md" for name in ("claims", "claims-tables", "drift"))
PICTURES = ROOT / "docs" / "_static" / "claims"
#: The worlds in which every system is run.
TESTED = ("fixed", "small-steps", "smaller-steps")


def read(path: Path = RESULTS) -> list[Record]:
    """Every record; none without a file, and none of a line that a process died within."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with suppress(ValueError):
            records.append(json.loads(line))
    return records


def texts(
    records: Sequence[Record], real: Sequence[Record], held_out: Sequence[Record]
) -> dict[str, str]:
    """What stands between each pair of markers."""
    worlds = {
        tables.step_size(WORLDS[name]): tables.compared(records, WORLDS[name]) for name in TESTED
    }
    core = dict(list(worlds.items())[:2])
    return {
        "summary": tables.summary_table(worlds),
        "runs": tables.run_table(records),
        "again": tables.again_table(records),
        "fresh": tables.fresh_table(records),
        "criteria": tables.criteria_table(records),
        "base": tables.base_table(records),
        "verdicts": tables.verdict_table(CLAIMS, worlds),
        "claims": tables.claim_table(CLAIMS, worlds),
        "core": tables.core_table(core),
        "worlds": tables.world_table(records),
        "grid": tables.grid_table(records),
        "iterations": tables.iteration_table(worlds),
        "rewards": tables.reward_table(worlds),
        "jaccard": tables.jaccard_table(worlds),
        "cost": tables.cost_table(tables.compared(records, seeds=FRESH)),
        "ours": tables.claim_table(OURS, worlds),
        "sweeps": tables.sweep_table(worlds),
        "real": real_tables.real_table(real),
        "comparison": comparison.reward_table(held_out),
        "gains": comparison.gain_table(held_out),
        "decision": comparison.decision(held_out),
        "drifts": comparison.drift_table(held_out),
    }


def render() -> dict[Path, str]:
    """The pages with their tables as the kept records have them.

    Raises:
        ValueError: if the markers of a table are not there once.
    """
    pages = {path: path.read_text(encoding="utf-8") for path in PAGES}
    for name, text in texts(read(), read(REAL), read(COMPARISON)).items():
        between = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        places = 0
        for path, page in pages.items():
            pages[path], count = between.subn(
                lambda match, text=text: match[1] + text + "\n" + match[2], page
            )
            places += count
        if places != 1:
            raise ValueError(f"there are {places} places for the table {name}; it needs one")
    return pages


def update_pages() -> None:
    """Write the pages' tables and pictures again."""
    from benchmarks.claims.charts import draw

    for path, text in render().items():
        path.write_text(text, encoding="utf-8")
    PICTURES.mkdir(parents=True, exist_ok=True)
    records = read()
    for world in TESTED:
        for name, svg in draw(tables.compared(records, WORLDS[world])).items():
            (PICTURES / f"{name}-{world}.svg").write_text(svg, encoding="utf-8")
