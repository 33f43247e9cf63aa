"""Real vLLM, in an environment of its own: `make test-slow`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import nullcontext, suppress
from ipaddress import ip_address
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import requests
import yaml

from sera_plugin.algorithm.protocols import SamplingSettings
from sera_plugin.sampling import child, vllm
from sera_plugin.sampling import client as http
from sera_plugin.sampling.prompts import SamplingFailed
from sera_plugin.sampling.vllm import Memory, ServedPolicy, VllmSampler, VllmServerSampler
from tests.conftest import adapter
from tests.test_end_to_end import check_run
from tests.test_ranks import free_port, launch
from tests.test_sampling_child import gone

PYTHON = os.environ.get("SERA_VLLM_PYTHON", "")
KEY = "a-key-for-this-test"

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="SERA_VLLM_PYTHON is unset: run `make test-slow`"),
]


@pytest.fixture
def config(base_config) -> dict:
    base_config["sera"] |= {"sampler": "vllm", "vllm_python": PYTHON, "keep_policies": True}
    return base_config


def summary(run: Path, iteration: int) -> dict:
    return json.loads((run / f"iteration-{iteration:02d}/summary.json").read_text())


def candidates(run: Path, iteration: int) -> dict:
    return pq.read_table(run / f"iteration-{iteration:02d}/candidates.parquet").to_pydict()


def settings(**changes) -> SamplingSettings:
    keys = {"candidates": 2, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 12}
    keys |= {"max_length": 48, "end_ids": (2,), "seed": 3}
    return SamplingSettings(**(keys | changes))


def prompts(world, count: int) -> list:
    from sera_plugin.tools.demo.base_model import build_tokenizer

    tokenizer = build_tokenizer()
    texts = [f"<s> <|user|> {row['prompt']} <|assistant|>" for row in world.rows]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return [np.array(ids[i % len(ids)], dtype=np.int32) for i in range(count)]


def offline(model: Path, directory: Path, policy: Path | None = None) -> VllmSampler:
    served = ServedPolicy(str(model), str(policy) if policy else None, 4, "float32", None, {}, 99)
    return VllmSampler(
        PYTHON, served, {}, directory / "vllm.log", lambda _: nullcontext(Memory(None, True))
    )


def collect(sampler, rows, how, skip=()) -> dict:
    return {
        row: [(one.token_ids, one.finish_reason) for one in found]
        for chunk in sampler.sample(rows, how, skip=skip)
        for row, found in chunk
    }


def greedy_by_transformers(model: Path, policy: Path | None, rows) -> dict:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from sera_plugin.sampling.transformers import TransformersSampler

    loaded = AutoModelForCausalLM.from_pretrained(model)
    if policy is not None:
        loaded = PeftModel.from_pretrained(loaded, policy)
    return collect(TransformersSampler(loaded, 0, 2000), rows, settings(top_p=1e-9))


def workers(of: psutil.Process) -> list[psutil.Process]:
    """The server of a phase and all that it has started."""

    def is_worker(process: psutil.Process) -> bool:
        with suppress(psutil.NoSuchProcess):  # it may end while it is looked at
            command = " ".join(process.cmdline())
            return vllm.SERVER in command and "--served-model-name=" in command
        return False

    found = [process for process in of.children(recursive=True) if is_worker(process)]
    return found and [found[0], *found[0].children(recursive=True)]


def check_end_tokens(table: dict, longest: int) -> None:
    """Stopped candidates keep their one end token; cut ones have none."""
    assert "stop" in table["finish_reason"]
    for ids, reason in zip(table["token_ids"], table["finish_reason"], strict=True):
        if reason == "stop":
            assert ids[-1] == 2
            assert 2 not in ids[:-1]
        else:
            assert reason == "length"
            assert len(ids) == longest
            assert 2 not in ids


@pytest.fixture(scope="module")
def runs() -> dict:
    """Finished runs by kind, for tests that need one."""
    return {}


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_run_samples_from_the_policy_it_says(config, train, world, tmp_path, runs, kind):
    result = train(config | (adapter() if kind == "lora" else {}))
    check_run(result, world.base, kept=17, sampled=7, four_bit=False)
    runs[kind] = Path(shutil.copytree(result.run, tmp_path.parent / f"finished-{kind}"))
    for iteration in (2, 3):
        report = summary(result.run, iteration)
        assert report["sampler"]["name"] == "vllm"
        assert report["sampler"]["weights"] == "float32"
        assert report["sampler"]["version"]
        assert report["seconds"]["start_engine"] > 0
        assert (result.run / f"iteration-{iteration:02d}/vllm.log").exists()
        check_end_tokens(candidates(result.run, iteration), longest=12)
    assert not workers(psutil.Process())

    # The engine's policy IS theta_2: greedy answers agree with transformers' and not with the
    # base model's, token for token and end token for end token.
    policy = result.run / "iteration-03/policy"
    rows = prompts(world, 24)
    served = (world.base, tmp_path, policy) if kind == "lora" else (policy, tmp_path)
    from_engine = collect(offline(*served), rows, settings(top_p=1e-9))
    mine = (world.base, policy) if kind == "lora" else (policy, None)
    assert from_engine == greedy_by_transformers(*mine, rows)
    assert from_engine != greedy_by_transformers(world.base, None, rows)


def test_an_engine_listens_on_loopback_only(world, tmp_path, monkeypatch):
    # What a training run over several machines would set, and vLLM and gloo would follow.
    addresses = [
        (name, entry.address)
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family == socket.AF_INET and not entry.address.startswith("127.")
    ]
    for name, address in addresses[:1]:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", name)
        monkeypatch.setenv("VLLM_HOST_IP", address)
    listening: set[str] = set()
    looks, stop = [], threading.Event()

    def look() -> None:
        while not stop.is_set():
            seen = 0
            for process in psutil.Process().children(recursive=True):
                try:
                    sockets = process.net_connections(kind="inet")
                except psutil.Error:  # it has ended
                    continue
                found = {
                    one.laddr.ip
                    for one in sockets
                    if one.status == psutil.CONN_LISTEN or one.type == socket.SOCK_DGRAM
                }
                listening.update(found)
                seen += 1
            looks.append(seen)
            stop.wait(0.2)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        found = collect(offline(world.base, tmp_path), prompts(world, 600), settings(candidates=4))
    finally:
        stop.set()
        watcher.join()
    assert len(found) == 600
    assert max(looks) >= 3  # the server, its guard, and the engine
    assert listening  # gloo does: without a socket seen this test would say nothing
    assert all(ip_address(ip).is_loopback for ip in listening), listening


def test_every_rank_has_an_engine_of_its_own(config, tmp_path, runs):
    config |= {"num_epochs": 2, "gradient_accumulation_steps": 1, **adapter()}
    result = launch(config, tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    run = tmp_path / "out/sera"
    logs = sorted(path.name for path in (run / "iteration-02").glob("*.log"))
    assert logs == ["vllm-0.log", "vllm-1.log"]
    table = candidates(run, 2)
    assert table["row"] == [row for row in range(24) for _ in range(4)]
    check_end_tokens(table, longest=12)
    if "lora" in runs:  # the same batches in one process: the same policy up to rounding
        assert table["token_ids"] == candidates(runs["lora"], 2)["token_ids"]


def test_killing_the_server_keeps_finished_chunks_and_the_next_try_goes_on(world, tmp_path):
    rows = prompts(world, 1500)
    sampler = offline(world.base, tmp_path)
    chunks = sampler.sample(rows, settings(candidates=4))
    finished = dict(next(chunks))
    family = workers(psutil.Process())
    family[0].kill()
    with pytest.raises(SamplingFailed, match="it was killed by SIGKILL") as failure:
        finished |= {row: found for chunk in chunks for row, found in chunk}
    assert gone(*(process.pid for process in family))
    assert "vllm.log" in str(failure.value)
    assert 64 <= len(finished) < 1500
    left = set(range(1500)) - finished.keys()
    some = sorted(left)[:40]
    rest = collect(sampler, rows, settings(candidates=4), skip=set(range(1500)) - set(some))
    assert rest.keys() == set(some)
    # Seeds reproduce: a row gives the same whether or not its neighbours are sampled with it.
    again = collect(sampler, rows, settings(candidates=4), skip=set(range(1500)) - {*some[:9], 0})
    assert all(again[row] == rest[row] for row in some[:9])
    if 0 in finished:
        assert again[0] == [(one.token_ids, one.finish_reason) for one in finished[0]]


def test_a_hung_engine_is_ended(world, tmp_path, monkeypatch):
    sampler = offline(world.base, tmp_path)
    chunks = sampler.sample(prompts(world, 1500), settings(candidates=4))
    next(chunks)
    family = workers(psutil.Process())
    monkeypatch.setattr(child, "PATIENCE", 6.0)
    monkeypatch.setattr(child, "GRACE", 3.0)
    os.killpg(family[0].pid, signal.SIGSTOP)  # the server and its engine, but not the guard
    with pytest.raises(SamplingFailed, match="it hung: no progress for 6 seconds"):
        list(chunks)
    assert gone(*(process.pid for process in family))


def test_what_this_vllm_cannot_do_is_said_with_the_choices(world, tmp_path):
    def refused(policy: ServedPolicy, memory: Memory, **options) -> str:
        sampler = VllmSampler(
            PYTHON, policy, options, tmp_path / "log", lambda _: nullcontext(memory)
        )
        with pytest.raises(SamplingFailed) as failure:
            list(sampler.sample(prompts(world, 1), settings()))
        return str(failure.value)

    four_bit = ServedPolicy(str(world.base), None, 0, "float32", "nf4", {}, 99)
    text = refused(four_bit, Memory(None, whole_fits=False))
    assert "cannot load the base model in nf4, and in float32 it does not fit" in text
    assert "sera.sampler to transformers or vllm-server" in text
    plain = ServedPolicy(str(world.base), None, 0, "float32", None, {}, 99)
    text = refused(plain, Memory(None, whole_fits=True), an_option_of_tomorrow=True)
    assert "unrecognized arguments: --an-option-of-tomorrow" in text
    assert "docs/sampling.md lists versions" in text
    text = refused(plain, Memory(None, whole_fits=True), max_model_len=4096)
    assert "do not fit into the model's own context: lower sequence_len" in text


def test_a_full_disk_and_the_next_try(config, train, monkeypatch):
    from sera_plugin.rundir.store import RunStore

    config |= {"num_epochs": 2, **adapter()}
    append = RunStore.append_samples
    families = []

    def full(self, *_):
        families.extend(workers(psutil.Process()))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunStore, "append_samples", full)
    with pytest.raises(OSError, match="No space left"):
        train(config)
    assert families
    assert gone(*(process.pid for process in families))
    monkeypatch.setattr(RunStore, "append_samples", append)
    result = train(config | {"auto_resume_from_checkpoints": True})
    assert summary(result.run, 2)["pairs"]["bootstrapped_kept"] == 7


def test_neither_ctrl_c_nor_a_killed_trainer_leaves_a_process(config, tmp_path, runs):
    path = tmp_path / "config.yaml"
    command = [sys.executable, "-m", "axolotl.cli.main", "train", str(path), "--launcher", "python"]
    config |= {**adapter(), "auto_resume_from_checkpoints": True}
    path.write_text(yaml.safe_dump(config))
    for number in (signal.SIGINT, signal.SIGKILL):
        trainer = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        process, family = psutil.Process(trainer.pid), []
        # The server, its guard, and the engine.
        while len(family) < 4:
            assert trainer.poll() is None
            time.sleep(0.5)
            family = workers(process)
        trainer.send_signal(number)
        # The host ends with 0 after Ctrl-C: it saves the model first.
        assert trainer.wait(60) == (0 if number == signal.SIGINT else -signal.SIGKILL)
        assert gone(*(process.pid for process in family))
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "sampler: vllm (" in done.stdout + done.stderr
    if "lora" in runs:  # the same run, never interrupted
        mine = candidates(tmp_path / "out/sera", 2)
        assert mine["token_ids"] == candidates(runs["lora"], 2)["token_ids"]


# ------------------------------------------------------------------ a running server


def serve(model: Path, directory: Path, *arguments: str, **environment: str) -> SimpleNamespace:
    port = free_port()
    command = [PYTHON, "-m", vllm.SERVER, "--model", str(model)]
    command += ["--port", str(port), "--host", "127.0.0.1", "--dtype", "float32"]
    command += ["--enforce-eager", "--max-model-len", "40", *arguments]
    # vLLM 0.30 on a CPU cannot take a seed for a prompt that it prefills in parts.
    command += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", "4096"]
    environment = child.child_environment(PYTHON) | {"VLLM_CPU_KVCACHE_SPACE": "1"} | environment
    with (directory / f"server-{port}.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd=directory,
            env=environment,
        )
    return SimpleNamespace(port=port, process=process, url=f"http://127.0.0.1:{port}")


def wait_for(server: SimpleNamespace) -> None:
    until = time.monotonic() + 300
    while time.monotonic() < until:
        assert server.process.poll() is None
        try:
            if requests.get(server.url + "/health", timeout=5).ok:
                return
        except requests.ConnectionError:
            time.sleep(1)
    raise TimeoutError(server.url)


@pytest.fixture(scope="module")
def servers(world, tmp_path_factory):
    """One that takes adapters and asks for a key, and one that does neither."""
    directory = tmp_path_factory.mktemp("servers")
    good = serve(
        world.base,
        directory,
        *("--enable-lora", "--max-lora-rank", "8"),
        VLLM_ALLOW_RUNTIME_LORA_UPDATING="1",
        VLLM_API_KEY=KEY,
    )
    plain = serve(world.base, directory)
    try:
        wait_for(good)
        wait_for(plain)
        yield SimpleNamespace(good=good, plain=plain)
    finally:
        for server in (good, plain):
            os.killpg(server.process.pid, signal.SIGTERM)
            try:
                server.process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(server.process.pid, signal.SIGKILL)


@pytest.fixture
def client(world, monkeypatch):
    monkeypatch.setenv(vllm.API_KEY, KEY)
    monkeypatch.setattr(http, "BACKOFF", 0.1)

    def make(port: int, base=world.base, policy=Path("none"), **changes) -> VllmServerSampler:
        from sera_plugin.tools.demo.base_model import build_tokenizer

        tokenizer = build_tokenizer()
        keys = {
            "tokenize": lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
            "special_tokens": tokenizer.all_special_tokens,
            "vocabulary": len(tokenizer),
        }
        return VllmServerSampler("0.0.0.0", port, str(base), policy, **(keys | changes))

    return make


def test_a_run_with_a_server(config, train, world, servers, client, monkeypatch):
    monkeypatch.setenv(vllm.API_KEY, KEY)
    config["sera"]["sampler"] = "vllm-server"
    config |= {"vllm": {"port": servers.good.port}, "sequence_len": 40, **adapter()}
    result = train(config)
    check_run(result, world.base, kept=17, sampled=7, four_bit=False)
    report = summary(result.run, 3)["sampler"]
    assert report["name"] == "vllm-server"
    assert report["version"]
    check_end_tokens(candidates(result.run, 3), longest=12)
    headers = {"Authorization": f"Bearer {KEY}"}
    models = requests.get(servers.good.url + "/v1/models", headers=headers, timeout=10).json()
    assert [model["id"] for model in models["data"]] == [str(world.base)]
    assert KEY not in (result.run / "run.json").read_text()

    policy, rows = result.run / "iteration-03/policy", prompts(world, 24)
    sampler = client(servers.good.port, policy=policy)
    greedy = collect(sampler, rows, settings(top_p=1e-9))
    assert greedy == greedy_by_transformers(world.base, policy, rows)
    assert greedy != greedy_by_transformers(world.base, None, rows)
    first = collect(sampler, rows, settings())
    assert collect(sampler, rows, settings(), skip={0, 5}) == {
        row: found for row, found in first.items() if row not in (0, 5)
    }


def test_every_way_a_server_can_be_wrong_is_told_apart(world, servers, client, monkeypatch):
    good, plain = servers.good.port, servers.plain.port
    assert client(good).check() == 40
    with pytest.raises(SamplingFailed, match=r"serves .*but base_model is another/model.*Start it"):
        client(good, base="another/model").check()
    with pytest.raises(SamplingFailed, match="has another tokenizer"):
        client(good, tokenize=lambda text: [1, 2, 3]).check()
    with pytest.raises(SamplingFailed, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"):
        client(plain).check()
    with pytest.raises(SamplingFailed, match=r"context of 40 tokens.*--max-model-len 4\d"):
        collect(client(good), prompts(world, 3), settings(max_new_tokens=36))
    with pytest.raises(SamplingFailed, match=r"did not load .*none: .*same path"):
        collect(client(good), prompts(world, 3), settings())
    monkeypatch.setenv(vllm.API_KEY, "wrong")
    with pytest.raises(SamplingFailed, match=r"refuses this run's key\. Set VLLM_API_KEY"):
        client(good).check()


def test_lost_connections_are_tried_again(servers, client):
    dropped = []

    def forward(listener: socket.socket) -> None:
        while True:
            try:
                inbound, _ = listener.accept()
            except OSError:
                return
            if len(dropped) < 3:
                dropped.append(inbound.getsockname())
                inbound.close()
                continue
            outbound = socket.create_connection(("127.0.0.1", servers.good.port))
            for source, target in ((inbound, outbound), (outbound, inbound)):
                threading.Thread(target=pump, args=(source, target), daemon=True).start()

    def pump(source: socket.socket, target: socket.socket) -> None:
        while data := source.recv(65_536):
            target.sendall(data)
        target.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=forward, args=(listener,), daemon=True).start()
        assert client(listener.getsockname()[1]).check() == 40
    assert len(dropped) == 3


def test_an_evaluation_samples_what_it_samples_without_vllm(config, train, tmp_path, monkeypatch):
    """Greedy answers of a base model and an adapter, at relative paths, through the command."""
    from click.testing import CliRunner

    from sera_plugin.cli import sera

    config |= adapter(lora_r=8)
    config["num_epochs"] = 2
    config["sera"]["sampler"] = "transformers"
    output = train(config).output
    rows = [{"prompt": "f b d a e c"}, {"turns": ["c a b", "z y"]}, {"prompt": "q r s t"}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = []
    monkeypatch.chdir(tmp_path)
    relative = [os.path.relpath(path) for path in (config["base_model"], output)]
    for name, engine in (("here", []), ("there", ["--vllm-python", os.path.relpath(PYTHON)])):
        arguments = [*relative, "--prompts", "prompts.jsonl", "--output", name]
        arguments += ["--temperature", 0, "--max-new-tokens", 12, "--json", *engine]
        arguments += ["--judge", "sera_plugin.tools.demo.world:true_reward"]
        done = CliRunner().invoke(sera, ["eval", *map(str, arguments)])
        assert done.exit_code == 0, done.output
        found.append(
            [(tmp_path / name / f"outputs/{one}.json").read_text() for one in ("base", "out")]
        )
    assert found[0] == found[1]
    assert found[0][0] != found[0][1]
    assert (tmp_path / "there/vllm.log").stat().st_size > 0
    assert not workers(psutil.Process())
