"""A child process that cannot outlive us, and sampling from a stand-in for vLLM that is one."""

import os
import subprocess
import sys
import textwrap
import time
from contextlib import closing, nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from sera_plugin.algorithm.method import Candidate, SamplingSettings
from sera_plugin.rundir.ranks import NO_PART
from sera_plugin.sampling import child, vllm
from sera_plugin.sampling.child import Child, ChildFailed, SamplingFailed
from sera_plugin.sampling.vllm import Memory, ServedPolicy, VllmSampler

HELPER = "import os, subprocess, time; helper = subprocess.Popen(['sleep', '600'], **{})\n"
#: Writes who is there, whole or not at all, and goes on.
PIDS = "open('new', 'w').write(f'{os.getpid()} {helper.pid}'); os.rename('new', 'pids')\n"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(child, "GRACE", 3.0)


def start(body: str, directory: Path) -> closing[Child]:
    return closing(Child([sys.executable, "-c", body], os.environ, directory / "child.log"))


def pids(directory: Path) -> list[int]:
    """Those that a child has written, once it has."""
    until = time.monotonic() + 60
    while not (directory / "pids").exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    return [int(pid) for pid in (directory / "pids").read_text().split()]


def alive(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def gone(*pids: int) -> bool:
    """Whether processes have ended, within a few seconds."""
    until = time.monotonic() + 25
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.1)
    return not any(map(alive, pids))


#: Ignores a polite request, and has shared memory as an engine has.
STUBBORN = (
    "import signal; from multiprocessing.shared_memory import SharedMemory\n"
    "kept = SharedMemory(create=True, size=1024); open('segment', 'w').write(kept.name)\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
)


@pytest.mark.parametrize("body", ["", STUBBORN])
@pytest.mark.parametrize("how", ["{}", "{'start_new_session': True}"])
def test_descendants_and_what_they_shared_are_gone_with_the_child(tmp_path, how, body):
    with start(body + HELPER.format(how) + PIDS + "time.sleep(600)", tmp_path) as running:
        family = pids(tmp_path)
        running.check(lambda: None)
    assert not any(map(alive, family))
    if body:
        assert not Path("/dev/shm", (tmp_path / "segment").read_text()).exists()


def test_a_child_whose_lifeline_was_killed_is_ended_all_the_same(tmp_path):
    with start(HELPER.format("{}") + PIDS + "time.sleep(600)", tmp_path) as running:
        family = pids(tmp_path)
        running._process.kill()
        running._process.wait()
        with pytest.raises(ChildFailed, match="it was killed by SIGKILL"):
            running.check(lambda: None)
    assert gone(*family)


