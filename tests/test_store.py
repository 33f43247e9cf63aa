"""The run directory's files."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from sera_plugin import store as module
from sera_plugin.store import (
    RunStore,
    TokenColumn,
    fingerprint,
    make_table,
    read_json,
    write_json,
    write_table,
)


def tokens(*lists):
    return TokenColumn(pa.array(lists, pa.list_(pa.int32())))


def test_a_failed_write_leaves_the_old_file_and_no_partial_one(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="Out of range"):
        write_json(path, {"a": float("nan")})

    def fail(partial):
        partial.write_text("half")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        module._replace(path, fail)
    assert read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_the_same_content_gives_the_same_bytes(tmp_path):
    table = make_table({"row": [0, 1], "token_ids": [[1, 2], []], "reward": [0.5, -1.0]})
    write_table(tmp_path / "a", table)
    write_table(tmp_path / "b", table)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_column_types_are_the_formats():
    table = make_table(
        {"row": [0], "prompt_ids": [[1]], "chosen_length": [3], "margin": [1], "selected": [True]}
    )
    assert [str(field.type) for field in table.schema] == [
        "int64",
        "list<item: int32>",
        "int32",
        "double",
        "bool",
    ]


def test_token_columns_read_slices_chunks_and_empty_lists():
    one = pa.array([[9], [1, 2], [], [3]], pa.list_(pa.int32())).slice(1)
    column = TokenColumn(pa.chunked_array([one, one.slice(1)]))
    assert [ids.tolist() for ids in column] == [[1, 2], [], [3], [], [3]]
    assert column.lengths.tolist() == [2, 0, 1, 0, 1]


def test_the_fingerprint_sees_tokens_and_boundaries():
    assert fingerprint([tokens([1, 2], [3])]) == fingerprint([tokens([1, 2], [3])])
    assert fingerprint([tokens([1, 2], [3])]) != fingerprint([tokens([1, 2], [4])])
    assert fingerprint([tokens([1, 2], [3])]) != fingerprint([tokens([1], [2, 3])])


def test_samples_are_read_in_row_order_and_removed(tmp_path):
    run = RunStore(tmp_path)
    assert run.read_samples(2) is None
    for row in (5, 0):
        run.append_samples(2, make_table({"row": [row, row], "candidate": [1, 0]}))
    found = run.read_samples(2)
    assert found["row"].to_pylist() == [0, 0, 5, 5]
    assert found["candidate"].to_pylist() == [0, 1, 0, 1]
    run.remove_samples(2)
    assert run.read_samples(2) is None


def test_a_phase_is_complete_when_its_file_exists(tmp_path):
    run = RunStore(tmp_path)
    assert run.read(3, "offline") is None
    write_table(run.table_file(3, "offline"), make_table({"row": [0], "margin": [2.5]}))
    np.testing.assert_array_equal(run.column(3, "offline", "margin"), [2.5])
