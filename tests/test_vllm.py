"""Real vLLM, in an environment of its own: `make test-slow`."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing, contextmanager, nullcontext, suppress
from copy import deepcopy
from ipaddress import ip_address
from pathlib import Path

import numpy as np
import psutil
import pytest
import requests
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from sera_plugin.algorithm.method import SamplingSettings
from sera_plugin.sampling import child, vllm
from sera_plugin.sampling.child import Child, SamplingFailed, child_environment
from sera_plugin.sampling.client import Client
from sera_plugin.sampling.servers import VllmServerSampler
from sera_plugin.sampling.transformers import TransformersSampler
from sera_plugin.sampling.vllm import Memory, ServedPolicy, VllmSampler
from tests.conftest import adapter, summary, table
from tests.test_end_to_end import check_run
from tests.test_sampling_child import gone
from tests.two_ranks import free_port, launch

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


@pytest.fixture(scope="module")
def tokenizer():
    from sera_plugin.tools.demo.base_model import build_tokenizer

    return build_tokenizer()


@pytest.fixture(scope="module")
def prompts(world, tokenizer):
    texts = [f"<s> <|user|> {row['prompt']} <|assistant|>" for row in world.rows]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return lambda count: [np.array(ids[i % len(ids)], dtype=np.int32) for i in range(count)]


def settings(**changes) -> SamplingSettings:
    keys = {"candidates": 2, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 12}
    keys |= {"max_length": 48, "end_ids": (2,), "seed": 3}
    return SamplingSettings(**(keys | changes))


def engine(model, directory, policy=None, fits=True, quantized=None, **options):
    path = str(policy) if policy else None
    served = ServedPolicy(str(model), path, 4, "float32", quantized, {}, 99)
    log = directory / "vllm.log"
    return VllmSampler(PYTHON, served, options, log, lambda _: nullcontext(Memory(None, fits)))


def collect(sampler, rows, how, skip=()) -> dict:
    return {
        row: [(one.token_ids, one.finish_reason) for one in found]
        for chunk in sampler.sample(rows, how, skip=skip)
        for row, found in chunk
    }


GREEDY = settings(top_p=1e-9)


def greedy_by_transformers(model: Path, policy: Path | None, rows) -> dict:
    loaded = AutoModelForCausalLM.from_pretrained(model)
    if policy is not None:
        loaded = PeftModel.from_pretrained(loaded, policy)
    return collect(TransformersSampler(loaded, 0, 2000), rows, GREEDY)


def workers(of: psutil.Process) -> list[psutil.Process]:
    """The server of a phase, which is its group's first, and all that it has started."""
    found = []
    for process in of.children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it may end while it is looked at
            command = " ".join(process.cmdline())
            if "--served-model-name=" in command and "lifeline.py" not in command:
                found.append(process)
    return found and [found[0], *found[0].children(recursive=True)]


@pytest.fixture(scope="module")
def runs() -> dict:
    """Finished runs by kind, for tests that need one."""
    return {}


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_run_samples_from_the_policy_it_says(config, train, world, prompts, tmp_path, runs, kind):
    result = train(config | (adapter() if kind == "lora" else {}))
    check_run(result, world.base, kept=17, sampled=7, four_bit=False)
    runs[kind] = Path(shutil.copytree(result.run, tmp_path.parent / f"finished-{kind}"))
    for iteration in (2, 3):
        report = summary(result.run, iteration)
        assert report["sampler"].items() >= {"name": "vllm", "weights": "float32"}.items()
        assert report["sampler"]["version"]
        assert report["seconds"]["start_engine"] > 0
        assert (result.run / f"iteration-{iteration:02d}/vllm.log").exists()
    assert not workers(psutil.Process())

    # The engine's policy IS theta_2: greedy answers agree with transformers' and not with the
    # base model's, token for token and end token for end token.
    policy = result.run / "iteration-03/policy"
    served = (world.base, tmp_path, policy) if kind == "lora" else (policy, tmp_path)
    from_engine = collect(engine(*served), prompts(24), GREEDY)
    mine = (world.base, policy) if kind == "lora" else (policy, None)
    assert from_engine == greedy_by_transformers(*mine, prompts(24))
    assert from_engine != greedy_by_transformers(world.base, None, prompts(24))


def test_an_engine_listens_on_loopback_only(world, prompts, tmp_path, monkeypatch):
    # What a training run over several machines would set, and vLLM and gloo would follow.
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if entry.family == socket.AF_INET and not entry.address.startswith("127."):
                monkeypatch.setenv("GLOO_SOCKET_IFNAME", name)
                monkeypatch.setenv("VLLM_HOST_IP", entry.address)
    listening = set()
    for _ in engine(world.base, tmp_path).sample(prompts(200), settings(candidates=4)):
        family = psutil.Process().children(recursive=True)
        assert len(family) >= 3  # the server, its lifeline, and the engine
        for one in (one for process in family for one in process.net_connections(kind="inet")):
            if one.status == psutil.CONN_LISTEN or one.type == socket.SOCK_DGRAM:
                listening.add(one.laddr.ip)
    assert listening  # gloo does: without a socket seen this test would say nothing
    assert all(ip_address(ip).is_loopback for ip in listening), listening


