"""Sampling speed: vLLM for a phase, a running vLLM server, and transformers, on the same prompts.

`make bench-sampling` measures on the demo's own small model, on whatever device there is. All
engines run in each round, in turn; figures are medians over rounds, and speeds are also given
relative to transformers. The result is a table in Markdown with the machine and versions in it.
"""

import argparse
import gzip
import json
import logging
import os
import platform
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from sera_plugin.algorithm.method import CandidateSampler, SamplingSettings, TokenIds
from sera_plugin.rundir.ranks import Ranks
from sera_plugin.sampling.child import Child, child_environment, find_vllm
from sera_plugin.sampling.client import Client
from sera_plugin.sampling.offload import make_room
from sera_plugin.sampling.servers import VllmServerSampler
from sera_plugin.sampling.transformers import TransformersSampler
from sera_plugin.sampling.vllm import SERVER, ServedPolicy, VllmSampler

CUDA = torch.cuda.is_available()
DTYPE = torch.bfloat16 if CUDA else torch.float32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm-python", required=True)
    parser.add_argument("--model", help="a model with a chat template; default: the demo's")
    parser.add_argument("--data", type=Path, help="JSONL (may be .gz) with a `prompt` per line")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the table here too")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    with tempfile.TemporaryDirectory() as directory:
        text = measure(arguments, Path(directory))
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


def measure(arguments: argparse.Namespace, directory: Path) -> str:
    name = arguments.model or train_demo_model(directory / "model")
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=DTYPE).to("cuda" if CUDA else "cpu")
    policy = make_adapter(model, directory / "adapter")
    prompts = read_prompts(arguments, tokenizer)
    longest = max(map(len, prompts)) + arguments.max_new_tokens
    longest = min(longest, model.config.get_text_config().max_position_embeddings)
    settings = SamplingSettings(
        candidates=4,
        temperature=0.7,
        top_p=0.95,
        max_new_tokens=arguments.max_new_tokens,
        max_length=longest,
        end_ids=(int(tokenizer.eos_token_id),),
        seed=1,
    )
    vocabulary = model.config.get_text_config().vocab_size
    dtype = str(DTYPE).removeprefix("torch.")
    served = ServedPolicy(name, str(directory / "adapter"), 16, dtype, None, {}, vocabulary)
    with running_server(arguments.vllm_python, name, longest, directory) as port:

        def own() -> CandidateSampler:
            return VllmSampler(
                arguments.vllm_python,
                served,
                {},
                directory / "vllm.log",
                partial(make_room, policy, policy.device, None, DTYPE.itemsize, {}, Ranks()),
            )

        def server() -> CandidateSampler:
            return VllmServerSampler(
                [f"http://127.0.0.1:{port}"],
                "",
                name,
                directory / "adapter",
                tokenizer,
                vocabulary,
            )

        def in_process() -> CandidateSampler:
            pad = int(tokenizer.pad_token_id or 0)
            return TransformersSampler(policy, pad, 16_384, device=policy.device)

        engines: dict[str, Callable[[], CandidateSampler]] = {
            "transformers": in_process,
            "vllm": own,
            "vllm-server": server,
        }
        results: dict[str, list[dict[str, float]]] = {engine: [] for engine in engines}
        for number in range(arguments.rounds):
            for engine, make in engines.items():
                results[engine].append(one_round(make(), prompts, settings))
                print(f"round {number + 1}: {engine}: {results[engine][-1]}", file=sys.stderr)
    return table(arguments, name, prompts, results)


