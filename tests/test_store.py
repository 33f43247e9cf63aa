"""The run directory: whole files, exact tokens, a fingerprint that means what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sera_plugin.rundir import store as store_module
from sera_plugin.rundir.checksums import SUMS, is_whole
from sera_plugin.rundir.store import (
    RunStore,
    make_table,
    read_json,
    write_json,
    write_table,
)

LISTS = pa.list_(pa.int32())


def samples(rows: list[int], tokens: int = 1, candidates: int = 2) -> pa.Table:
    flat = [(row, index) for row in rows for index in range(candidates)]
    return make_table(
        {
            "row": [row for row, _ in flat],
            "candidate": [index for _, index in flat],
            "token_ids": [[row, index][:tokens] for row, index in flat],
            "finish_reason": ["stop"] * len(flat),
        }
    )


# ------------------------------------------------------------------ whole files


def test_a_failing_write_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(table: pa.Table, where: Path, **_: Any) -> None:
        Path(where).write_bytes(b"half a file")
        raise OSError("No space left on device")

    monkeypatch.setattr(store_module.pq, "write_table", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_table(tmp_path / "offline.parquet", samples([0]))
    assert list(tmp_path.iterdir()) == []


def test_a_failing_write_keeps_the_earlier_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "offline.parquet"
    write_table(path, samples([0]))
    before = path.read_bytes()

    def full_disk(table: pa.Table, where: Path, **_: Any) -> None:
        Path(where).write_bytes(b"half a file")
        raise OSError("No space left on device")

    monkeypatch.setattr(store_module.pq, "write_table", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_table(path, samples([1]))
    assert path.read_bytes() == before
    assert is_whole(path)
    assert {found.name for found in tmp_path.iterdir()} == {path.name, SUMS}


def test_the_file_appears_only_when_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "offline.parquet"
    seen: list[bool] = []
    original = pq.write_table

    def watched(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        seen.append(path.exists())

    monkeypatch.setattr(store_module.pq, "write_table", watched)
    write_table(path, samples([0]))
    assert seen == [False]
    assert path.exists()


def test_a_partial_file_of_a_killed_run_is_no_phase(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    store.append_samples(2, samples([0]))
    left = store.table_file(2, "offline").with_name(".offline.parquet.partial")
    left.write_bytes(b"half a file")
    (store.samples(2) / ".000001.parquet.partial").write_bytes(b"half a file")
    assert store.read(2, "offline") is None
    found = store.read_samples(2)
    assert found is not None
    assert found["row"].to_pylist() == [0, 0]
    store.append_samples(2, samples([1]))
    store.remove_samples(2)
    assert not store.samples(2).exists()


def test_json_is_sorted_readable_and_refuses_nan(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "run.json"
    write_json(path, {"b": 1, "a": "größer"})
    text = path.read_text(encoding="utf-8")
    assert text.index('"a": "größer"') < text.index('"b": 1')
    assert read_json(path) == json.loads(text) == {"a": "größer", "b": 1}
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert read_json(path) == {"a": "größer", "b": 1}


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    write_table(tmp_path / "one.parquet", samples([3, 1, 2]))
    write_table(tmp_path / "two.parquet", samples([3, 1, 2]))
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()
    write_json(tmp_path / "one.json", {"x": 1, "y": {"b": 2, "a": 3}})
    write_json(tmp_path / "two.json", {"y": {"a": 3, "b": 2}, "x": 1})
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()


# ------------------------------------------------------------------ tables and chunks


def test_column_types_are_the_public_formats() -> None:
    """DESIGN.md section 6 / docs/run-directory.md, column by column."""
    columns: dict[str, tuple[Any, pa.DataType]] = {
        "row": ([0], pa.int64()),
        **{f"{name}_ids": ([[1]], LISTS) for name in ("prompt", "chosen", "rejected", "token")},
        **{f"{name}_length": ([1], pa.int32()) for name in ("prompt", "chosen", "rejected")},
        **{
            name: ([1], pa.float64())
            for name in (
                "chosen_logp",
                "rejected_logp",
                "chosen_reward",
                "rejected_reward",
                "margin",
                "reward",
            )
        },
        "selected": ([True], pa.bool_()),
        "candidate": ([0], pa.int32()),
        "finish_reason": (["stop"], pa.string()),
        "logps": ([[-1, -2]], pa.list_(pa.float64())),
        "chosen_candidate": ([0], pa.int32()),
        "rejected_candidate": ([1], pa.int32()),
    }
    columns["token_ids"] = columns.pop("token_ids")
    table = make_table({name: values for name, (values, _) in columns.items()})
    assert {f.name: f.type for f in table.schema} == {n: kind for n, (_, kind) in columns.items()}
    empty = make_table({name: [] for name in columns})
    assert empty.schema.types == table.schema.types


def test_token_ids_may_come_as_arrays_and_other_columns_keep_their_type() -> None:
    table = make_table(
        {"chosen_ids": [np.asarray([1, 2], dtype=np.int64), []], "score": [0.5, 1.5]}
    )
    assert table["chosen_ids"].to_pylist() == [[1, 2], []]
    assert table.schema.field("chosen_ids").type == LISTS
    assert table.schema.field("score").type == pa.float64()


def test_places_are_the_public_formats(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    root = tmp_path / "sera"
    assert store.run_file == root / "run.json"
    assert store.dataset_file == root / "dataset.parquet"
    assert store.policy(1) == root / "iteration-01" / "policy"
    assert store.table_file(12, "offline") == root / "iteration-12" / "offline.parquet"


def test_finished_chunks_are_read_in_order_and_removed(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    assert store.read_samples(2) is None
    store.append_samples(2, samples([5, 1], tokens=2))
    store.append_samples(2, samples([3], tokens=2))
    found = store.read_samples(2)
    assert found is not None
    keys = list(zip(found["row"].to_pylist(), found["candidate"].to_pylist(), strict=True))
    assert keys == [(1, 0), (1, 1), (3, 0), (3, 1), (5, 0), (5, 1)]
    assert found["token_ids"].to_pylist() == [list(key) for key in keys]
    assert store.read_samples(3) is None
    store.remove_samples(2)
    assert store.read_samples(2) is None
    assert not store.samples(2).exists()
    store.remove_samples(2)


def test_chunks_of_a_restarted_run_do_not_replace_earlier_ones(tmp_path: Path) -> None:
    RunStore(tmp_path).append_samples(2, samples([0]))
    RunStore(tmp_path).append_samples(2, samples([1]))
    found = RunStore(tmp_path).read_samples(2)
    assert found is not None
    assert found["row"].to_pylist() == [0, 0, 1, 1]


def test_chunks_are_counted_once_and_rows_read_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Listing the directory for every chunk would take as many steps as chunks squared."""
    RunStore(tmp_path).append_samples(2, samples([7]))
    store = RunStore(tmp_path)
    assert store.sampled_rows(3).tolist() == []
    store.append_samples(2, samples([5, 1]))
    monkeypatch.setattr(Path, "glob", lambda *_: pytest.fail("counted again"))
    store.append_samples(2, samples([3]))
    monkeypatch.undo()
    assert store.sampled_rows(2).tolist() == [1, 3, 5, 7]
    names = sorted(path.name[:10] for path in store.samples(2).iterdir())
    assert names == ["000-000000", "000-000001", "000-000002"]


def test_columns_are_read_alone(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    table = samples([0, 1, 2, 3, 4])
    write_table(store.table_file(2, "candidates"), table)
    some = store.read(2, "candidates", ["row", "finish_reason"])
    assert some is not None
    assert some.equals(table.select(["row", "finish_reason"]))


def test_a_finished_phase_is_read_back_and_an_unfinished_one_is_none(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    assert store.read(1, "offline") is None
    assert store.summary(1) == {}
    table = make_table({"row": [0, 1], "chosen_logp": [-1.5, -2.5], "rejected_logp": [-3, -4]})
    write_table(store.table_file(1, "offline"), table)
    store.write_summary(1, {"kept": 2})
    assert store.read(1, "offline").equals(table)  # type: ignore[union-attr]
    assert store.summary(1) == {"kept": 2}
