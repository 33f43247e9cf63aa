"""Preference pairs as token ids, and what a dataset says of its rows beside them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from sera_plugin.algorithm.rewards import FloatArray
from sera_plugin.rundir.tokens import TokenColumn


@dataclass(frozen=True)
class Pairs:
    """Preference pairs, (N,) lists of token ids each; completions with their end token."""

    prompt_ids: TokenColumn
    chosen_ids: TokenColumn
    rejected_ids: TokenColumn

    @classmethod
    def from_table(cls, table: pa.Table) -> Pairs:
        """The pairs of a table with the columns of dataset.parquet."""
        return cls(*(TokenColumn(table[f"{one}_ids"]) for one in ("prompt", "chosen", "rejected")))

    def __len__(self) -> int:
        return len(self.prompt_ids)


@dataclass(frozen=True)
class Beside:
    """What a dataset says of its rows beside their texts: tables of columns, one after another."""

    tables: Sequence[pa.Table] = ()

    @classmethod
    def of(cls, names: Sequence[str], *tables: pa.Table | None) -> Beside:
        """These columns of tables, as far as each has them."""
        there = [one for one in tables if one is not None] if names else []
        return cls([one.select([n for n in names if n in one.column_names]) for one in there])

    def fingerprint(self) -> str:
        """SHA-256 of all rows, in hexadecimal, however the tables are chunked."""
        found = hashlib.sha256()
        for table in self.tables:
            for batch in table.to_batches(4_096):
                for row in batch.to_pylist():
                    found.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
        return found.hexdigest()

    def about(self, row: int) -> str:
        """A row's columns as JSON; a table that lacks one has nothing there."""
        for table in self.tables:
            if row < len(table):
                values = {name: table[name][row].as_py() for name in table.column_names}
                return json.dumps(values, sort_keys=True, default=str)
            row -= len(table)
        return ""


@dataclass(frozen=True)
class Labelled:
    """(M,) pairs whose labels may weigh what ranks, and that no iteration trains on."""

    pairs: Pairs
    beside: Beside
    differences: FloatArray  # (M, features) of the implicit reward, chosen less rejected
