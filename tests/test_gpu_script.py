"""The script for one GPU, tried out on a CPU: one quick step, and steps that go wrong."""

import json
import sys

from benchmarks.gpu import __main__ as script


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
