"""The tables of a run directory: their columns, and whether one can be read by them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sera_plugin.config.kinds import labeler_kind
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
_SIDES = ("chosen", "rejected")
_SCORED = ("row", "chosen_length", "rejected_length", "chosen_logp", "rejected_logp")
#: Table -> the columns that it must have; others of `TYPES` it may have.
_TABLES = {
    "dataset": ("row", "prompt_ids", "chosen_ids", "rejected_ids"),
    "prompts": ("row", "prompt_ids"),
    "offline": (*_SCORED, "prompt_length"),
    "evaluation": _SCORED,
    "candidates": ("row", "candidate", "token_ids", "finish_reason", "logps", "reward"),
    "bootstrapped": ("row", "chosen_candidate", "rejected_candidate", "margin", "selected"),
}
#: From iteration 2 on. Of candidates it is scored where that is the reference.
_LATER = {
    "offline": ("chosen_reward", "rejected_reward", "margin", "selected"),
    "candidates": ("reference_logp",),
}
#: Types of columns that a dataset has beside its pairs, and lists and structs of them.
_PLAIN = (
    *(pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_string),
    pa.types.is_large_string,
)
#: Bytes of text that any table may have; more than so many times its file's are made up.
_SOME_TEXT, _TIMES = 2**28, 1000
#: Bytes for which nobody has to ask whether there is room, nor start threads.
_FITS = 2**20
#: May be NaN: whoever ranks could not, or is not asked to.
_UNRANKED = ("reward", "priority")


class Expected(NamedTuple):
    """What is known of a run's tables beforehand; None where it is not."""

    pairs: int | None = None  # N, the number of offline pairs
    held_out: int | None = None  # how many pairs are held out
    candidates: int | None = None  # of each prompt, the dataset's answer included
    reference: str | None = None  # `sera.reference`
    prompts: int = 0  # how many are sampled that have no pair

    @property
    def rows(self) -> int | None:
        """How many prompts are sampled."""
        return None if self.pairs is None else self.pairs + self.prompts

    @classmethod
    def of(cls, run: Mapping[str, Any]) -> Expected:
        """What run.json says, which may be empty."""
        settings = run.get("config", {}).get("sera", {})
        count = settings.get("candidates")
        if count is not None:
            count += labeler_kind(settings.get("labeler", "implicit")).adds_dataset_answer
        known = run.get("pairs"), run.get("evaluation_pairs"), count, settings.get("reference")
        return cls(*known, run.get("prompts", 0))

    def columns(self, name: str, iteration: int) -> tuple[str, ...]:
        """Those that a table of iteration t must have."""
        later = iteration > 1 and (name == "offline" or self.reference == "initial")
        return (*_TABLES[name], *(_LATER.get(name, ()) if later else ()))


def read_table(
    path: Path,
    name: str,
    expected: Expected,
    *,
    iteration: int = 1,
    beside: bool = False,
    root: Path | None = None,
) -> pa.Table:
    """A table of the run directory, once all of it is as the format says and the run expects.

    `name` is what the table is called there, in iteration t; with `beside` other columns of plain
    types are read too.

    Raises:
        Invalid: for a table of another kind, or one that does not fit the run's others; a value
            that cannot be; more than fits into memory.
        OSError: if it cannot be read.
    """
    table = read_columns(
        path, lambda one: one.name in TYPES or (beside and _is_plain(one.type)), root
    )
    known = table.column_names
    missing = [one for one in expected.columns(name, iteration) if one not in known]
    if missing:
        raise Invalid(f"it has no column {', '.join(missing)}")
    for column in known:
        if column in TYPES:
            _check_column(column, table[column])
    _check_rows(table, name, expected)
    return table


def read_columns(
    path: Path, wanted: Callable[[pa.Field], bool] = lambda _: True, root: Path | None = None
) -> pa.Table:
    """Columns of a parquet file in `root`, whole and no more than fit into memory.

    Much faster than `pyarrow.parquet.read_table` for small files, of which there are many.

    Raises:
        Invalid, OSError: see `read_table`.
    """
    size = regular_size(path, root)
    try:
        with pa.OSFile(str(path)) as content:
            with pq.ParquetFile(content) as file:
                metadata, schema, kinds = file.metadata, file.schema, file.schema_arrow
            _check_size(metadata)
            fields = [pa.field(one.name, one.type) for one in kinds if wanted(one)]
            leaves = [schema.column(place) for place in range(len(schema))]
            names = [one.name for one in fields]
            if len(names) != len(set(names)):
                raise Invalid("it has a column twice")
            # Each text once, and numbers: a text that is long and repeated may stand for any
            # amount.
            texts = [one.path for one in leaves if one.physical_type == "BYTE_ARRAY"]
            how: dict[str, Any] = {"read_dictionary": texts, "pre_buffer": False}
            with pq.ParquetFile(content, metadata=metadata, **how) as file:
                table = file.read(names, use_threads=size > _FITS)
        much = sum(_text_bytes(chunk) for column in table.columns for chunk in column.chunks)
        if much > max(_SOME_TEXT, _TIMES * size) or not _fits(much):
            raise Invalid(f"it has {much:,} bytes of text, more than can be")
        table = table.cast(pa.schema(fields, table.schema.metadata))
        table.validate(full=True)
    except (pa.ArrowException, MemoryError, UnicodeError, OverflowError) as error:
        raise Invalid(f"it cannot be read ({plain(str(error), 80)})") from None
    return table


