"""The run directory's tables and chunks, and journals that only grow while processes die."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sera_plugin.rundir import tables
from sera_plugin.rundir.format import Ending, Invalid, Keys, RunFile, _Reward, read_json
from sera_plugin.rundir.journal import Journal, key_of
from sera_plugin.rundir.store import RunStore, make_table, write_json
from sera_plugin.rundir.tables import Expected, read_table
from sera_plugin.rundir.writing import RUN
from tests.conftest import fill

LISTS = pa.list_(pa.int32())


def samples(*rows: int) -> pa.Table:
    """Two candidates a row; row and candidate are the tokens."""
    flat = [[row, index] for row in rows for index in (0, 1)]
    columns = {"row": [row for row, _ in flat], "candidate": [index for _, index in flat]}
    return make_table(columns | {"token_ids": flat, "finish_reason": ["stop"] * len(flat)})


def sampled_rows(store: RunStore) -> list[int]:
    """The rows of the chunks of iteration 2."""
    return sorted({row for chunk in store.chunks(2) for row in chunk["row"].to_pylist()})


def test_a_partial_file_of_a_killed_run_is_no_phase(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    store.append_samples(2, samples(0))
    left = store.table_file(2, "offline").with_name(".offline.parquet.partial")
    left.write_bytes(b"half a file")
    (store.samples(2) / ".000001.parquet.partial").write_bytes(b"half a file")
    assert store.read(2, "offline") is None
    assert sampled_rows(store) == [0]
    store.append_samples(2, samples(1))
    store.remove_samples(2)
    assert not store.samples(2).exists()


def test_json_is_sorted_readable_and_refuses_nan(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "run.json"
    write_json(path, {"b": 1, "a": "größer"})
    assert path.read_text(encoding="utf-8") == '{\n  "a": "größer",\n  "b": 1\n}\n'
    assert read_json(path) == {"a": "größer", "b": 1}
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"a": float("nan")})


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
    # Token ids may come as arrays, and other columns keep their type.
    lists, scores = [np.asarray([1, 2], dtype=np.int64), []], pa.array([0.5, 1.5], pa.float32())
    table = make_table({"chosen_ids": lists, "score": scores})
    assert table["chosen_ids"].to_pylist() == [[1, 2], []]
    assert [field.type for field in table.schema] == [LISTS, pa.float32()]


def test_chunks_are_read_one_by_one_counted_once_and_removed(tmp_path, monkeypatch) -> None:
    """Listing the directory for every chunk would take as many steps as chunks squared."""
    assert sampled_rows(RunStore(tmp_path)) == []
    RunStore(tmp_path).append_samples(2, samples(7))
    store = RunStore(tmp_path)
    store.append_samples(2, samples(5, 1))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "glob", lambda *_: pytest.fail("counted again"))
        store.append_samples(2, samples(3))
    found = sorted(store.chunks(2), key=lambda chunk: chunk["row"][0].as_py())
    assert all(map(pa.Table.equals, found, (samples(3), samples(5, 1), samples(7))))
    names = sorted(path.name[:10] for path in store.samples(2).iterdir())
    assert names == ["000-000000", "000-000001", "000-000002"]
    for _ in range(2):
        store.remove_samples(2)
        assert sampled_rows(store) == []
    assert not store.samples(2).exists()


def test_a_finished_phase_is_read_back_and_an_unfinished_one_is_none(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    assert store.read(1, "offline") is None
    assert store.summary(1) == {}
    places = (store.run_file, store.dataset_file, store.policy(1), store.table_file(12, "offline"))
    names = ("run.json", "dataset.parquet", "iteration-01/policy", "iteration-12/offline.parquet")
    assert places == tuple(tmp_path / "sera" / name for name in names)
    columns = {"row": [0, 1], "chosen_length": [2, 3], "rejected_length": [1, 1]}
    columns["prompt_length"] = [1, 1]
    table = make_table(columns | {"chosen_logp": [-1.5, -2.5], "rejected_logp": [-3, -4]})
    store.write(1, "offline", table)
    assert store.read(1, "offline").equals(table)


def test_a_whole_file_of_another_kind_is_not_used_and_said(tmp_path, caplog):
    store = RunStore(tmp_path)
    store.write(1, "offline", make_table({"row": [0, 2], "chosen_logp": [0.0, 1.0]}))
    store.write_summary(1, {"kept": 2})
    for _ in range(2):
        assert store.read(1, "offline") is None
        assert store.summary(1) == {}
    said = [one.partition("sera/")[2] for one in caplog.messages]
    assert said == [
        "iteration-01/offline.parquet cannot be used (it has no column chosen_length, "
        "rejected_length, rejected_logp, prompt_length)",
        "iteration-01/summary.json cannot be used (iteration is {'kept': 2}: field required)",
    ]


REWARD = {"weights": {"length": 0.0}, "accuracy": 0.5, "paper_accuracy": 0.5, "by_chance": 0.5}
#: Kind of file, what is right in it, and what of that cannot be; `...` is a key that is left out.
KEYS: list[tuple[type[Keys], dict[str, Any], dict[str, Any]]] = [
    (RunFile, {"format_version": 1, "config": {"num_epochs": 2}}, {"config": {}}),
    (RunFile, {"format_version": 1, "config": {"num_epochs": 2}}, {"config": {"num_epochs": None}}),
    (
        RunFile,
        {"format_version": 1, "config": {"num_epochs": 2}},
        {"config": {"num_epochs": 2, "sera": {"judge": 5}}},
    ),
    *(
        (Ending, {"policies": 1, "kept": 0, "held_out_losses": [0.7, None]}, wrong)
        for wrong in ({"held_out_losses": ...}, {"held_out_losses": []}, {"policies": 2})
    ),
    *(
        (_Reward, REWARD | {"errors": {"length": 0.1}}, {name: value})
        for name in ("accuracy", "paper_accuracy", "by_chance", "weights")
        for value in (None, ...)
    ),
    (_Reward, REWARD, {"errors": {"theta_1": 0.1}}),
    (_Reward, REWARD, {"errors": None}),
    (_Reward, REWARD, {"followed": None}),
]


@pytest.mark.parametrize(("kind", "right", "wrong"), KEYS)
def test_keys_that_belong_together_are_asked_for(tmp_path, kind, right, wrong):
    write_json(tmp_path / "right", right)
    assert read_json(tmp_path / "right", kind) == right
    content = {key: one for key, one in {**right, **wrong}.items() if one is not ...}
    write_json(tmp_path / "wrong", content)
    with pytest.raises(Invalid):
        read_json(tmp_path / "wrong", kind)


def twice(kind: pa.DataType, value: object) -> pa.Array:
    return pa.array([value] * 2, kind)


TWO_FIELDS = pa.struct([("a", pa.int64()), ("a", pa.int64())])
BESIDE = {
    "text in lists in structs": (pa.array([{"a": [["x"], None], "b": 1.5}] * 2), "is read"),
    "numbers of two bytes": (twice(pa.float16(), np.float16(1)), "is read"),
    "times": (twice(pa.timestamp("s"), 0), "is passed over"),
    "times in lists": (twice(pa.list_(pa.timestamp("s", "Mars/Base")), [0]), "is passed over"),
    "bytes in lists": (twice(pa.list_(pa.binary()), [b"\xff"]), "is passed over"),
    "two fields of one name": (
        pa.StructArray.from_arrays([pa.array([1, 2])] * 2, fields=list(TWO_FIELDS)),
        "is passed over",
    ),
    "text that is none": (
        pa.array([b"\xff"] * 2).view(pa.string()), "it cannot be read .*Invalid UTF8"
    ),
    "much in little": (pa.array(["x" * 2**21] * 2), "has 4,194,304 bytes of text, more than can"),
    "much in little, in lists": (pa.array([["x" * 2**21]] * 2), "4,194,304 bytes of text"),
}  # fmt: skip


@pytest.mark.parametrize("what", BESIDE)
def test_what_a_dataset_has_beside_is_plain_valid_and_no_more_than_its_file_can_mean(
    tmp_path, monkeypatch, what
):
    monkeypatch.setattr(tables, "_SOME_TEXT", 2**21)
    values, expected = BESIDE[what]
    ids = [[1], [2, 3]]
    pairs = make_table({"row": [0, 1], "prompt_ids": ids, "chosen_ids": ids, "rejected_ids": ids})
    path = tmp_path / "dataset.parquet"
    # As others write it: what arrow knows of types is not in the file.
    table = pairs.append_column("x", values)
    pq.write_table(table, path, compression="zstd", store_schema=what == "two fields of one name")
    if expected.startswith("is "):
        found = read_table(path, "dataset", Expected(), beside=True)
        assert found.equals(table if expected == "is read" else pairs)
    else:
        with pytest.raises(Invalid, match=expected):
            read_table(path, "dataset", Expected(), beside=True)


def test_a_chunk_that_stands_for_more_than_its_file_can_mean_is_set_aside(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(tables, "_SOME_TEXT", 2**20)
    monkeypatch.setattr(tables, "_TIMES", 100)
    store = RunStore(tmp_path)
    chunk = samples(0)
    store.append_samples(2, chunk.set_column(3, "finish_reason", [["x" * 2**20] * 2]))
    store.set_aside_samples(2, lambda _: None)
    assert "is set aside and made again: it has 2,097,152 bytes of text" in caplog.text
    assert sampled_rows(store) == []


def test_what_was_added_is_there_again(tmp_path):
    with Journal(tmp_path / "deep/down/journal.jsonl") as journal:
        journal.add("one", {"text": "ünïcode 🙂 \n\u2028 \ud800"})
        journal.add("two", {"n": 2})
        assert journal.get("two") == {"n": 2}
    again = Journal(tmp_path / "deep/down/journal.jsonl")
    assert again.get("one") == {"text": "ünïcode 🙂 \n\u2028 \ud800"}
    assert again.get("two") == {"n": 2}
    assert again.get("three") is None
    assert all(map(str.isascii, again.path.read_text().splitlines()))


@pytest.mark.parametrize("cut", [1, 2, 9, 23])
def test_a_line_that_a_process_died_in_is_passed_over(tmp_path, cut):
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.add("one", {"n": 1})
        journal.add("two", {"n": 2})
    path.write_bytes(path.read_bytes()[:-cut])
    with Journal(path) as journal:
        assert journal.get("one") == {"n": 1}
        # Without its last byte, the end of the line, a record is still whole.
        assert (journal.get("two") is not None) == (cut == 1)
        journal.add("three", {"n": 3})
    assert [Journal(path).get(key) for key in ("one", "three")] == [{"n": 1}, {"n": 3}]


def test_damaged_lines_are_passed_over(tmp_path):
    path = tmp_path / "journal.jsonl"
    bad = ["", "no json", "[]", '"key"', "{}", '{"key": []}', "\x00\xff"]
    lines = [*bad, '{"key": "one", "n": 1}', *bad]
    path.write_text("\n".join(lines), encoding="latin-1")
    assert Journal(path).get("one") == {"n": 1}


def test_a_line_in_which_anything_was_changed_is_not_used_and_named(tmp_path, caplog):
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        for number in range(3):
            journal.add(f"key {number}", {"text": "[[A]]", "tokens": number})
    whole = path.read_bytes()
    lines = whole.splitlines()
    sums = whole.index(b', "sha256"'), len(lines[0]) - 18
    for place in range(len(lines[0])):
        changed = bytearray(whole)
        changed[place] ^= 3
        path.write_bytes(changed)
        caplog.clear()
        found = [Journal(path).get(f"key {number}") for number in range(3)]
        assert found[1:] == [{"text": "[[A]]", "tokens": number} for number in (1, 2)]
        if not sums[0] <= place < sums[1]:  # the name of the checksum says nothing of the record
            assert found[0] is None, place
            assert f"{path}: 1 line(s) are damaged and not used (1)" in caplog.text
        else:
            assert found[0] is None or found[0]["text"] == "[[A]]", place


def test_lines_of_an_earlier_version_have_no_checksum(tmp_path, caplog):
    path = tmp_path / "journal.jsonl"
    path.write_text('{"key": "one", "n": 1}\n')
    with Journal(path) as journal:
        journal.add("two", {"n": 2})
    path.write_text(path.read_text() + '{"key": "three", "n": 3}\n')
    found = Journal(path)
    assert [found.get(key, n=int) for key in ("one", "two", "three")] == [{"n": 1}, {"n": 2}, None]
    assert found.get("one", n=str) is None
    assert "(3)" in caplog.text


def test_threads_do_not_write_into_each_others_lines(tmp_path):
    with Journal(tmp_path / "journal.jsonl") as journal, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: journal.add(str(n), {"x": "y" * 999}), range(400)))
    again = Journal(journal.path)
    assert all(again.get(str(n)) == {"x": "y" * 999} for n in range(400))


HOLD = """
import sys, time
from pathlib import Path
from sera_plugin.rundir.journal import Journal
journal = Journal(Path(sys.argv[1]))
for number in range(10**9):
    journal.add(str(number), {"text": "x" * 5000})
    print(number, flush=True)
