"""Files, directories and checkpoints that are whole or are not there; disks that take no more."""

import logging
import os
import subprocess
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from random import Random

import pytest

from sera_plugin.rundir.checksums import (
    SUMS,
    add_file,
    checkpoint_steps,
    damage,
    is_whole,
    named_checkpoint,
    newest_checkpoint,
    replace_directory,
    replace_file,
    seal,
    set_aside,
)
from sera_plugin.rundir.writing import write_text
from tests.conftest import fill


def write(text: str):
    return lambda path: path.write_text(text)


def test_a_file_is_whole_as_written_and_not_with_any_bit_of_it_changed(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    replace_file(path, write("what was written"))
    content = path.read_bytes()
    wrong = [content[:length] for length in range(len(content))]
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        wrong.append(bytes(flipped))
    for found in wrong:
        path.write_bytes(found)
        assert not is_whole(path)
    path.write_bytes(content)
    assert is_whole(path)
    (tmp_path / SUMS).unlink()
    assert not is_whole(path)
    assert not is_whole(tmp_path / "missing")


def test_a_person_can_check_with_the_usual_tool(tmp_path: Path) -> None:
    replace_file(tmp_path / "a.json", write("1"))
    replace_file(tmp_path / "a.json", write("2"))
    replace_file(tmp_path / "b.json", write("3"))
    replace_directory(tmp_path / "policy", lambda path: (path / "weights").write_text("w"))
    for directory in (tmp_path, tmp_path / "policy"):
        subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=directory, check=True)


@pytest.mark.parametrize("call", range(4))
def test_a_file_cut_off_anywhere_is_the_old_or_the_new_one(tmp_path, monkeypatch, call) -> None:
    """Replacing renames the list, the file and the list again; the process ends at one of them."""
    path = tmp_path / "summary.json"
    replace_file(path, write("old"))
    replace, calls = Path.replace, count()

    def killed(self: Path, target: Path) -> Path:
        if next(calls) == call:
            raise SystemExit
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(SystemExit) if call < 3 else nullcontext():
            replace_file(path, write("new"))
    assert next(calls) == min(call + 1, 3)
    assert path.read_text() == ("old" if call < 2 else "new")
    assert is_whole(path)
    replace_file(path, write("newer"))
    assert is_whole(path)
    assert (tmp_path / SUMS).read_text().count("summary.json") == 1


def test_a_directory_is_damaged_if_any_of_its_files_is(tmp_path: Path) -> None:
    directory = tmp_path / "policy"

    def files(path: Path) -> None:
        (path / "weights.safetensors").write_bytes(Random(0).randbytes(1_000))
        (path / "inner").mkdir()
        (path / "inner/config.json").write_text("{}")

    replace_directory(directory, files)
    assert damage(directory) is None
    for name in ("weights.safetensors", "inner/config.json"):
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(content[:-1])
        assert damage(directory) == f"the checksum of {name} differs"
        (directory / name).unlink()
        assert damage(directory) == f"{name} is missing"
        (directory / name).write_bytes(content)
    sums = (directory / SUMS).read_bytes()
    for length in range(len(sums) - 1):
        (directory / SUMS).write_bytes(sums[:length])
        assert damage(directory) is not None
    (directory / SUMS).unlink()
    assert damage(directory) == "it was not written to its end"
    seal(directory)
    assert damage(directory) is None


def test_what_is_cut_off_is_not_there_and_its_remains_do_no_harm(tmp_path: Path) -> None:
    def half(path: Path) -> None:
        (path / "stale" if path.is_dir() else path).write_text("x")
        raise SystemExit

    for write_half in (replace_file, replace_directory):
        with pytest.raises(SystemExit):
            write_half(tmp_path / "policy", half)
        assert list(tmp_path.iterdir()) == []
    (tmp_path / ".policy.partial").mkdir()  # a killed process cannot tidy up
    (tmp_path / ".policy.partial/stale").write_text("x")
    replace_directory(tmp_path / "policy", lambda path: (path / "fresh").write_text("y"))
    assert {path.name for path in (tmp_path / "policy").iterdir()} == {"fresh", SUMS}
    assert damage(tmp_path / "policy") is None


