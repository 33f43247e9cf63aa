"""A run's pairs as a preference dataset of texts that any trainer takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sera_plugin.rundir.checksums import write_file, write_text
from sera_plugin.tools.report.data import SIDES, Iteration, Run
from sera_plugin.tools.report.pairs import Pair, offline_pair, sampled_pair
from sera_plugin.tools.report.tokens import Texts

SUFFIXES = (".jsonl", ".parquet")


def export(run: Run, texts: Texts, path: Path, which: str, number: int | None) -> tuple[int, int]:
    """Write pairs with `prompt`, `chosen`, `rejected`, and `row` and `margin` for the curious.

    Of a run with `label_noise`, offline pairs have `swapped` too: their answers are as trained.
    Prompts are rendered by the run's own template and lack the token that the tokenizer adds by
    itself; completions lack their end token, which trainers add.

    Args:
        run, texts: the run, and a tokenizer.
        path: a `.jsonl` or `.parquet` file that does not exist yet.
        which: `kept`, `dropped` or `bootstrapped`.
        number: the iteration; the newest that has such pairs unless given.

    Returns:
        (pairs written, iteration).

    Raises:
        ValueError: if the path cannot be used, the iteration has no such pairs, or there is no
            tokenizer.
        OSError: if the file cannot be written, with what to do about it.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"--export: {path} must end in {' or '.join(SUFFIXES)}")
    if path.exists():
        raise ValueError(f"--export: {path} exists. Remove it, or name another file.")
    if texts.tokenizer is None:
        raise ValueError(f"--export: the texts cannot be written, because there is {texts.source}")
    if run.tokens is None:
        raise ValueError(f"--export: {run.root / 'dataset.parquet'} is missing or damaged")
    one = _newest(run, which) if number is None else run.iteration(number)
    swapped = None if which == "bootstrapped" else run.swapped
    rows = [
        {
            "prompt": texts.prompt(pair.ids["prompt"]),
            **{side: texts.completion(pair.ids[side]) for side in SIDES},
            "row": pair.row,
            "margin": pair.margins.get(one.number),
            **({} if swapped is None else {"swapped": bool(swapped[pair.row])}),
        }
        for pair in _pairs(run, one, which)
    ]
    _write(path, rows)
    return len(rows), one.number


def _has(one: Iteration, which: str) -> bool:
    if which == "bootstrapped":
        return one.bootstrapped is not None and one.candidates is not None
    return one.selected is not None


def _newest(run: Run, which: str) -> Iteration:
    for one in reversed(run.iterations):
        if _has(one, which):
            return one
    raise ValueError(f"--which: {run.root} has no {which} pairs yet")


def _pairs(run: Run, one: Iteration, which: str) -> list[Pair]:
    if which == "bootstrapped":
        if one.bootstrapped is None or one.candidates is None:
            raise ValueError(f"--iteration: {one.number} has no bootstrapped pairs")
        kept = np.flatnonzero(one.bootstrapped["selected"])
        return [sampled_pair(run, one, index) for index in kept.tolist()]
    if one.selected is None:
        raise ValueError(f"--iteration: {one.number} has no whole offline.parquet")
    rows = np.flatnonzero(one.selected == (which == "kept"))
    return [offline_pair(run, one, row) for row in rows.tolist()]


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    if path.suffix == ".jsonl":
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(path, "".join(lines))
        return
    kinds = dict.fromkeys(("prompt", *SIDES), pa.string())
    kinds |= {"row": pa.int64(), "margin": pa.float64()}
    if any("swapped" in row for row in rows):
        kinds["swapped"] = pa.bool_()
    table = pa.Table.from_pylist(rows, pa.schema(kinds))
    write_file(path, lambda partial: pq.write_table(table, partial))