def test_every_rank_has_an_engine_of_its_own(config, tmp_path, runs):
    config |= {"num_epochs": 2, "gradient_accumulation_steps": 1, **adapter()}
    result = launch(config, tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    run = tmp_path / "out/sera"
    logs = sorted(path.name for path in (run / "iteration-02").glob("*.log"))
    assert logs == ["vllm-0.log", "vllm-1.log"]
    found = table(run, 2, "candidates")
    assert found["row"] == [row for row in range(24) for _ in range(4)]
    if "lora" in runs:  # the same batches in one process: the same policy up to rounding
        assert found["token_ids"] == table(runs["lora"], 2, "candidates")["token_ids"]


def test_killing_the_server_keeps_finished_chunks_and_the_next_try_goes_on(
    world, prompts, tmp_path
):
    rows, how = prompts(1500), settings(candidates=4)
    sampler = engine(world.base, tmp_path)
    chunks = sampler.sample(rows, how)
    finished = dict(next(chunks))
    family = workers(psutil.Process())
    family[0].kill()
    with pytest.raises(SamplingFailed, match="it was killed by SIGKILL") as failure:
        finished |= {row: found for chunk in chunks for row, found in chunk}
    assert gone(*(process.pid for process in family))
    assert "vllm.log" in str(failure.value)
    assert 64 <= len(finished) < 1500
    some = sorted(set(range(1500)) - finished.keys())[:40]
    rest = collect(sampler, rows, how, skip=set(range(1500)) - set(some))
    assert rest.keys() == set(some)
    # Seeds reproduce: a row gives the same whether or not its neighbours are sampled with it.
    again = collect(sampler, rows, how, skip=set(range(1500)) - {*some[:9], 0})
    assert all(again[row] == rest[row] for row in some[:9])
    if 0 in finished:
        assert again[0] == [(one.token_ids, one.finish_reason) for one in finished[0]]


def test_a_hung_engine_is_ended_with_its_shared_memory(world, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(child, "GRACE", 3.0)
    chunks = engine(world.base, tmp_path).sample(prompts(1500), settings(candidates=4))
    next(chunks)
    family = workers(psutil.Process())
    maps = [one.path for process in family for one in process.memory_maps()]
    shared = [Path(path) for path in maps if "/psm_" in path]
    assert any(path.exists() for path in shared)
    monkeypatch.setattr(child, "PATIENCE", 6.0)
    os.killpg(family[0].pid, signal.SIGSTOP)  # the server and its engine, but not the lifeline
    with pytest.raises(SamplingFailed, match="it hung: no progress for 6 seconds"):
        list(chunks)
    assert gone(*(process.pid for process in family))
    assert not any(path.exists() for path in shared)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"quantized": "nf4", "fits": False},
         ("cannot load the base model in nf4, and in float32 it does not fit",
          "sera.sampler to transformers or vllm-server")),
        ({"an_option_of_tomorrow": True},
         ("unrecognized arguments: --an-option-of-tomorrow", "docs/sampling.md lists versions")),
        ({"max_model_len": 4096}, ("do not fit into the model's own context: lower sequence_len",)),
    ],
)  # fmt: skip
def test_what_this_vllm_cannot_do_is_said_with_the_choices(world, prompts, tmp_path, keys, said):
    with pytest.raises(SamplingFailed) as failure:
        list(engine(world.base, tmp_path, **keys).sample(prompts(1), settings()))
    assert all(words in str(failure.value) for words in said)


def test_neither_ctrl_c_nor_a_killed_trainer_leaves_a_process(config, tmp_path, runs):
    path = tmp_path / "config.yaml"
    command = [sys.executable, "-m", "axolotl.cli.main", "train", str(path), "--launcher", "python"]
    config |= {**adapter(), "auto_resume_from_checkpoints": True}
    path.write_text(yaml.safe_dump(config))
    for number in (signal.SIGINT, signal.SIGKILL):
        trainer = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        family = []
        while len(family) < 3:  # the server, its resource tracker, and the engine
            assert trainer.poll() is None
            time.sleep(0.5)
            family = workers(psutil.Process(trainer.pid))
        trainer.send_signal(number)
        # The host ends with 0 after Ctrl-C: it saves the model first.
        assert trainer.wait(60) == (0 if number == signal.SIGINT else -signal.SIGKILL)
        assert gone(*(process.pid for process in family))
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "sampler: vllm (" in done.stdout + done.stderr
    if "lora" in runs:  # the same run, never interrupted
        mine = table(tmp_path / "out/sera", 2, "candidates")
        assert mine["token_ids"] == table(runs["lora"], 2, "candidates")["token_ids"]