def one_round(
    sampler: CandidateSampler, prompts: list[TokenIds], settings: SamplingSettings
) -> dict[str, float]:
    """Tokens, seconds and peak memory of one call."""
    tokens = 0
    with peak_memory() as peak:
        start = time.perf_counter()
        for chunk in sampler.sample(prompts, settings):
            tokens += sum(len(one.token_ids) for _, found in chunk for one in found)
        seconds = time.perf_counter() - start
    around = sum(sampler.seconds.values())
    return {
        "tokens": tokens,
        "seconds": seconds,
        "rate": tokens / (seconds - around),
        "start": sampler.seconds.get("start_engine", 0.0),
        "stop": sampler.seconds.get("stop_engine", 0.0),
        "memory": peak[0],
    }


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """GiB: on a GPU all that is used of it, else what this process and its children hold, the
    running server among them (pages that several of them share are counted once each)."""
    peak, done = [0.0], threading.Event()

    def used() -> float:
        if CUDA:
            free, total = torch.cuda.mem_get_info()
            return float(total - free)
        size, this = 0, psutil.Process()
        for process in (this, *this.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                size += process.memory_info().rss
        return size

    def watch() -> None:
        while not done.wait(0.5):
            peak[0] = max(peak[0], used() / 2**30)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


@contextmanager
def running_server(
    python: str,
    name: str,
    longest: int,
    directory: Path,
    variables: Mapping[str, str] | None = None,
) -> Iterator[int]:
    """A server that takes adapters, on a port of its own; `variables` of its environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [python, "-m", SERVER, "--model", name, "--port", str(port), "--host", "127.0.0.1"]
    command += ["--max-model-len", str(longest), "--dtype", str(DTYPE).split(".")[1]]
    command += ["--enable-lora", "--max-lora-rank", "16"]
    if CUDA:
        command += ["--gpu-memory-utilization", "0.4"]  # the other engines run beside it
    else:
        command += ["--enforce-eager", "--no-enable-chunked-prefill"]
        command += ["--max-num-batched-tokens", str(max(4096, longest))]
    environment = (
        child_environment(python)
        | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
        | dict(variables or {})
    )
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    client = Client(f"http://127.0.0.1:{port}", "", retries=0, timeout=None)
    with closing(Child(command, environment, directory / f"server-{port}.log")) as server:
        while client.answers("/health") is None:
            server.check(server.log_size)
            time.sleep(1)
        yield port


def train_demo_model(directory: Path) -> str:
    from sera_plugin.tools.demo.base_model import train_base_model

    train_base_model(directory)
    return str(directory)


def make_adapter(model: Any, directory: Path) -> PeftModel:
    """A LoRA of rank 16 with weights that are not zero."""
    torch.manual_seed(0)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    policy = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=targets))
    for weight_name, weight in policy.named_parameters():
        if "lora_B" in weight_name:
            torch.nn.init.normal_(weight, std=0.01)
    policy.save_pretrained(str(directory))
    return policy


def read_prompts(arguments: argparse.Namespace, tokenizer: Any) -> list[TokenIds]:
    if arguments.data:
        opened = gzip.open if arguments.data.suffix == ".gz" else open
        with opened(arguments.data, "rt", encoding="utf-8") as file:
            texts = [json.loads(line)["prompt"] for line in file][: arguments.prompts]
    else:
        from random import Random

        from sera_plugin.tools.demo.world import make_prompt

        random = Random(0)
        texts = [make_prompt(random) for _ in range(arguments.prompts)]
    return [
        np.array(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
            ),
            dtype=np.int32,
        )
        for text in texts
    ]


def table(
    arguments: argparse.Namespace,
    name: str,
    prompts: list[TokenIds],
    results: dict[str, list[dict[str, float]]],
) -> str:
    def median(engine: str, key: str) -> float:
        return statistics.median(one[key] for one in results[engine])

    def against(engine: str, key: str) -> float:
        """Median over rounds of the ratio to transformers in the same round."""
        pairs = zip(results[engine], results["transformers"], strict=True)
        return statistics.median(one[key] / other[key] for one, other in pairs)

    device = torch.cuda.get_device_name() if CUDA else f"{os.cpu_count()} CPU cores, no GPU"
    what = f"`{Path(name).name}`" if arguments.model else "the demo's model"
    data = f"`{arguments.data.name}`" if arguments.data else "the demo's world"
    versions = ", ".join(f"{one} {version(one)}" for one in ("torch", "transformers", "peft"))
    lines = [
        f"{date.today():%Y-%m-%d}, {device}, Python {platform.python_version()}, {versions}, vLLM "
        f"{find_vllm(arguments.vllm_python)}, {str(DTYPE).split('.')[1]}.",
        f"Model: {what} with a LoRA of rank 16. {len(prompts)} prompts of {data} "
        f"({np.mean([len(one) for one in prompts]):.0f} tokens on average), 4 candidates each of "
        f"up to {arguments.max_new_tokens} tokens; {arguments.rounds} rounds, medians.",
        "",
        "| sampler | tokens/s | against transformers | start, s | stop, s | whole phase, s "
        "| whole phase against transformers | peak memory, GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for engine in results:
        lines.append(
            f"| {engine} | {median(engine, 'rate'):,.0f} | {against(engine, 'rate'):.2f}x "
            f"| {median(engine, 'start'):.1f} | {median(engine, 'stop'):.1f} "
            f"| {median(engine, 'seconds'):.1f} | {1 / against(engine, 'seconds'):.2f}x "
            f"| {median(engine, 'memory'):.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
