"""A child process that cannot outlive us, with small scripts that speak its protocol."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import psutil
import pytest

from sera_plugin.algorithm.protocols import SamplingSettings
from sera_plugin.rundir.ranks import NO_PART
from sera_plugin.sampling import child, vllm
from sera_plugin.sampling.child import Child, ChildFailed
from sera_plugin.sampling.prompts import SamplingFailed
from sera_plugin.sampling.vllm import Memory, ServedPolicy, VllmSampler

WORKER = vllm.WORKER

#: What every script begins with: the worker's own way to read its job and to guard its group.
HEADER = f"""
import importlib.util, json, os, subprocess, sys, time
spec = importlib.util.spec_from_file_location("worker", {str(WORKER)!r})
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)
job = json.loads(sys.stdin.buffer.readline())
output = os.dup(1)
os.dup2(2, 1)
worker.guard(output)
def send(message):
    os.write(output, json.dumps(message).encode() + b"\\n")
"""


@pytest.fixture
def script(tmp_path):
    def write(body: str) -> list[str]:
        path = tmp_path / "script.py"
        path.write_text(HEADER + textwrap.dedent(body))
        return [sys.executable, str(path)]

    return write


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(child, "GRACE", 3.0)


def start(command, tmp_path, job=None) -> Child:
    return Child(command, job or {}, dict(os.environ), tmp_path / "child.log")


def gone(*pids: int) -> bool:
    """Whether processes have ended, within a few seconds."""
    until = time.monotonic() + 25
    while time.monotonic() < until:
        alive = [
            pid
            for pid in pids
            if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        ]
        if not alive:
            return True
        time.sleep(0.1)
    return False


def test_messages_come_back_and_nobody_is_left(script, tmp_path):
    command = script(
        """
        helper = subprocess.Popen(["sleep", "600"])
        print("hello from the log")
        send({"ready": job["n"], "pids": [os.getpid(), helper.pid]})
        send({"chunk": "ünïcode 你好"})
        send({"done": True})
        """
    )
    with start(command, tmp_path, {"n": 3}) as running:
        messages = list(running.messages())
    assert messages[0]["ready"] == 3
    assert messages[1] == {"chunk": "ünïcode 你好"}
    assert gone(*messages[0]["pids"])
    assert "hello from the log" in (tmp_path / "child.log").read_text()


def test_descendants_that_left_the_group_are_ended_too(script, tmp_path):
    command = script(
        """
        helper = subprocess.Popen(["sleep", "600"], start_new_session=True)
        send({"pids": [helper.pid]})
        time.sleep(600)
        """
    )
    with start(command, tmp_path) as running:
        pids = next(running.messages())["pids"]
    assert gone(*pids)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("raise RuntimeError('broken inside')", "it ended with exit code 1"),
        ("os.kill(os.getpid(), 9)", r"it was killed by SIGKILL \(often.*out of memory\)"),
        ("os.write(output, b'{\"chunk\":'); os.kill(os.getpid(), 9)", "it was killed by SIGKILL"),
        ("send({'error': 'ValueError: no'}); time.sleep(600)", "ValueError: no"),
    ],
    ids=["crash", "killed", "killed-in-mid-word", "reported"],
)
def test_a_failure_says_what_happened(script, tmp_path, body, reason):
    with (
        start(script(f"print('last words', file=sys.stderr)\n{body}"), tmp_path) as running,
        pytest.raises(ChildFailed, match=reason) as failure,
    ):
        list(running.messages())
    assert "last words" in failure.value.printed
    assert failure.value.log == tmp_path / "child.log"


def test_only_this_attempts_log_is_shown(script, tmp_path):
    (tmp_path / "child.log").write_text("an earlier attempt\n")
    with (
        start(script("print('now'); sys.exit(2)"), tmp_path) as running,
        pytest.raises(ChildFailed) as failure,
    ):
        list(running.messages())
    assert failure.value.printed.strip() == "now"
    assert "an earlier attempt" in (tmp_path / "child.log").read_text()


def test_a_child_without_progress_is_ended_however_long_it_has_run(script, tmp_path, monkeypatch):
    monkeypatch.setattr(child, "PATIENCE", 2.0)
    command = script(
        """
        for _ in range(4):  # starting: logging is a sign of life
            print("loading", flush=True)
            time.sleep(1)
        send({"ready": os.getpid()})
        for _ in range(3):
            time.sleep(1)
            send({"chunk": []})
        while True:  # no progress, and what it logs counts no more
            print("spinning", flush=True)
            time.sleep(0.5)
        """
    )
    seen = []
    with (
        start(command, tmp_path) as running,
        pytest.raises(ChildFailed, match="it hung: no progress for 2 seconds"),
    ):
        seen.extend(running.messages())
    assert len(seen) == 4
    assert gone(seen[0]["ready"])


def test_killing_the_parent_ends_the_child_and_its_descendants(script, tmp_path):
    command = script(
        """
        helper = subprocess.Popen(["sleep", "600"])
        send({"pids": [os.getpid(), helper.pid]})
        while True:
            time.sleep(600)
        """
    )
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import json, os, sys\n"
            "from pathlib import Path\n"
            "from sera_plugin.sampling.child import Child\n"
            f"log = Path({str(tmp_path / 'log')!r})\n"
            f"running = Child({command!r}, {{}}, dict(os.environ), log)\n"
            "messages = running.messages()\n"
            "print(json.dumps(next(messages)), flush=True)\n"
            "next(messages)\n",
        ],
        stdout=subprocess.PIPE,
    )
    assert parent.stdout is not None
    pids = json.loads(parent.stdout.readline())["pids"]
    assert all(map(psutil.pid_exists, pids))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert gone(*pids)


# ------------------------------------------------------------------ VllmSampler's side of it

ECHO = """
    send({"ready": {"version": "0", "weights": job["engine"]["dtype"]}})
    for row, prompt, limit, seed in job["prompts"]:
        found = [
            {"index": i, "token_ids": [prompt[0], 10 + (seed + i) % 80, 9], "finish_reason": "stop"}
            for i in range(job["sampling"]["n"])
        ]
        send({"chunk": [[row, found]]})
    send({"done": True})