def test_killing_the_parent_ends_the_child_and_its_descendants(tmp_path):
    body = HELPER.format("{}") + PIDS + "time.sleep(600)"
    script = (
        "import os, sys, time\nfrom pathlib import Path\n"
        "from sera_plugin.sampling.child import Child\n"
        f"running = Child([sys.executable, '-c', {body!r}], dict(os.environ), "
        f"Path({str(tmp_path / 'log')!r}))\ntime.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script])
    family = pids(tmp_path)
    assert all(map(alive, family))
    parent.kill()
    parent.wait()
    assert gone(*family)


STAND_IN = """
import os, subprocess, sys, time
from http.server import ThreadingHTTPServer
from tests.servers import Vllm, choices

options = dict(flag[2:].split("=", 1) for flag in sys.argv[1:] if "=" in flag)
helper = subprocess.Popen(["sleep", "600"])
"""
SERVE = """
ThreadingHTTPServer((options["host"], int(options["port"])), Vllm).serve_forever()
"""
SETTINGS = SamplingSettings(2, 0.7, 0.95, 8, 16, (2,), seed=5)
PROMPTS = [np.arange(n, dtype=np.int32) for n in (3, 5, 1)]
SERVED = ServedPolicy("base", None, 0, "float32", None, {}, 99)


def room_for_all(length: int):
    return nullcontext(Memory(None, True))


@pytest.fixture
def sampler(tmp_path, monkeypatch):
    """With a stand-in server, changed by some code before it listens."""

    def make(change: str = "", **options) -> VllmSampler:
        script = f"{STAND_IN}{PIDS}{textwrap.dedent(change)}{SERVE}"
        (tmp_path / "stand_in.py").write_text(script)
        monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
        monkeypatch.setattr(vllm, "SERVER", "stand_in")
        log = tmp_path / "vllm.log"
        return VllmSampler(sys.executable, SERVED, options, log, room_for_all)

    return make


def test_candidates_belong_to_their_rows_and_nobody_is_left(sampler, tmp_path):
    engine = sampler()
    found = [one for chunk in engine.sample(PROMPTS, SETTINGS, skip={2}) for one in chunk]
    assert sorted(row for row, _ in found) == [0, 1]
    for row, candidates in found:
        tokens = [5 + (SETTINGS.stream(row) + i) % 30 for i in (0, 1)]
        assert candidates == [Candidate([token, 2], "stop") for token in tokens]
    # It was asked with the key that it was started with.
    assert engine.report == {"name": "vllm", "version": "1 Bearer ***", "weights": "float32"}
    assert engine.seconds.keys() == {"start_engine", "stop_engine"}
    assert gone(*pids(tmp_path))


def test_a_slow_answer_is_waited_for_while_tokens_are_sampled(sampler, monkeypatch, caplog):
    """However long one takes; and waiting for the start fills no log with failed tries."""
    monkeypatch.setattr(child, "PATIENCE", 2.0)
    change = """
        time.sleep(3)
        Vllm.choices = lambda self, request: time.sleep(5) or choices(request)
        Vllm.metrics = lambda self: f"vllm:generation_tokens_total {time.time()}"
    """
    monkeypatch.setattr(Child, "log_size", lambda self: time.monotonic())
    assert len(list(sampler(change).sample(PROMPTS, SETTINGS))) > 0
    assert "Retrying" not in caplog.text


def test_nothing_is_started_when_nothing_is_left_or_a_prompt_has_no_room(sampler):
    engine = sampler("raise SystemExit(3)", max_model_len=5)
    assert list(engine.sample(PROMPTS[::2], SETTINGS, skip={0, 1})) == []
    with pytest.raises(ValueError, match=r"prompt of row 1 has 5 tokens.*vllm\.max_model_len"):
        list(engine.sample(PROMPTS, SETTINGS))


def test_a_rank_without_an_engine_makes_room_and_starts_nothing(tmp_path):
    lengths = []

    def room(length):
        lengths.append(length)
        return room_for_all(length)

    neighbour = VllmSampler("/no-such-python", SERVED, {}, tmp_path / "log", room, NO_PART)
    assert list(neighbour.sample(PROMPTS, SETTINGS)) == []
    assert lengths == [13]  # the longest prompt of all ranks and what is sampled after it


def test_no_two_candidates_of_a_run_share_a_seed():
    settings = [replace(SETTINGS, candidates=4, seed=seed) for seed in (42_001, 42_002)]
    seen = {how.stream(row) + i for how in settings for row in range(500) for i in range(4)}
    assert len(seen) == 2 * 500 * 4
    assert max(seen) < 2**63


def test_stopping_in_mid_phase_leaves_no_child(sampler, tmp_path, monkeypatch):
    monkeypatch.setattr("sera_plugin.sampling.engine.CHUNK_PROMPTS", 1)
    monkeypatch.setattr("sera_plugin.sampling.engine.IN_FLIGHT", 1)
    chunks = sampler().sample(PROMPTS, SETTINGS)
    # The longest prompts come first.
    assert [row for _ in range(2) for row, _ in next(chunks)] == [1, 0]
    chunks.close()
    assert gone(*pids(tmp_path))


ENDINGS = {
    "while it starts": (
        "print('ValueError: Free memory on device (1.5/24 GiB) is less than desired')\nsys.exit(4)",
        ("it ended with exit code 4", "first error in its log: ValueError: Free memory on device",
         "  | ValueError: Free", "vllm.gpu_memory_utilization"),
    ),
    "while it samples": (
        "Vllm.choices = lambda *_: print('last words', flush=True) or os.kill(os.getpid(), 9)",
        ("it was killed by SIGKILL", "  | last words", "something outside killed it"),
    ),
    "hung": (
        "Vllm.choices = lambda *_: time.sleep(600)",
        ("it hung: no progress for 3 seconds", "vllm.enforce_eager: true"),
    ),
    "without vLLM": (
        None,
        ("it ended with exit code 1", "No module named 'vllm'", "sera.vllm_python names"),
    ),
    "a wrong answer": (
        "Vllm.choices = lambda *_: []",
        ("answers the prompt of row", "Nothing of it is stored", "The end of"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_failure_says_what_to_change_and_that_nothing_is_lost(
    sampler, tmp_path, monkeypatch, ending
):
    change, words = ENDINGS[ending]
    if ending == "hung":
        monkeypatch.setattr(child, "PATIENCE", 3.0)
    monkeypatch.setattr(vllm, "_ENDS_WITHIN", 1.0)
    (tmp_path / "vllm.log").write_text("an earlier attempt\n")
    engine = sampler(change or "")
    if change is None:
        monkeypatch.setattr(vllm, "SERVER", "vllm.entrypoints.openai.api_server")
    with pytest.raises(SamplingFailed) as failure:
        list(engine.sample(PROMPTS, SETTINGS))
    text = str(failure.value)
    assert all(word in text for word in words), text
    assert f"The end of {tmp_path / 'vllm.log'}:\n" in text
    assert "an earlier attempt" not in text
    assert (tmp_path / "vllm.log").read_text().startswith("an earlier attempt\n")
    assert "auto_resume_from_checkpoints: true" in text
    if (tmp_path / "pids").exists():
        assert gone(*pids(tmp_path))


def test_an_engine_gets_what_the_policy_needs_and_the_vllm_block_says():
    policy = ServedPolicy("base", "adapter", 12, "bfloat16", "nf4", {"revision": "r"}, 99)
    options = {"tensor_parallel_size": 2, "enforce_eager": True, "dtype": "float16"}
    engine = VllmSampler("python", policy, options, Path("log"), room_for_all)
    made = engine._engine(640, Memory(0.55, True, ("2", "3")), "bfloat16")
    expected = {"model": "base", "max_model_len": 640, "max_lora_rank": 16, "revision": "r"}
    expected |= {"lora_modules": {"name": "policy", "path": "adapter"}, **options}
    expected |= {"gpu_memory_utilization": 0.55, "enable_prefix_caching": True}
    assert made.items() >= expected.items()
    assert "quantization" not in made
    plain = VllmSampler("python", policy, {}, Path("log"), room_for_all)
    made = plain._engine(640, Memory(0.5, True), "bitsandbytes nf4")
    assert made["quantization"] == "bitsandbytes"
    assert "enforce_eager" not in made
    options = {"max_model_len": 640, "enforce_eager": True, "enable_chunked_prefill": False}
    assert [vllm._flag(*item) for item in {**options, "hf_overrides": {"a": [1]}}.items()] == [
        "--max-model-len=640", "--enforce-eager", "--no-enable-chunked-prefill",
        '--hf-overrides={"a": [1]}',
    ]  # fmt: skip


def test_four_bit_weights_that_neither_load_nor_fit_are_refused(monkeypatch):
    policy = ServedPolicy("base", None, 0, "bfloat16", "nf4", {}, 99)
    engine = VllmSampler("python", policy, {}, Path("log"), room_for_all)
    monkeypatch.setattr(vllm, "serves_four_bit", lambda python: True)
    assert engine._weights(Memory(0.5, False)) == "bitsandbytes nf4"
    monkeypatch.setattr(vllm, "serves_four_bit", lambda python: False)
    assert engine._weights(Memory(0.5, True)) == "bfloat16"
    with pytest.raises(SamplingFailed, match=r"in nf4, and in bfloat16 it does not fit.*Install"):
        engine._weights(Memory(0.5, False))


def test_the_child_is_no_rank_of_ours_and_reports_to_nobody(monkeypatch):
    ours = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "GROUP_RANK",
            "ACCELERATE_USE_FSDP", "PYTHONPATH", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF",
            "OMP_NUM_THREADS"}  # fmt: skip
    for name in ours:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", "kept")
    expected = {
        "CUDA_VISIBLE_DEVICES": "2,3", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
        # Nothing of an engine leaves this machine.
        "VLLM_HOST_IP": "127.0.0.1", "VLLM_LOOPBACK_IP": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    for name in expected:
        monkeypatch.setenv(name, "of training")
    environment = child.child_environment("elsewhere/python", ("2", "3"))
    assert not ours & environment.keys()
    assert environment.items() >= (expected | {"HF_HOME": "kept"}).items()
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")  # whoever has set the threads then meant it
    environment = child.child_environment(sys.executable)
    assert environment["PYTHONPATH"] == environment["OMP_NUM_THREADS"] == "1"


def test_an_error_that_a_warning_quotes_is_not_the_first_and_pydantics_is_read(tmp_path):
    printed = (
        "WARNING: this can cause errors like `OSError: [Errno 24] Too many open files`. Consider\n"
        "pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
        "  Value error, User-specified max_model_len (4096) is greater than the derived one (64)\n"
    )
    said = child.explain("it ended with exit code 1", printed, tmp_path / "log")
    assert "The first error in its log: ValidationError: 1 validation error" in said
    assert "do not fit into the model's own context" in said