def _is_plain(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind):
        return _is_plain(kind.value_type)
    if pa.types.is_struct(kind):
        names = [field.name for field in kind]
        return len(set(names)) == len(names) and all(_is_plain(field.type) for field in kind)
    return any(is_one(kind) for is_one in _PLAIN)


def _text_bytes(array: pa.Array) -> int:
    """Bytes of all texts in an array that has them as dictionaries."""
    if pa.types.is_dictionary(array.type):
        lengths = pc.binary_length(array.dictionary)
        return pc.sum(lengths.take(array.indices).cast(pa.int64())).as_py() or 0
    if pa.types.is_struct(array.type):
        return sum(map(_text_bytes, array.flatten()))
    return _text_bytes(array.flatten()) if pa.types.is_list(array.type) else 0


def _check_size(metadata: pq.FileMetaData) -> None:
    """A small file may stand for billions of equal values."""
    groups = (metadata.row_group(index) for index in range(metadata.num_row_groups))
    columns = [group.column(place) for group in groups for place in range(group.num_columns)]
    values = sum(max(column.num_values, 0) for column in columns)
    written = sum(max(column.total_uncompressed_size, 0) for column in columns)
    if not _fits(max(16 * values, written)):
        raise Invalid(f"it has {values:,} values, more than fit into memory")


def _fits(size: int) -> bool:
    return size <= _FITS or size <= psutil.virtual_memory().available


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


def _check_rows(table: pa.Table, name: str, expected: Expected) -> None:
    """Whether rows and candidates are those that there are, and each once."""
    rows, total = table["row"].to_numpy(), expected.pairs
    if name == "bootstrapped":
        _check_pairs(table, expected)
    elif name == "candidates":
        count = candidates_of(table, expected.rows)
        if expected.candidates not in (None, count):
            raise Invalid(f"it has {count} candidates of each row, not {expected.candidates}")
    else:
        first = (total or 0) if name == "prompts" else 0
        if not np.array_equal(rows, np.arange(first, first + len(rows))) or not len(rows):
            raise Invalid(f"its rows are not {first}, {first + 1}, {first + 2}, ...")
        what = "pairs"
        if name == "prompts":
            what, total = "prompts without a pair", expected.prompts
        if name == "evaluation":
            what, total = "held-out pairs", expected.held_out
        if total is not None and len(rows) != total:
            raise Invalid(f"it has {len(rows):,} rows, and the run {total:,} {what}")
    for column in (one for one in table.column_names if table[one].type == TOKENS):
        if len(rows) and TokenColumn(table[column]).lengths.min() < 1:
            raise Invalid(f"column {column} has an empty list")
    if name == "candidates":
        lengths = np.concatenate([chunk.value_lengths() for chunk in table["logps"].chunks])
        if len(set(lengths.tolist())) > 1 or not lengths.min():
            raise Invalid("its lists of logps are not of one length")
        if not set(table["finish_reason"].unique().to_pylist()) <= {"stop", "length", "dataset"}:
            raise Invalid("it has a finish_reason that is none")


def _check_pairs(table: pa.Table, expected: Expected) -> None:
    """Whether sampled pairs are of candidates that there are, each of which is in one pair."""
    places = candidate_places(table, expected.candidates or 2**31)
    known = {"row": expected.rows}
    known |= {f"{side}_candidate": expected.candidates for side in places}
    for name, count in known.items():
        most = table[name].to_numpy().max(initial=0)
        if count is not None and most >= count:
            raise Invalid(f"column {name} has {most:,}, and there are {count:,} from 0 on")
    both = np.concatenate(list(places.values()))
    if len(np.unique(both)) != len(both):
        raise Invalid("it names a candidate twice")


def candidates_of(table: pa.Table, total: int | None = None) -> int:
    """How many candidates each row of a table has, in the order of (row, candidate).

    Raises:
        Invalid: unless rows 0, 1, 2, ... (to `total`, where that is given) have the same number.
    """
    rows, numbers = (table[name].to_numpy() for name in ("row", "candidate"))
    count = int(np.count_nonzero(rows == rows[:1]))
    distinct = len(rows) // max(1, count)
    expected = np.arange(distinct)[:, None], np.arange(count)
    if (
        distinct * count != len(rows)
        or not count
        or not all(
            (one.reshape(distinct, count) == ours).all()
            for one, ours in zip((rows, numbers), expected, strict=True)
        )
    ):
        raise Invalid("it does not have the same number of candidates for each row")
    if total not in (None, distinct):
        raise Invalid(f"it has candidates of {distinct:,} rows, and the run {total:,} prompts")
    return count


def candidate_places(
    bootstrapped: Mapping[str, Any], per_prompt: int
) -> dict[str, npt.NDArray[np.int64]]:
    """By side, where in candidates.parquet sampled pairs have their answer.

    `bootstrapped` are columns of a table that fits that one, `per_prompt` its `candidates_of`.
    """
    first = np.asarray(bootstrapped["row"]) * per_prompt
    return {side: first + np.asarray(bootstrapped[f"{side}_candidate"]) for side in _SIDES}
