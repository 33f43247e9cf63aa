"""The run directory: `{output_dir}/sera/`, a public format (docs/run-directory.md).

A phase is complete when its file is there and whole; one that is damaged is never read. Parquet and
JSON only.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from itertools import count
from pathlib import Path
from time import monotonic, sleep
from typing import Any
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq

from sera_plugin.config.quoting import plain
from sera_plugin.rundir.checksums import add_file, is_named_right, is_whole, replace_file
from sera_plugin.rundir.format import Ending, Invalid, Keys, RunFile, Summary, read_json
from sera_plugin.rundir.ranks import Ranks
from sera_plugin.rundir.tables import TYPES, Expected, read_columns, read_table
from sera_plugin.rundir.tokens import TOKENS, TokenColumn
from sera_plugin.rundir.writing import (
    explained,
    look,
    make_directory,
    open_own,
    remove,
    tidy,
)

LOG = logging.getLogger("axolotl.sera")
#: Rows that are encoded at a time; some 10 MiB of token ids.
_GROUP = 2**15


def make_table(columns: Mapping[str, Any]) -> pa.Table:
    """A table with the run directory's column types (unknown columns keep their own)."""
    found = dict(columns)
    for name, values in columns.items():
        if isinstance(values, TokenColumn):
            found[name] = values.to_arrow()
        elif not isinstance(values, pa.Array | pa.ChunkedArray):
            found[name] = pa.array(values, TYPES.get(name))
    return pa.table(found)


def layout(schema: pa.Schema) -> dict[str, Any]:
    """How `pyarrow.parquet.write_table` lays out a table: few rows at a time in memory.

    Of token ids the high bytes are much alike, so they are compressed byte by byte; a dictionary of
    them, or their differences, takes longer and more room.
    """
    tokens = [f"{field.name}.list.element" for field in schema if field.type == TOKENS]
    return {
        "compression": "zstd",
        "row_group_size": _GROUP,
        "column_encoding": dict.fromkeys(tokens, "BYTE_STREAM_SPLIT"),
        "use_dictionary": [field.name for field in schema if pa.types.is_string(field.type)],
    }


