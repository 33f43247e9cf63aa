"""The run directory: `{output_dir}/sera/`, a public format (docs/run-directory.md).

Every file is written beside its place and renamed into it, so a file that exists is whole and a
phase is complete when its file exists. Parquet and JSON only.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from sera_plugin.ranks import Ranks

FORMAT_VERSION = 1

_TOKENS = pa.list_(pa.int32())
_TYPES: dict[str, pa.DataType] = {
    "row": pa.int64(),
    "prompt_ids": _TOKENS,
    "chosen_ids": _TOKENS,
    "rejected_ids": _TOKENS,
    "prompt_length": pa.int32(),
    "chosen_length": pa.int32(),
    "rejected_length": pa.int32(),
    "chosen_logp": pa.float64(),
    "rejected_logp": pa.float64(),
    "chosen_reward": pa.float64(),
    "rejected_reward": pa.float64(),
    "margin": pa.float64(),
    "selected": pa.bool_(),
    "candidate": pa.int32(),
    "token_ids": _TOKENS,
    "finish_reason": pa.string(),
    "logps": pa.list_(pa.float64()),
    "reward": pa.float64(),
    "chosen_candidate": pa.int32(),
    "rejected_candidate": pa.int32(),
}


def make_table(columns: Mapping[str, Any]) -> pa.Table:
    """A table with the run directory's column types (unknown columns keep their own)."""
    return pa.table(
        {
            name: pa.array(values, type=_TYPES.get(name))
            if not isinstance(values, pa.Array | pa.ChunkedArray)
            else values
            for name, values in columns.items()
        }
    )


def _replace(path: Path, write: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_table(path: Path, table: pa.Table) -> None:
    """Write a parquet file in one piece."""
    _replace(path, lambda partial: pq.write_table(table, partial, compression="zstd"))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file in one piece, keys sorted."""
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    _replace(path, lambda partial: partial.write_text(text + "\n", encoding="utf-8"))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


class TokenColumn(Sequence[npt.NDArray[np.int32]]):
    """A column of token id lists as one flat array: no Python object per token.

    Args:
        column: a list<int32> column without nulls.
    """

    def __init__(self, column: pa.ChunkedArray | pa.ListArray) -> None:
        whole = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        self.offsets: npt.NDArray[np.int64] = whole.offsets.to_numpy().astype(np.int64)
        self.tokens: npt.NDArray[np.int32] = whole.values.to_numpy()

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: Any) -> Any:
        index = range(len(self))[index]
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """Tokens per list."""
        return np.diff(self.offsets).astype(np.int32)


def fingerprint(columns: Iterable[TokenColumn]) -> str:
    """SHA-256 of token id columns; the identity of a dataset as it is trained."""
    digest = hashlib.sha256()
    for column in columns:
        digest.update(column.lengths.tobytes())
        digest.update(column.tokens[column.offsets[0] : column.offsets[-1]].tobytes())
    return digest.hexdigest()


class RunStore:
    """One run's directory.

    All ranks call what writes, and rank 0 does it; only chunks of samples are each rank's own.

    Args:
        output_dir: the host's `output_dir`, on a file system that all ranks share.
        ranks: the run's processes.
    """

    def __init__(self, output_dir: str | Path, ranks: Ranks | None = None) -> None:
        self.root = Path(output_dir) / "sera"
        self.ranks = ranks or Ranks()

    @property
    def run_file(self) -> Path:
        return self.root / "run.json"

    @property
    def dataset_file(self) -> Path:
        return self.root / "dataset.parquet"

    def begin(self, description: Mapping[str, Any], dataset: pa.Table) -> None:
        """Write what the run is and what it trains on; a run has begun once run.json is there."""

        def write() -> None:
            write_table(self.dataset_file, dataset)
            write_json(self.run_file, description)

        self.ranks.on_main(write)

    def iteration(self, iteration: int) -> Path:
        """The directory of iteration t (1-based)."""
        return self.root / f"iteration-{iteration:02d}"

    def discard_after(self, iteration: int) -> None:
        """Remove later iterations: they began from a policy that is trained anew."""

        def discard() -> None:
            for path in self.root.glob("iteration-*"):
                # Only what is named as ours; of a link the link, never what it leads to.
                if not re.fullmatch(r"iteration-[0-9]{2,}", path.name):
                    continue
                if int(path.name.removeprefix("iteration-")) <= iteration:
                    continue
                if path.is_symlink():
                    path.unlink()
                elif path.is_dir():
                    shutil.rmtree(path)

        self.ranks.on_main(discard)

    def policy(self, iteration: int) -> Path:
        """Where theta_{t-1}, the policy iteration t starts from, is kept."""
        return self.iteration(iteration) / "policy"

    def table_file(self, iteration: int, name: str) -> Path:
        """`offline`, `candidates`, `bootstrapped` or `evaluation` of iteration t."""
        return self.iteration(iteration) / f"{name}.parquet"

    def write(self, iteration: int, name: str, table: pa.Table) -> None:
        """Complete a phase."""
        self.ranks.on_main(lambda: write_table(self.table_file(iteration, name), table))

    def read(self, iteration: int, name: str) -> pa.Table | None:
        """A finished phase's table, or None if the phase is not complete."""
        path = self.table_file(iteration, name)
        return pq.read_table(path) if path.exists() else None

    def column(self, iteration: int, name: str, column: str) -> npt.NDArray[np.float64]:
        """One numeric column of a finished phase."""
        table = pq.read_table(self.table_file(iteration, name), columns=[column])
        values: npt.NDArray[np.float64] = table[column].to_numpy()
        return values

    def summary(self, iteration: int) -> dict[str, Any]:
        """The iteration's summary so far, empty before its first phase is complete."""
        path = self.iteration(iteration) / "summary.json"
        return read_json(path) if path.exists() else {}

    def write_summary(self, iteration: int, content: Mapping[str, Any]) -> None:
        """Replace the iteration's summary."""
        path = self.iteration(iteration) / "summary.json"
        self.ranks.on_main(lambda: write_json(path, content))

    def samples(self, iteration: int) -> Path:
        """Where sampling puts its finished chunks until candidates.parquet is written."""
        return self.iteration(iteration) / "samples"

    def append_samples(self, iteration: int, table: pa.Table) -> None:
        """Add a chunk that this rank has finished: a crash loses at most the one being sampled."""
        directory, rank = self.samples(iteration), f"{self.ranks.rank:03d}"
        number = len(list(directory.glob(f"{rank}-*.parquet")))
        write_table(directory / f"{rank}-{number:06d}.parquet", table)

    def read_samples(self, iteration: int) -> pa.Table | None:
        """All finished chunks in the order of (row, candidate), or None."""
        files = sorted(self.samples(iteration).glob("*.parquet"))
        if not files:
            return None
        table = pa.concat_tables([pq.read_table(file) for file in files])
        return table.sort_by([("row", "ascending"), ("candidate", "ascending")])

    def remove_samples(self, iteration: int) -> None:
        """Remove the chunks once candidates.parquet holds them."""

        def remove() -> None:
            if self.samples(iteration).exists():
                shutil.rmtree(self.samples(iteration))

        self.ranks.on_main(remove)