def test_a_full_disk_says_so_and_keeps_what_is_there(small_disk: Path) -> None:
    run = small_disk / "run"
    path = run / "offline.parquet"
    replace_file(path, write("old"))
    fill(small_disk)

    def more(into: Path) -> None:
        (into / "w" if into.is_dir() else into).write_bytes(bytes(100_000))

    for place, name in ((replace_file, "offline.parquet"), (replace_directory, "policy")):
        with pytest.raises(OSError, match=r"run takes no more files: No space.*Free some space"):
            place(run / name, more)
    with pytest.raises(OSError, match="run takes no more files"):
        add_file(run, "0.parquet", more)
    assert path.read_text() == "old"
    assert is_whole(path)
    assert sorted(found.name for found in run.iterdir()) == [SUMS, path.name]

    def serialize(into: Path) -> None:
        raise RuntimeError("unexpected pos 64 vs 0")  # what torch.save makes of it

    with pytest.raises(OSError, match="No space left"):
        replace_directory(run / "policy", serialize)
    (small_disk / "filler").unlink()
    with pytest.raises(RuntimeError, match="unexpected pos"):
        replace_directory(run / "policy", serialize)
    replace_file(path, write("new"))
    assert path.read_text() == "new"


def test_a_read_only_disk_says_so(small_disk: Path) -> None:
    replace_file(small_disk / "run.json", write("old"))
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(OSError, match=r"Read-only file system\. Make it writable, or set another"):
        replace_file(small_disk / "run.json", write("new"))
    said = r"Read-only file system\. Make it writable, or name another place, then start the same"
    with pytest.raises(OSError, match=said):
        write_text(small_disk / "page.html", "new")
    assert is_whole(small_disk / "run.json")
    assert not os.access(small_disk, os.W_OK)


def save(output: Path, step: int, sealed: bool = True) -> None:
    path = output / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(bytes([step]) * 50)
    (path / "trainer_state.json").write_text("{}")
    if sealed:
        seal(path)


def names(output: Path) -> list[str]:
    return sorted(path.name for path in output.iterdir())


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Whole checkpoints of steps 2, 9 and 10, half of one, and one of the user's."""
    for step in (2, 9, 10, 12):
        save(tmp_path / "out", step, sealed=step < 12)
    (tmp_path / "out/checkpoint-best").mkdir()
    return tmp_path / "out"


def test_the_newest_whole_one_is_taken(output: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert newest_checkpoint(output / "empty") is None
    (output / "checkpoint-11.old").mkdir()
    assert checkpoint_steps(output) == [2, 9, 10]
    assert newest_checkpoint(output) == 10
    (output / "checkpoint-10/model.safetensors").write_bytes(b"less")
    with caplog.at_level(logging.WARNING):
        assert newest_checkpoint(output) == 9
    assert "checkpoint-10 is damaged (the checksum of model.safetensors differs)" in caplog.text


def test_what_is_newer_is_out_of_the_hosts_way_and_nothing_finished_is_lost(output: Path) -> None:
    set_aside(output, 9)
    save(output, 10)
    assert (output / "checkpoint-9").exists()
    set_aside(output, 2)
    aside = ["set-aside-checkpoint-10", "set-aside-checkpoint-10.1", "set-aside-checkpoint-9"]
    assert names(output) == ["checkpoint-2", "checkpoint-best", *aside]
    set_aside(output, -1)
    assert "checkpoint-2" not in names(output)


def test_one_that_is_asked_for_is_taken_or_refused(output: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    save(other, 9)
    assert named_checkpoint(output, str(output / "checkpoint-2")) == 2
    for asked, why in (
        (other / "checkpoint-9", "is not a checkpoint in output_dir"),
        (output / "elsewhere", "is not a checkpoint in output_dir"),
        (output / "checkpoint-7", r"it does not exist. Whole checkpoints: 2, 9, 10\."),
        (output / "checkpoint-12", "it was not written to its end"),
    ):
        with pytest.raises(ValueError, match=why) as error:
            named_checkpoint(output, str(asked))
        assert f"resume_from_checkpoint: {asked}" in str(error.value)
    (output / "checkpoint-9" / SUMS).unlink()
    with pytest.raises(ValueError, match="not written to its end"):
        named_checkpoint(output, str(output / "checkpoint-9"))