def write_table(path: Path, table: pa.Table) -> None:
    """Write a parquet file in one piece."""
    replace_file(path, lambda partial: pq.write_table(table, partial, **layout(table.schema)))
    # Arrow keeps what encoding took, and the next table would come on top.
    pa.default_memory_pool().release_unused()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file in one piece, keys sorted."""
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    replace_file(path, lambda partial: partial.write_text(text + "\n", encoding="utf-8"))


#: Lock files that this process holds, until it ends, and their handles.
_LOCKS: dict[Path, int] = {}
#: A killed run's helpers, such as data loading workers, end some seconds after it.
_HELPERS_END_WITHIN = 10.0


def _on_main(method: Callable[..., None]) -> Callable[..., None]:
    """All ranks call it, and rank 0 does it."""

    @wraps(method)
    def call(self: RunStore, *args: Any) -> None:
        self.ranks.on_main(lambda: method(self, *args))

    return call


class RunStore:
    """One run's directory below `output_dir`, on a file system that all ranks share.

    Only chunks of samples are each rank's own; all else that writes is called by all ranks.
    """

    def __init__(self, output_dir: str | Path, ranks: Ranks | None = None) -> None:
        self.root = Path(output_dir) / "sera"
        #: What the run is (`description` reads it), and what it trains on, as token ids.
        self.run_file, self.dataset_file = self.root / "run.json", self.root / "dataset.parquet"
        self.prompts_file = self.root / "prompts.parquet"
        #: theta_T's own, where it is not in `output_dir`: what an iteration T + 1 would begin with.
        self.last = self.root / "last"
        self.end: int | None = None  # T + 1, while training knows it
        self.ranks = ranks or Ranks()
        self._reported: set[Path] = set()
        self._expected: Expected | None = None  # of tables, once run.json is known
        #: Chunks of samples by iteration: counting files again for each would take N^2 steps.
        self._chunks: dict[int, Iterator[int]] = {}

    def lock(self) -> None:
        """Keep other runs out of this directory until this process ends; ValueError if one has it.

        The lock is the operating system's: a file that a killed run has left holds nobody up.
        """
        path = self.root.absolute() / "lock"
        if not self.ranks.main or path in _LOCKS:
            return
        make_directory(self.root)
        with explained(self.root):
            handle = open_own(path, os.O_RDWR | os.O_CREAT)
            try:
                self._acquire(handle)
            except BaseException:
                os.close(handle)
                raise
            # Not before: whoever waits for the lock reads there whose it is.
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        _LOCKS[path] = handle
        for directory in (self.root.parent, self.root, *self.root.glob("iteration-*"), self.last):
            tidy(directory)

    def _acquire(self, handle: int) -> None:
        ends = monotonic() + _HELPERS_END_WITHIN
        while True:
            try:
                return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if monotonic() > ends:
                    owner = os.pread(handle, 200, 0).decode("utf-8", "replace").strip()
                    raise ValueError(
                        f"output_dir: {self.root.parent} is in use by another run ({owner!a}). "
                        "Wait for it, end it, or set another output_dir."
                    ) from None
                sleep(0.5)
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
                    raise
                return LOG.warning(
                    "SeRA: this file system has no locks; start no second run in output_dir"
                )

    @_on_main
    def begin(
        self,
        description: Mapping[str, Any],
        dataset: pa.Table,
        prompts: pa.Table | None = None,
    ) -> None:
        """Write what the run is and what it trains on; a run has begun once run.json is there.

        run.json gets a `run_id`, drawn here. Of a run that has begun, dataset.parquet is made again
        if it is missing or damaged, and so is prompts.parquet, whose rows go on from the pairs'.
        """
        begun = self.run_file.exists()
        tables = {self.dataset_file: dataset}
        if prompts is not None:
            tables[self.prompts_file] = prompts
        for path, table in tables.items():
            if not (begun and self._whole(path)):
                write_table(path, table)
        if not begun:
            write_json(self.run_file, {"run_id": uuid4().hex, **description})

    def description(self) -> dict[str, Any] | None:
        """run.json, or None where no run has begun. A ValueError if it is damaged."""
        if not look(self.run_file):
            return None
        if not is_whole(self.run_file):
            raise ValueError(
                f"{self.run_file} is damaged: its checksum differs from the one in SHA256SUMS. "
                "It is unknown what this run was, so it is not continued. Restore the file from "
                "a copy, or start fresh: set another output_dir."
            )
        try:
            return read_json(self.run_file, RunFile)
        except Invalid as error:
            raise ValueError(
                f"{self.run_file} is not what this sera_plugin reads: {error}. Continue the run "
                "with the version that began it, or set another output_dir."
            ) from None

    def iteration(self, iteration: int) -> Path:
        """The directory of iteration t (1-based); of T + 1, where none comes, it is `last`."""
        return self.last if iteration == self.end else self.root / f"iteration-{iteration:02d}"

    def end_before(self, iteration: int) -> None:
        """Training ends before iteration t, which has not trained: what it has becomes `last`."""
        begun, self.end = self.iteration(iteration), iteration
        self.ranks.on_main(lambda: begun.rename(self.last))

    def ending(self) -> dict[str, Any]:
        """last/summary.json, empty before the end of training and where no policy was chosen."""
        return self._json(self.last / "summary.json", Ending)

    def policies(self) -> list[Path]:
        """Where theta_0, theta_1, ..., theta_T of a finished run are.

        That is `output_dir` for the one that was kept, and `last/policy` for theta_T if it was not.
        """
        ending = self.ending()
        planned = int((self.description() or {})["config"]["num_epochs"])
        last = ending.get("policies", planned)
        found = [*(self.policy(policy + 1) for policy in range(last)), self.last / "policy"]
        found[ending.get("kept", last)] = self.root.parent
        return found

    @_on_main
    def discard_after(self, iteration: int) -> None:
        """Remove later iterations and `last`: they began from a policy that is trained anew."""
        for path in (*self.root.glob("iteration-*"), self.last):
            # Only what is named as ours; of a link the link, never what it leads to.
            match = re.fullmatch(r"iteration-([0-9]{2,})", path.name)
            ours = path == self.last or (match and int(match[1]) > iteration)
            if ours and (path.is_symlink() or path.is_dir()):
                remove(path)

    def policy(self, iteration: int) -> Path:
        """Where theta_{t-1}, the policy iteration t starts from, is kept."""
        return self.iteration(iteration) / "policy"

    def table_file(self, iteration: int, name: str) -> Path:
        """`offline`, `candidates`, `bootstrapped` or `evaluation` of iteration t."""
        return self.iteration(iteration) / f"{name}.parquet"

    def _whole(self, path: Path, check: Callable[[Path], bool] = is_whole) -> bool:
        """Whether a finished file is there; one that is damaged is said once, and not there."""
        if not look(path):
            return False
        whole = check(path)
        if not whole:
            self._report(path, "is damaged (its checksum differs) and is not used")
        return whole

    def _report(self, path: Path, problem: str) -> None:
        if path not in self._reported:
            self._reported.add(path)
            LOG.warning("SeRA: %s %s", path, problem)

    @_on_main
    def write(self, iteration: int, name: str, table: pa.Table) -> None:
        """Complete a phase."""
        write_table(self.table_file(iteration, name), table)

    def finished(self, iteration: int, name: str) -> bool:
        """Whether a phase is complete and its file whole."""
        return self._whole(self.table_file(iteration, name))

    def read(self, iteration: int, name: str) -> pa.Table | None:
        """A finished phase's table; None if it is not there, damaged, or not of this run."""
        path = self.table_file(iteration, name)
        if not self._whole(path):
            return None
        if self._expected is None and (run := self.description()):
            self._expected = Expected.of(run)
        try:
            return read_table(path, name, self._expected or Expected(), iteration=iteration)
        except Invalid as error:
            self._report(path, f"cannot be used ({error})")
            return None

    def summary(self, iteration: int) -> dict[str, Any]:
        """The iteration's summary so far, empty before its first phase is complete."""
        return self._json(self.iteration(iteration) / "summary.json", Summary)

    def _json(self, path: Path, kind: type[Keys]) -> dict[str, Any]:
        """A JSON file, empty where it is not there or cannot be used, which is said."""
        if not self._whole(path):
            return {}
        try:
            return read_json(path, kind)
        except Invalid as error:
            self._report(path, f"cannot be used ({error})")
            return {}

    @_on_main
    def write_summary(self, iteration: int, content: Mapping[str, Any]) -> None:
        """Replace the iteration's summary."""
        write_json(self.iteration(iteration) / "summary.json", content)

    def samples(self, iteration: int) -> Path:
        """Where sampling puts its finished chunks until candidates.parquet is written."""
        return self.iteration(iteration) / "samples"

    def append_samples(self, iteration: int, table: pa.Table) -> None:
        """Add a chunk that this rank has finished: a crash loses at most the one being sampled.

        A chunk has its checksum in its name: ranks write into one directory at the same time.
        """
        directory, rank = self.samples(iteration), f"{self.ranks.rank:03d}"
        if iteration not in self._chunks:
            self._chunks[iteration] = count(len(list(directory.glob(f"{rank}-*.parquet"))))
        name = f"{rank}-{next(self._chunks[iteration]):06d}.parquet"
        add_file(directory, name, lambda path: pq.write_table(table, path, **layout(table.schema)))

    def _chunk_files(self, iteration: int) -> Iterator[Path]:
        """Whole chunks: rows of a damaged one are sampled again."""
        for file in sorted(self.samples(iteration).glob("[0-9]*.parquet")):
            if self._whole(file, is_named_right):
                yield file

    def chunks(self, iteration: int) -> Iterator[pa.Table]:
        """Whole chunks, one at a time."""
        return map(read_columns, self._chunk_files(iteration))

    @_on_main
    def set_aside_samples(self, iteration: int, problem: Callable[[pa.Table], str | None]) -> None:
        """Put chunks aside that are whole and cannot be used; their rows are sampled again.

        `problem` says what is wrong with a chunk, or None. An OSError if there is no directory for
        chunks and none can be made.
        """
        make_directory(self.samples(iteration))
        for file in self._chunk_files(iteration):
            try:
                wrong = problem(read_columns(file))
            except Invalid as error:
                wrong = str(error)
            except (pa.ArrowException, OSError, ValueError, KeyError) as error:
                wrong = f"it cannot be read ({plain(str(error))})"
            if wrong is not None:
                file.rename(file.with_name(f"set-aside-{file.name}"))
                LOG.warning("SeRA: %s is set aside and made again: %s", file, wrong)

    @_on_main
    def remove_samples(self, iteration: int) -> None:
        """Remove the chunks once candidates.parquet holds them."""
        remove(self.samples(iteration))