"""


def test_one_process_writes_at_a_time_and_a_killed_one_holds_nobody_up(tmp_path):
    path = tmp_path / "journal.jsonl"
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        for _ in range(20):
            last = other.stdout.readline()
        with pytest.raises(ValueError, match="is being written by another process"):
            Journal(path).add("mine", {})
        other.kill()
        last = (other.stdout.read().split() or [last])[-1]
    with Journal(path) as journal:
        assert all(journal.get(str(number)) is not None for number in range(int(last) + 1))
        journal.add("mine", {})
    assert Journal(path).get("mine") is not None


def test_a_full_disk_is_named_and_what_was_written_stays(small_disk):
    with Journal(small_disk / "journal.jsonl") as journal:
        journal.add("one", {"n": 1})
        fill(small_disk)
        with pytest.raises(OSError, match=r"takes no more files: No space left.*same command"):
            journal.add("more", {"text": "x" * 50_000})
        (small_disk / "filler").unlink()
        journal.add("two", {"n": 2})
        fill(small_disk)
        with (
            Journal(small_disk / "of-a-run.jsonl", RUN) as another,
            pytest.raises(OSError, match=r"continue the run with `auto_resume_from_checkpoints"),
        ):
            another.add("more", {"text": "x" * 50_000})
    again = Journal(journal.path)
    assert [again.get(key) for key in ("one", "two")] == [{"n": 1}, {"n": 2}]


def test_a_key_tells_apart_what_differs_and_nothing_else():
    assert key_of("a", {"x": 1, "y": 2}) == key_of("a", {"y": 2, "x": 1})
    different = [("ab", "c"), ("a", "bc"), ("abc",), (["ab", "c"],), (1,), ("1",)]
    assert len({key_of(*parts) for parts in different}) == 6
