"""The script for one GPU in its smoke form on a CPU, and steps that go wrong."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks.gpu import __main__ as script
from benchmarks.gpu import precision, steps
from benchmarks.gpu.parts import cut, join
from benchmarks.gpu.runs import compared
from benchmarks.gpu.steps import STEPS, in_time, usual
from benchmarks.harness import ROOT, Setup


@pytest.fixture(scope="module", autouse=True)
def _environment():
    """As it was, after the script has set up what its steps inherit."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def run(place: Path, *steps: str) -> dict[str, dict]:
    """Lines of the smoke form on this CPU, by step."""
    arguments = ["--device", "cpu", "--smoke", "--at-once", "1", "--out", str(place)]
    assert script.main([*arguments, *(["--only", *steps] if steps else [])]) == 0
    lines = map(json.loads, (place / "steps.jsonl").read_text().splitlines())
    return {line["step"]: line for line in lines}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """All steps without a whole run of the host: their lines, and where they are."""
    place = tmp_path_factory.mktemp("smoke")
    steps = ("quantised", "scorer", "margins", "room", "sampling", "scoring")
    return run(place, *steps), place


def test_a_step_leaves_its_figures_and_its_log(smoke):
    found, place = smoke
    assert (found["large"]["ok"], found["large"]["model"]) == (True, "model-512")
    assert "large: exit 0" in (place / "logs.txt").read_text()


def test_the_scorer_is_compared_with_plain_and_training_passes_by_layout_and_type(smoke):
    found = smoke[0]["scorer"]
    assert {"float32", "bfloat16"} <= found.keys()
    for name, limit in (("float32", 1e-3), ("bfloat16", 0.5)):
        one = found[name]
        assert one["shared_lines"] > 0
        for layout in ("one_a_line", "all_logits", "shared"):
            assert one[layout]["against_naive"]["max"] < limit
            assert one[layout]["against_training"]["max"] < limit
        for batch in ("plain", "shared"):
            assert any("scaled_dot_product" in each for each in one["attention"][batch])
    assert found["bfloat16"]["naive_against_float32"]["max"] > 0


def test_margins_are_of_policies_a_few_nats_apart(smoke):
    found = smoke[0]["margins"]
    assert 1 <= found["deviation"] <= 5
    for way in ("autocast", "rounded"):
        for head in ("", "_float32_head"):
            assert 0 < found[way + head]["max"] < 0.5


def test_what_lies_on_the_device_comes_back_to_the_last_bit(smoke):
    found = smoke[0]["room"]
    for base in ("full", "nf4", "int8"):
        one = found[base]
        assert one["tensors"] > 0
        assert (one["changed"], one["same_output"]) == (0, True)
        assert one["engine"].startswith("left out")
    assert found["full"]["held_by_others"] == found["nf4"]["held_by_others"] == 0


def test_a_difference_of_one_bit_after_the_room_is_an_error(tmp_path, monkeypatch):
    from contextlib import contextmanager

    from benchmarks.gpu import room

    @contextmanager
    def careless(setup, model, optimizer):
        with made(setup, model, optimizer) as memory:
            yield memory
        weight = next(iter(optimizer.state.values()))["exp_avg"].view(torch.int32)
        weight.flatten()[3] ^= 1

    made = room.room_made
    monkeypatch.setattr(room, "room_made", careless)
    with pytest.raises(ValueError, match=r"full: it did not come back .*'changed': 1"):
        room.room(Setup("cpu", "toy", 1, 4, None, None, tmp_path))


def test_sampling_and_scoring_have_a_speed(smoke):
    found = smoke[0]
    assert {"ours_2", "ours_8", "static_2", "static_8"} <= found["sampling"].keys()
    for name in ("ours_8", "static_8"):
        assert found["sampling"][name]["tokens_per_second"] > 0
    assert len(found["scoring"]["tokens_per_second"]["ours"]) == 1
    assert 0 < found["quantised"]["int8"] < found["quantised"]["nf4"] < 0.2


