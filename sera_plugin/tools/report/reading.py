"""Reading a run directory: whatever is whole, and a note for everything that is not."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sera_plugin.algorithm.protocols import DATASET
from sera_plugin.config.kinds import LABELERS
from sera_plugin.rundir import checkpoints
from sera_plugin.rundir.checksums import is_whole
from sera_plugin.rundir.store import FORMAT_VERSION, RunStore, read_json
from sera_plugin.rundir.tokens import TokenColumn
from sera_plugin.tools.report.data import Candidates, Columns, Iteration, Run

_TOKENS = ("prompt_ids", "chosen_ids", "rejected_ids")
_CANDIDATES = ("row", "candidate", "token_ids", "finish_reason", "logps", "reward")
_BOOTSTRAPPED = ("row", "chosen_candidate", "rejected_candidate", "margin", "selected")
_SCORED = ("row", "chosen_length", "rejected_length", "chosen_logp", "rejected_logp")


def find_run(path: Path) -> RunStore:
    """The run in `output_dir`, or in the run directory itself.

    Raises:
        ValueError: if there is none, naming what is missing.
    """
    output_dir = path.parent if path.name == "sera" and (path / "run.json").exists() else path
    store = RunStore(output_dir)
    if store.run_file.exists():
        return store
    what = "no such directory" if not path.is_dir() else f"{store.run_file} does not exist"
    raise ValueError(
        f"{path}: no SeRA run there, {what}. Give the output_dir of a run with `rl: sera`; a run "
        "has begun once its run.json is written."
    )


@dataclass
class _Reader:
    """Reads whole files; keeps a note for every other."""

    store: RunStore
    notes: list[str] = field(default_factory=list)

    def note(self, path: Path, what: str) -> None:
        self.notes.append(f"{path.relative_to(self.store.root.parent)} {what}")

    def _whole(self, path: Path) -> bool:
        if is_whole(path):
            return True
        if path.exists():
            self.note(path, "is damaged (its checksum differs) and left out")
        return False

    def json(self, path: Path) -> dict[str, Any]:
        return read_json(path) if self._whole(path) else {}

    def table(self, path: Path, needed: tuple[str, ...]) -> pa.Table | None:
        if not self._whole(path):
            return None
        table = pq.read_table(path)
        missing = [name for name in needed if name not in table.column_names]
        if missing:
            self.note(path, f"has no column {', '.join(missing)} and is left out")
            return None
        return table

    def columns(self, path: Path, needed: tuple[str, ...]) -> Columns | None:
        table = self.table(path, needed)
        if table is None:
            return None
        return {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}


def read_run(store: RunStore) -> Run:
    """Read all of a run that is whole.

    Raises:
        ValueError: if it has a format that this version does not read.
    """
    reader = _Reader(store)
    description = reader.json(store.run_file)
    version = description.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{store.run_file} has format version {version!a}; this sera_plugin reads "
            f"{FORMAT_VERSION}. Use the version that made the run."
        )
    dataset = reader.table(store.dataset_file, _TOKENS)
    if dataset is None and not store.dataset_file.exists():
        reader.note(store.dataset_file, "is missing: there are no texts to show")
    columns = (
        {} if dataset is None else dict(zip(dataset.column_names, dataset.columns, strict=True))
    )
    numbers = sorted(
        int(path.name.removeprefix("iteration-"))
        for path in store.root.glob("iteration-*")
        if re.fullmatch(r"iteration-[0-9]{2,6}", path.name) and path.is_dir()
    )
    iterations = tuple(_read_iteration(reader, number) for number in numbers)
    _name_what_is_missing(reader, description, iterations)
    return Run(
        root=store.root,
        description=description,
        tokens={name: TokenColumn(columns[name]) for name in _TOKENS} if columns else None,
        scores={
            name: values.to_pylist()
            for name, values in columns.items()
            if name not in ("row", *_TOKENS)
        },
        iterations=iterations,
        history=_history(reader),
        state=_state(store, description, iterations),
        notes=tuple(reader.notes),
    )


def _read_iteration(reader: _Reader, number: int) -> Iteration:
    files = partial(reader.store.table_file, number)
    choice = ("margin", "selected") if number > 1 else ()
    candidates = reader.table(files("candidates"), _CANDIDATES)
    return Iteration(
        number=number,
        offline=reader.columns(files("offline"), (*_SCORED, *choice)),
        evaluation=reader.columns(files("evaluation"), _SCORED),
        candidates=None if candidates is None else _candidates(files("candidates"), candidates),
        bootstrapped=reader.columns(files("bootstrapped"), _BOOTSTRAPPED),
        summary=reader.json(reader.store.iteration(number) / "summary.json"),
    )


def _candidates(path: Path, table: pa.Table) -> Candidates:
    tokens = TokenColumn(table["token_ids"])
    logps = table["logps"].combine_chunks()
    policies = len(logps[0]) if len(logps) else 0
    return Candidates(
        path=path,
        row=table["row"].to_numpy(),
        candidate=table["candidate"].to_numpy(),
        lengths=tokens.lengths,
        # 64 bits: that two of a prompt's answers share one by chance will not happen.
        identity=np.fromiter((hash(one.tobytes()) for one in tokens), np.int64, len(tokens)),
        unfinished=np.asarray(pc.equal(table["finish_reason"], "length")),
        from_dataset=np.asarray(pc.equal(table["finish_reason"], DATASET)),
        logps=logps.flatten().to_numpy().reshape(-1, policies),
        reward=table["reward"].to_numpy(),
    )


def _name_what_is_missing(
    reader: _Reader, description: Mapping[str, Any], iterations: tuple[Iteration, ...]
) -> None:
    """A file that later ones were made from must have been there; one at the end is not due yet."""
    block = (description.get("config") or {}).get("sera") or {}
    sampling = block.get("bootstrap_ratio", 0) > 0
    labeler = LABELERS[block.get("labeler", "implicit")]
    first = labeler.first_iteration(block.get("selection_ratio", 1))
    for one in iterations:
        past = bool(one.summary) or one.number < iterations[-1].number
        sampled = sampling and one.number >= first
        due = {
            "offline.parquet": past or one.bootstrapped is not None or one.candidates is not None,
            "candidates.parquet": sampled and (past or one.bootstrapped is not None),
            "bootstrapped.parquet": sampled and past,
            "evaluation.parquet": bool(description.get("evaluation_pairs")) and past,
            "summary.json": one.number < iterations[-1].number,
        }
        for name, expected in due.items():
            path = reader.store.iteration(one.number) / name
            if expected and not path.exists():
                reader.note(path, "is missing")
    present = [one.number for one in iterations]
    for number in sorted(set(range(1, max(present, default=0))) - set(present)):
        reader.note(reader.store.iteration(number), "is missing")


def _history(reader: _Reader) -> list[dict[str, Any]]:
    """The host's log in the newest checkpoint that has a whole one."""
    output_dir = reader.store.root.parent
    for step in sorted(checkpoints.steps(output_dir), reverse=True):
        path = checkpoints.checkpoint(output_dir, step) / "trainer_state.json"
        if is_whole(path):
            history: list[dict[str, Any]] = read_json(path)["log_history"]
            return history
        reader.note(path, "is not whole: the training curves are of an older checkpoint, if any")
    return []


def _state(
    store: RunStore, description: Mapping[str, Any], iterations: tuple[Iteration, ...]
) -> str:
    planned = (description.get("config") or {}).get("num_epochs")
    if planned and len(iterations) >= int(planned) and iterations[-1].trained:
        return "finished"
    return "going on" if _is_locked(store.root / "lock") else "stopped"


def _is_locked(path: Path) -> bool:
    """Whether a run holds the directory; asked with a shared lock, which is let go at once."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(handle)
    return False
