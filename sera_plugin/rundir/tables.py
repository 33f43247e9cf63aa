"""The tables of a run directory: their columns, and whether one can be read by them."""

from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from sera_plugin.config.quoting import plain
from sera_plugin.rundir.format import Invalid, regular_size
from sera_plugin.rundir.tokens import TOKENS, TokenColumn

TYPES: dict[str, pa.DataType] = {
    "row": pa.int64(),
    "finish_reason": pa.string(),
    "logps": pa.list_(pa.float64()),
    **dict.fromkeys(["prompt_ids", "chosen_ids", "rejected_ids", "token_ids"], TOKENS),
    **dict.fromkeys(["prompt_length", "chosen_length", "rejected_length"], pa.int32()),
    **dict.fromkeys(["candidate", "chosen_candidate", "rejected_candidate"], pa.int32()),
    **dict.fromkeys(["chosen_logp", "rejected_logp", "reward", "priority"], pa.float64()),
    **dict.fromkeys(["chosen_reward", "rejected_reward", "margin"], pa.float64()),
    **dict.fromkeys(["reference_logp"], pa.float64()),
    **dict.fromkeys(["selected", "swapped"], pa.bool_()),
}
_SCORED = ("row", "chosen_length", "rejected_length", "chosen_logp", "rejected_logp")
#: Table -> the columns that it must have; others of `TYPES` it may have.
_TABLES = {
    "dataset": ("row", "prompt_ids", "chosen_ids", "rejected_ids"),
    "offline": _SCORED,
    "evaluation": _SCORED,
    "candidates": ("row", "candidate", "token_ids", "finish_reason", "logps", "reward"),
    "bootstrapped": ("row", "chosen_candidate", "rejected_candidate", "margin", "selected"),
}
#: Types of columns that a dataset has beside its pairs.
_PLAIN = (
    *(pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_string),
    *(pa.types.is_large_string, pa.types.is_list, pa.types.is_struct),
)
#: May be NaN: whoever ranks could not, or is not asked to.
_UNRANKED = ("reward", "priority")


def read_table(
    path: Path,
    name: str,
    *,
    total: int | None = None,
    per_prompt: int | None = None,
    beside: bool = False,
    root: Path | None = None,
) -> pa.Table:
    """A table of the run directory, once all of it is as the format says.

    `name` is what the table is called there. `total` is N where it is known, `per_prompt` how many
    candidates a prompt has; with `beside` other columns of plain types are read too.

    Raises:
        Invalid: for a table of another kind, a value that cannot be, more than fits into memory.
        OSError: if it cannot be read.
    """
    regular_size(path, root)
    try:
        with pq.ParquetFile(path) as file:
            _check_size(file.metadata)
            known = [
                one.name
                for one in file.schema_arrow
                if one.name in TYPES or (beside and any(is_one(one.type) for is_one in _PLAIN))
            ]
            if len(known) != len(set(known)):
                raise Invalid("it has a column twice")
            table = file.read(known)
    except (pa.ArrowException, MemoryError, UnicodeError, OverflowError) as error:
        raise Invalid(f"it cannot be read ({plain(str(error), 80)})") from None
    missing = [one for one in _TABLES[name] if one not in known]
    if missing:
        raise Invalid(f"it has no column {', '.join(missing)}")
    for column in known:
        if column in TYPES:
            _check_column(column, table[column])
    _check_rows(table, name, total, per_prompt)
    return table


def _check_size(metadata: pq.FileMetaData) -> None:
    """A small file may stand for billions of equal values."""
    groups = (metadata.row_group(index) for index in range(metadata.num_row_groups))
    columns = (group.column(place) for group in groups for place in range(group.num_columns))
    values = sum(max(column.num_values, 0) for column in columns)
    if 16 * values > psutil.virtual_memory().available:
        raise Invalid(f"it has {values:,} values, more than fit into memory")


def _check_column(name: str, column: pa.ChunkedArray) -> None:
    if column.type != TYPES[name]:
        raise Invalid(f"column {name} is of type {plain(str(column.type))}, not {TYPES[name]}")
    lists = pa.types.is_list(column.type)
    inner = [chunk.flatten() for chunk in column.chunks] if lists else column.chunks
    if column.null_count or any(chunk.null_count for chunk in inner):
        raise Invalid(f"column {name} has nulls")
    numbers = [chunk.to_numpy(zero_copy_only=False) for chunk in inner]
    if pa.types.is_floating(column.type) or name == "logps":
        finite = name in _UNRANKED or all(np.isfinite(one).all() for one in numbers)
        if not finite or any(np.isinf(one).any() for one in numbers):
            raise Invalid(f"column {name} has a value that is not finite")
    least = 1 if name.endswith("_length") else 0
    if (column.type == TOKENS or pa.types.is_integer(column.type)) and any(
        len(one) and one.min() < least for one in numbers
    ):
        raise Invalid(f"column {name} has a number below {least}")


def _check_rows(table: pa.Table, name: str, total: int | None, per_prompt: int | None) -> None:
    """Whether rows and candidates are those that there are, and each once."""
    rows = table["row"].to_numpy()
    if name in ("dataset", "offline", "evaluation"):
        if not np.array_equal(rows, np.arange(len(rows))) or not len(rows):
            raise Invalid("its rows are not 0, 1, 2, ...")
        if total is not None and len(rows) != total and name != "evaluation":
            raise Invalid(f"it has {len(rows):,} rows, and the run {total:,} pairs")
    elif len(rows) and total is not None and rows.max() >= total:
        raise Invalid(f"it has row {rows.max()}, and the run {total:,} pairs")
    for column in (one for one in table.column_names if table[one].type == TOKENS):
        if len(rows) and TokenColumn(table[column]).lengths.min() < 1:
            raise Invalid(f"column {column} has an empty list")
    if name == "candidates":
        count = candidates_of(table)
        lengths = np.concatenate([chunk.value_lengths() for chunk in table["logps"].chunks])
        if len(set(lengths.tolist())) > 1 or not lengths.min():
            raise Invalid("its lists of logps are not of one length")
        if not set(table["finish_reason"].unique().to_pylist()) <= {"stop", "length", "dataset"}:
            raise Invalid("it has a finish_reason that is none")
        if per_prompt is not None and count != per_prompt:
            raise Invalid(f"it has {count} candidates of each row, not {per_prompt}")
    if name == "bootstrapped" and per_prompt is not None:
        for side in ("chosen_candidate", "rejected_candidate"):
            if len(rows) and table[side].to_numpy().max() >= per_prompt:
                raise Invalid(f"{side} names one of more than {per_prompt} candidates")


def candidates_of(table: pa.Table) -> int:
    """How many candidates each row of a table has, in the order of (row, candidate).

    Raises:
        Invalid: unless each has the same number of them.
    """
    rows, numbers = (table[name].to_numpy() for name in ("row", "candidate"))
    distinct = np.unique(rows)
    count = len(rows) // max(1, len(distinct))
    expected = (np.repeat(distinct, count), np.tile(np.arange(count), len(distinct)))
    if not count or not all(map(np.array_equal, (rows, numbers), expected)):
        raise Invalid("it does not have the same number of candidates for each row")
    return count