def hang(*_):
    os.write(1, b"round 1/5: ours: 2.5\n")  # where a step prints
    subprocess.run(["sleep", "60"])


def fail(*_):
    subprocess.run([sys.executable, "-c", "int(0.1 + None)"])
    raise RuntimeError("its own message is above")


@pytest.mark.parametrize(
    ("work", "limit", "code", "error"),
    [(hang, 1.0, None, "out of time"), (fail, 60.0, 1, "exit 1: TypeError: unsupported")],
)
def test_a_step_that_goes_wrong_says_why(tmp_path, monkeypatch, work, limit, code, error):
    monkeypatch.setattr(steps, "fresh", lambda device: multiprocessing.get_context("fork"))
    monkeypatch.setattr(precision, "large", work)
    log = tmp_path / "log"
    assert in_time(log, limit, "large", "cpu", True, tmp_path) == code
    found = script.failure(code, log.read_text())
    assert found["error"].startswith(error)
    assert found.get("rounds") == (None if code else {"ours": ["2.5"]})
    assert "sleep" not in [each.name() for each in psutil.Process().children(recursive=True)]


def test_what_a_step_needs_is_a_step_before_it():
    groups = list(dict.fromkeys(step.group for step in STEPS.values()))
    for step in STEPS.values():
        assert set(step.needs) <= set(STEPS)
        for other in step.needs:
            assert groups.index(STEPS[other].group) <= groups.index(step.group)


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
def test_every_step_ends_in_its_smoke_form(tmp_path):
    found = run(tmp_path)
    assert found.keys() == set(usual())
    # A run in bf16 that was killed fits the same reward and keeps the same pairs.
    assert found["killed"]["there_when_killed"]
    assert [one["not_shared"] for one in found["killed"]["against_full"]] == [0, 0, 0]
    whole, killed = (found[name]["reward"] for name in ("full", "killed"))
    assert killed == whole
    assert all(one["errors"] for one in whole[1:])
    for name in ("lora_bf16", "torchrun", "fsdp_offload", "qlora"):
        assert len(found[name]["phases"]) == 2
        assert max(found[name]["step_zero"]) < 0.2
    assert "score_evaluation" in found["evaluate"]["phases"][0]
    assert set(found["step"]["steps_per_second"]) == {"sera", "dpo", "dpo_precomputed"}
    assert found["whole_run"]["imports_counted"] is False
    assert set(found["whole_run"]["seconds"]) == {"selection", "iterative", "full"}
    assert found["lora_fp16"]["left_out"]


@pytest.mark.slow
@pytest.mark.vllm
def test_vllm_answers_as_transformers_in_the_room_that_is_made(tmp_path):
    if not os.environ.get("SERA_VLLM_PYTHON"):
        pytest.skip("SERA_VLLM_PYTHON is unset: run `make test-slow`")
    found = run(tmp_path, "vllm_base", "vllm_lora")
    for name in ("vllm_base", "vllm_lora"):
        assert found[name]["same"] == found[name]["answers"] > 0
        assert found[name]["engine_seconds"]["start_engine"] > 0


def test_a_folder_is_carried_in_parts(tmp_path):
    site = tmp_path / "site"
    (site / "package" / "__pycache__").mkdir(parents=True)
    content = np.random.default_rng(0).bytes(300_000)
    (site / "package/kernels.so").write_bytes(content)
    (site / "package/needless.so").write_bytes(b"x")
    (site / "package/__pycache__/module.pyc").write_bytes(b"x")
    parts = tmp_path / "parts"
    assert cut(site, parts, ["package/need*"], size=100_000) > 3
    assert all(part.stat().st_size <= 100_000 for part in parts.iterdir())
    join(parts, tmp_path / "again")
    found = [path for path in (tmp_path / "again").rglob("*") if path.is_file()]
    assert [path.name for path in found] == ["kernels.so"]
    assert found[0].read_bytes() == content