"""
SETTINGS = SamplingSettings(2, 0.7, 0.95, 8, 16, (9,), seed=5)
PROMPTS = [np.arange(n, dtype=np.int32) for n in (3, 5, 1)]


@pytest.fixture
def sampler(script, tmp_path, monkeypatch):
    def make(body: str = ECHO, **options) -> VllmSampler:
        monkeypatch.setattr(vllm, "WORKER", Path(script(body)[1]))
        served = ServedPolicy("base", None, 0, "float32", None, {}, 99)
        memory = nullcontext(Memory(None, True))
        return VllmSampler(sys.executable, served, options, tmp_path / "vllm.log", lambda _: memory)

    return make


def test_candidates_belong_to_their_rows_longest_prompt_first(sampler):
    engine = sampler()
    chunks = list(engine.sample(PROMPTS, SETTINGS, skip={2}))
    assert [row for chunk in chunks for row, _ in chunk] == [1, 0]
    (_, found), *_ = chunks[1]
    seed = SETTINGS.stream(0)
    assert [(one.token_ids, one.finish_reason) for one in found] == [
        ([0, 10 + (seed + i) % 80, 9], "stop") for i in (0, 1)
    ]
    assert engine.report == {"name": "vllm", "version": "0", "weights": "float32"}
    assert engine.seconds.keys() == {"start_engine", "stop_engine"}


def test_nothing_is_started_when_nothing_is_left_to_sample(sampler):
    engine = sampler("raise SystemExit(3)")
    assert list(engine.sample(PROMPTS, SETTINGS, skip={0, 1, 2})) == []


def test_a_rank_without_an_engine_makes_room_and_starts_nothing(tmp_path):
    lengths = []

    def room(length):
        lengths.append(length)
        return nullcontext(Memory(None, True))

    served = ServedPolicy("base", None, 0, "float32", None, {}, 99)
    neighbour = VllmSampler("/no-such-python", served, {}, tmp_path / "log", room, NO_PART)
    assert list(neighbour.sample(PROMPTS, SETTINGS)) == []
    assert lengths == [13]  # the longest prompt of all ranks and what is sampled after it


def test_an_interpreter_without_vllm_is_told_apart_in_mid_run(tmp_path):
    served = ServedPolicy("base", None, 0, "float32", None, {}, 99)
    engine = VllmSampler(
        sys.executable, served, {}, tmp_path / "log", lambda _: nullcontext(Memory(None, True))
    )
    with pytest.raises(
        SamplingFailed, match=r"(?s)No module named 'vllm'.*sera\.vllm_python names"
    ):
        list(engine.sample(PROMPTS, SETTINGS))


def test_no_two_candidates_of_a_run_share_a_seed():
    seen = set()
    for seed in (42_001, 42_002):
        settings = SamplingSettings(4, 1.0, 1.0, 8, None, (9,), seed=seed)
        for row in range(500):
            seen.update(settings.stream(row) + index for index in range(4))
    assert len(seen) == 2 * 500 * 4
    assert max(seen) < 2**63


def test_stopping_in_mid_phase_leaves_no_child(sampler, tmp_path):
    body = """
        with open("pid", "w") as file:
            file.write(str(os.getpid()))
        found = [{"index": i, "token_ids": [9], "finish_reason": "stop"} for i in (0, 1)]
        send({"chunk": [[0, found]]})
        time.sleep(600)
    """
    chunks = sampler(body).sample(PROMPTS, SETTINGS)
    assert [row for row, _ in next(chunks)] == [0]
    chunks.close()
    assert gone(int((tmp_path / "pid").read_text()))


def test_a_failure_tells_what_to_change_and_that_nothing_is_lost(sampler, tmp_path):
    body = """
        print("INFO fine so far", file=sys.stderr)
        print("ValueError: Free memory on device (1.5/24 GiB) on startup is less than desired",
              file=sys.stderr)
        send({"error": "RuntimeError: Engine core initialization failed."})
    """
    with pytest.raises(SamplingFailed) as failure:
        list(sampler(body).sample(PROMPTS, SETTINGS))
    text = str(failure.value)
    assert "stopped: RuntimeError: Engine core initialization failed." in text
    assert "first error in its log: ValueError: Free memory on device" in text
    assert f"The end of {tmp_path / 'vllm.log'}:\n" in text
    assert "  | INFO fine so far" in text
    assert "vllm.gpu_memory_utilization" in text
    assert "auto_resume_from_checkpoints: true" in text


def test_an_overlong_prompt_is_named_before_anything_starts(sampler):
    with pytest.raises(ValueError, match=r"prompt of row 1 has 5 tokens.*vllm\.max_model_len"):
        list(sampler("sys.exit(1)", max_model_len=5).sample(PROMPTS, SETTINGS))


def test_engine_options_follow_the_vllm_block():
    policy = ServedPolicy("base", "adapter", 12, "bfloat16", "nf4", {"revision": "r"}, 99)
    options = {"tensor_parallel_size": 2, "enforce_eager": True, "dtype": "float16"}
    engine = VllmSampler("python", policy, options, Path("log"), lambda _: nullcontext())
    made = engine._engine(640, Memory(0.55, True, ("2", "3")))
    assert made["model"] == "base"
    assert made["max_model_len"] == 640
    assert made["max_lora_rank"] == 16
    assert made["gpu_memory_utilization"] == 0.55
    assert made["enable_prefix_caching"] is True
    assert made["revision"] == "r"
    assert {key: made[key] for key in options} == options
    assert "enforce_eager" not in VllmSampler(
        "python", policy, {}, Path("log"), lambda _: nullcontext()
    )._engine(640, Memory(0.5, True))


def test_the_child_is_no_rank_of_ours_and_reports_to_nobody(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID",
                 "ACCELERATE_USE_FSDP", "GROUP_RANK", "PYTHONPATH"):  # fmt: skip
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", "kept")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    environment = vllm.child_environment("elsewhere/python", ("2", "3"))
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID",
                "ACCELERATE_USE_FSDP", "GROUP_RANK", "PYTHONPATH"} & environment.keys()  # fmt: skip
    assert environment["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert environment["HF_HOME"] == "kept"
    assert environment["VLLM_NO_USAGE_STATS"] == environment["DO_NOT_TRACK"] == "1"
    assert vllm.child_environment(sys.executable)["PYTHONPATH"] == "1"


@pytest.mark.parametrize(
    ("row", "ids", "words"),
    [(0, [98, 9], None), (0, [99, 9], "row 0 wrongly.*vocabulary"), (3, [9], "row 3 .*waiting")],
)
def test_an_answer_is_found_by_its_row_and_checked(sampler, row, ids, words):
    choice = {"token_ids": ids, "finish_reason": "stop"}
    body = f"""
        send({{"chunk": [[{row}, [{choice} | {{"index": i}} for i in (1, 0)]]]}})
        send({{"done": True}})
    """
    chunks = sampler(body).sample(PROMPTS, SETTINGS)
    if words is None:
        assert [found[0][0] for found in chunks] == [0]
    else:
        with pytest.raises(SamplingFailed, match=words):
            next(chunks)
