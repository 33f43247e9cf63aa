"""The run directory: whole files, exact tokens, a fingerprint that means what it says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from sera_plugin.rundir.store import RunStore, make_table, read_json, write_json

LISTS = pa.list_(pa.int32())


def samples(rows: list[int], tokens: int = 1) -> pa.Table:
    flat = [(row, index) for row in rows for index in (0, 1)]
    return make_table(
        {
            "row": [row for row, _ in flat],
            "candidate": [index for _, index in flat],
            "token_ids": [[row, index][:tokens] for row, index in flat],
            "finish_reason": ["stop"] * len(flat),
        }
    )


def test_a_partial_file_of_a_killed_run_is_no_phase(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    store.append_samples(2, samples([0]))
    left = store.table_file(2, "offline").with_name(".offline.parquet.partial")
    left.write_bytes(b"half a file")
    (store.samples(2) / ".000001.parquet.partial").write_bytes(b"half a file")
    assert store.read(2, "offline") is None
    assert store.read_samples(2)["row"].to_pylist() == [0, 0]
    store.append_samples(2, samples([1]))
    store.remove_samples(2)
    assert not store.samples(2).exists()


def test_json_is_sorted_readable_and_refuses_nan(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "run.json"
    write_json(path, {"b": 1, "a": "größer"})
    assert path.read_text(encoding="utf-8") == '{\n  "a": "größer",\n  "b": 1\n}\n'
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert read_json(path) == {"a": "größer", "b": 1}


def test_column_types_are_the_public_formats() -> None:
    """docs/run-directory.md, column by column."""
    kinds = {
        pa.int64(): "row",
        LISTS: "prompt_ids chosen_ids rejected_ids token_ids",
        pa.int32(): "prompt_length chosen_length rejected_length candidate chosen_candidate "
        "rejected_candidate",
        pa.float64(): "chosen_logp rejected_logp chosen_reward rejected_reward margin reward "
        "priority",
        pa.bool_(): "selected swapped",
        pa.string(): "finish_reason",
        pa.list_(pa.float64()): "logps",
    }
    expected = {name: kind for kind, names in kinds.items() for name in names.split()}
    empty = make_table({name: [] for name in expected})
    assert {field.name: field.type for field in empty.schema} == expected


def test_token_ids_may_come_as_arrays_and_other_columns_keep_their_type() -> None:
    columns = {"chosen_ids": [np.asarray([1, 2], dtype=np.int64), []], "score": [0.5, 1.5]}
    table = make_table(columns)
    assert table["chosen_ids"].to_pylist() == [[1, 2], []]
    assert [field.type for field in table.schema] == [LISTS, pa.float64()]


def test_places_are_the_public_formats(tmp_path: Path) -> None:
    store, root = RunStore(tmp_path), tmp_path / "sera"
    assert (store.run_file, store.dataset_file) == (root / "run.json", root / "dataset.parquet")
    assert store.policy(1) == root / "iteration-01" / "policy"
    assert store.table_file(12, "offline") == root / "iteration-12" / "offline.parquet"


def test_finished_chunks_are_read_in_order_and_removed(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    assert store.read_samples(2) is None
    store.append_samples(2, samples([5, 1], tokens=2))
    store.append_samples(2, samples([3], tokens=2))
    found = store.read_samples(2).to_pydict()
    keys = list(zip(found["row"], found["candidate"], strict=True))
    assert keys == [(1, 0), (1, 1), (3, 0), (3, 1), (5, 0), (5, 1)]
    assert found["token_ids"] == [list(key) for key in keys]
    assert store.read_samples(3) is None
    for _ in range(2):
        store.remove_samples(2)
        assert store.read_samples(2) is None
    assert not store.samples(2).exists()


def test_chunks_are_counted_once_and_rows_read_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Listing the directory for every chunk would take as many steps as chunks squared."""
    RunStore(tmp_path).append_samples(2, samples([7]))
    store = RunStore(tmp_path)
    assert store.sampled_rows(3).tolist() == []
    store.append_samples(2, samples([5, 1]))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "glob", lambda *_: pytest.fail("counted again"))
        store.append_samples(2, samples([3]))
    assert store.sampled_rows(2).tolist() == [1, 3, 5, 7]
    names = sorted(path.name[:10] for path in store.samples(2).iterdir())
    assert names == ["000-000000", "000-000001", "000-000002"]


def test_a_finished_phase_is_read_back_and_an_unfinished_one_is_none(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    assert store.read(1, "offline") is None
    assert store.summary(1) == {}
    table = make_table({"row": [0, 1], "chosen_logp": [-1.5, -2.5], "rejected_logp": [-3, -4]})
    store.write(1, "offline", table)
    store.write_summary(1, {"kept": 2})
    assert store.read(1, "offline").equals(table)
    assert store.summary(1) == {"kept": 2}
