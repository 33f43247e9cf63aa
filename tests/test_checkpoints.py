"""Which checkpoint a run continues from."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from sera_plugin.rundir.checkpoints import named, newest, set_aside, steps
from sera_plugin.rundir.checksums import SUMS, seal


def save(output: Path, step: int, sealed: bool = True) -> Path:
    path = output / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(bytes([step]) * 50)
    (path / "trainer_state.json").write_text("{}")
    if sealed:
        seal(path)
    return path


def names(output: Path) -> list[str]:
    return sorted(path.name for path in output.iterdir())


def test_the_newest_whole_one_is_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert newest(tmp_path) is None
    for step in (2, 9, 10):
        save(tmp_path, step)
    save(tmp_path, 12, sealed=False)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-11.old").mkdir()
    assert steps(tmp_path) == [2, 9, 10]
    assert newest(tmp_path) == 10
    weights = tmp_path / "checkpoint-10/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        assert newest(tmp_path) == 9
    assert "checkpoint-10 is damaged (the checksum of model.safetensors differs)" in caplog.text


def test_what_is_newer_is_out_of_the_hosts_way_and_nothing_finished_is_lost(tmp_path: Path) -> None:
    for step in (2, 9, 10):
        save(tmp_path, step)
    save(tmp_path, 12, sealed=False)
    (tmp_path / "checkpoint-best").mkdir()
    set_aside(tmp_path, 9)
    save(tmp_path, 10)
    assert (tmp_path / "checkpoint-9").exists()
    set_aside(tmp_path, 2)
    assert names(tmp_path) == [
        "checkpoint-2", "checkpoint-best", "set-aside-checkpoint-10", "set-aside-checkpoint-10.1",
        "set-aside-checkpoint-9",
    ]  # fmt: skip
    set_aside(tmp_path, -1)
    assert "checkpoint-2" not in names(tmp_path)


def test_one_that_is_asked_for_is_taken_or_refused(tmp_path: Path) -> None:
    output, other = tmp_path / "out", tmp_path / "other"
    save(output, 2), save(output, 9), save(output, 12, sealed=False), save(other, 9)
    assert named(output, str(output / "checkpoint-2")) == 2
    for asked, why in (
        (other / "checkpoint-9", "is not a checkpoint in output_dir"),
        (output / "elsewhere", "is not a checkpoint in output_dir"),
        (output / "checkpoint-7", r"it does not exist. Whole checkpoints: 2, 9\."),
        (output / "checkpoint-12", "it was not written to its end"),
    ):
        with pytest.raises(ValueError, match=why) as error:
            named(output, str(asked))
        assert f"resume_from_checkpoint: {asked}" in str(error.value)
    (output / "checkpoint-9" / SUMS).unlink()
    with pytest.raises(ValueError, match="not written to its end"):
        named(output, str(output / "checkpoint-9"))