@contextmanager
def serving(model: Path, directory: Path, *arguments: str, **environment: str):
    """The port of a server."""
    port = free_port()
    command = [PYTHON, "-m", vllm.SERVER, f"--model={model}", f"--port={port}", "--host=127.0.0.1"]
    command += ["--dtype=float32", "--enforce-eager", "--max-model-len=40", *arguments]
    # vLLM 0.30 on a CPU cannot take a seed for a prompt that it prefills in parts.
    command += ["--no-enable-chunked-prefill", "--max-num-batched-tokens=4096"]
    environment = child_environment(PYTHON) | {"VLLM_CPU_KVCACHE_SPACE": "1"} | environment
    with closing(Child(command, environment, directory / f"server-{port}.log")) as server:
        client = Client(f"http://127.0.0.1:{port}", "", retries=0, timeout=None)
        while client.answers("/health") is None:
            server.check(server.log_size)
            time.sleep(1)
        yield port


TAKES = ("--enable-lora", "--max-lora-rank=8")
KEYS = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_API_KEY": KEY}


@pytest.fixture(scope="module")
def good(world, tmp_path_factory):
    """A server that takes adapters and asks for a key."""
    with serving(world.base, tmp_path_factory.mktemp("good"), *TAKES, **KEYS) as port:
        yield port


@pytest.fixture
def client(world, tokenizer, monkeypatch):
    monkeypatch.setenv(vllm.API_KEY, KEY)

    def make(*ports, base=world.base, policy=Path("none"), tokenizer=tokenizer):
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        return VllmServerSampler(urls, "", str(base), policy, tokenizer, len(tokenizer))

    return make


def test_a_run_with_a_server(config, train, world, prompts, good, client):
    config["sera"]["sampler"] = "vllm-server"
    config |= {"vllm": {"port": good}, "sequence_len": 40, **adapter()}
    result = train(config)
    check_run(result, world.base, kept=17, sampled=7, four_bit=False)
    report = summary(result.run, 3)["sampler"]
    assert report["name"] == "vllm-server"
    assert report["version"]
    headers, url = {"Authorization": f"Bearer {KEY}"}, f"http://127.0.0.1:{good}/v1/models"
    models = requests.get(url, headers=headers, timeout=10).json()
    assert [model["id"] for model in models["data"]] == [str(world.base)]
    assert KEY not in (result.run / "run.json").read_text()

    policy, rows = result.run / "iteration-03/policy", prompts(24)
    sampler = client(good, policy=policy)
    greedy = collect(sampler, rows, GREEDY)
    assert greedy == greedy_by_transformers(world.base, policy, rows)
    assert greedy != greedy_by_transformers(world.base, None, rows)
    first = collect(sampler, rows, settings())
    assert collect(sampler, rows, settings(), skip={0, 5}) == {
        row: found for row, found in first.items() if row not in (0, 5)
    }


def test_what_a_killed_server_has_not_answered_the_other_does(
    world, prompts, good, client, tmp_path, caplog
):
    policy, lora = tmp_path / "policy", LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(world.base), lora).save_pretrained(policy)
    rows, how = prompts(600), settings(candidates=4)
    alone = collect(client(good, policy=policy), rows, how)
    with serving(world.base, tmp_path, *TAKES, **KEYS) as port:
        both = client(good, port, policy=policy)
        mine = psutil.Process().children()
        lifeline = next(one for one in mine if f"--port={port}" in one.cmdline())
        found = []
        for chunk in both.sample(rows, how):
            found += chunk
            if any(one.url == both.urls[1] for one in both.answered):
                for process in lifeline.children(recursive=True):
                    process.kill()
    assert f"with 1 other server(s), because the vLLM server at {both.urls[1]}" in caplog.text
    assert sorted(row for row, _ in found) == list(range(600))
    assert {row: [(a.token_ids, a.finish_reason) for a in given] for row, given in found} == alone
    assert 0 < both.report["servers"][both.urls[1]] < 600


def test_every_way_a_server_can_be_wrong_is_told_apart(
    world, prompts, tokenizer, good, client, tmp_path, monkeypatch
):
    def wrong(said, sampler, **how):
        with pytest.raises(SamplingFailed, match=said):
            collect(sampler, prompts(3), settings(**how))

    assert client(good).check() == 40
    wrong(r"serves .*but base_model is another/model.*Start it", client(good, base="another/model"))
    other = deepcopy(tokenizer)
    other.add_tokens(["Hello"])
    wrong("has another tokenizer", client(good, tokenizer=other))
    wrong(r"context of 40 tokens.*--max-model-len 4\d", client(good), max_new_tokens=36)
    wrong(r"did not load .*none: .*same path", client(good))
    with serving(world.base, tmp_path) as plain:
        wrong("VLLM_ALLOW_RUNTIME_LORA_UPDATING=1", client(plain))
    monkeypatch.setenv(vllm.API_KEY, "wrong")
    wrong(r"refuses this run's key\. Set VLLM_API_KEY", client(good))
