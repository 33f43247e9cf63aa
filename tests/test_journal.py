"""A file that only grows, and processes that die while it does."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from sera_plugin.rundir.checksums import RUN
from sera_plugin.rundir.journal import Journal, key_of
from tests.conftest import fill


def test_what_was_added_is_there_again(tmp_path):
    with Journal(tmp_path / "deep/down/journal.jsonl") as journal:
        journal.add("one", {"text": "ünïcode 🙂 \n\u2028 \ud800"})
        journal.add("two", {"n": 2})
        assert journal.get("two") == {"n": 2}
    again = Journal(tmp_path / "deep/down/journal.jsonl")
    assert again.get("one") == {"text": "ünïcode 🙂 \n\u2028 \ud800"}
    assert "two" in again
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
        assert ("two" in journal) == (cut == 1)
        journal.add("three", {"n": 3})
    assert [Journal(path).get(key) for key in ("one", "three")] == [{"n": 1}, {"n": 3}]


@pytest.mark.parametrize("line", ["", "no json", "[]", '"key"', "{}", '{"key": []}', "\x00\xff"])
def test_damaged_lines_are_passed_over(tmp_path, line):
    path = tmp_path / "journal.jsonl"
    record = json.dumps({"key": "one", "n": 1})
    path.write_text(f"{line}\n{record}\n{line}\n", encoding="latin-1")
    assert Journal(path).get("one") == {"n": 1}


def test_threads_do_not_write_into_each_others_lines(tmp_path):
    with Journal(tmp_path / "journal.jsonl") as journal, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: journal.add(str(n), {"x": "y" * 999}), range(400)))
    again = Journal(journal.path)
    assert all(str(n) in again for n in range(400))


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
        assert all(str(number) in journal for number in range(int(last) + 1))
        journal.add("mine", {})
    assert "mine" in Journal(path)


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
    keys = {key_of("ab", "c"), key_of("a", "bc"), key_of("abc"), key_of(["ab", "c"]), key_of(1)}
    assert len(keys | {key_of("1")}) == 6
