"""The script for one GPU, tried out on a CPU: one quick step, and steps that go wrong."""

import json
import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.gpu import __main__ as script
from benchmarks.gpu.runs import compared


def test_a_step_leaves_its_figures_and_its_log(tmp_path, capsys):
    arguments = ["--device", "cpu", "--smoke", "--only", "large"]
    assert script.main(["--out", str(tmp_path), *arguments]) == 0
    (line,) = (tmp_path / "steps.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert (found["step"], found["ok"], found["model"]) == ("large", True, "model-512")
    assert line in capsys.readouterr().out
    assert "large: exit 0" in (tmp_path / "logs.txt").read_text()


def test_a_step_that_hangs_is_killed_and_its_rounds_are_kept(tmp_path):
    text = "import time; print('round 1/5: ours: 2.5', flush=True); time.sleep(60)"
    log = tmp_path / "log"
    assert script.in_time([sys.executable, "-c", text], log, 2.0) is None
    found = script.failure(None, log.read_text())
    assert found["rounds"] == {"ours": ["2.5"]}
    assert found["error"].startswith("out of time")


def test_a_step_that_fails_says_what_its_own_command_raised(tmp_path):
    text = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'int(0.1 + None)'])\n"
    text += "raise RuntimeError('its own message is above')"
    log = tmp_path / "log"
    assert script.in_time([sys.executable, "-c", text], log, 60.0) == 1
    assert script.failure(1, log.read_text())["error"].startswith("exit 1: TypeError: unsupported")


def test_what_a_step_needs_is_a_step_before_it():
    names = list(script.STEPS)
    groups = list(dict.fromkeys(step.group for step in script.STEPS.values()))
    for step in script.STEPS.values():
        assert set(step.needs) <= set(names)
        for other in step.needs:
            assert groups.index(script.STEPS[other].group) <= groups.index(step.group)


def test_runs_are_compared_by_the_pairs_that_they_kept(tmp_path):
    one, other = Path(__file__).with_name("run_of_format_1") / "sera", tmp_path / "sera"
    shutil.copytree(one, other)
    for number in (1, 2):
        found = compared(one, other, number)
        assert found["kept"] > 0
        assert (found["not_shared"], found["greatest_difference_nats"]) == (0, 0.0)
    path = other / "iteration-02/offline.parquet"
    table = pq.read_table(path)
    at = table.column_names.index("selected")
    others = pa.array([not kept for kept in table["selected"].to_pylist()])
    pq.write_table(table.set_column(at, "selected", others), path)
    assert compared(one, other, 2)["not_shared"] == len(table)
