"""The script for one GPU, tried out on a CPU: one quick step, and steps that go wrong."""

import json
import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.gpu import __main__ as script
from benchmarks.gpu.runs import compared
from benchmarks.harness import ROOT


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


def test_the_page_says_what_was_measured():
    lines = (ROOT / "benchmarks/results/gpu/h200.jsonl").read_text().splitlines()
    steps = {one.get("step"): one for one in map(json.loads, lines)}
    said = " ".join((ROOT / "docs/benchmarks.md").read_text().split())
    failed = {name for name, one in steps.items() if name and not one["ok"]}
    assert failed == {"scoring", "step"}
    assert "speed of scoring and training (time ran out)" in said
    for one in steps["killed"]["against_full"]:
        assert (one["not_shared"], one["greatest_difference_nats"]) == (0, 0.0)
    low = steps["scorer"]["bfloat16"]
    alone, shared = (low[name]["against_naive"] for name in ("one_a_line", "shared"))
    assert f"is {alone['mean']:.3f} nats a sequence" in said
    assert f"(at most {alone['max']:.2f}), shared prompts {shared['mean']:.2f} (at most" in said
    assert f"shared prompts {shared['mean']:.2f} (at most {shared['max']:.1f})" in said
    naive = low["naive_against_float32"]
    assert f"in bf16 is {naive['mean']:.2f} (at most {naive['max']:.2f}) from float32" in said
    tokens = steps["scorer"]["tokens"] / steps["scorer"]["sequences"]
    assert f"Answers have {tokens:.0f} tokens on average" in said
    speed = {n: steps["sampling"][f"batch_{n}"]["tokens_per_second"] for n in (8, 32, 128)}
    assert f"{speed[8]:.0f} tokens a second for 8 prompts, {speed[32]:.0f} for 32" in said
    assert f"{speed[128]:,.0f} for 128" in said
    assert f"moved by {steps['margins']['deviation']:.0f} nats" in said


@pytest.mark.slow
@pytest.mark.nightly
def test_a_run_in_bf16_that_was_killed_fits_the_same_reward_and_keeps_the_same_pairs(tmp_path):
    arguments = ["--device", "cpu", "--smoke", "--only", "killed", "--at-once", "1"]
    assert script.main([*arguments, "--out", str(tmp_path)]) == 0
    steps = map(json.loads, (tmp_path / "steps.jsonl").read_text().splitlines())
    found = {one["step"]: one for one in steps}
    assert found["killed"]["there_when_killed"]
    assert [one["not_shared"] for one in found["killed"]["against_full"]] == [0, 0, 0]
    whole, killed = (found[name]["reward"] for name in ("full", "killed"))
    assert killed == whole
    assert all(one["errors"] for one in whole[1:])
