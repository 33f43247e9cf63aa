"""Sampling from two running vLLM servers against one of them, a thread each.

`SERA_VLLM_PYTHON` names the Python of an environment with vLLM's CPU build.
"""

import os
import time
from contextlib import ExitStack
from typing import Any

import numpy as np
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.harness import Setup, figure, interleave, markdown, times
from benchmarks.sampling import make_adapter, running_server
from benchmarks.workload import PROMPT_FORMAT, longest_of, make_model, read_rows, vocabulary_of
from sera_plugin.algorithm.method import SamplingSettings
from sera_plugin.sampling.child import find_vllm
from sera_plugin.sampling.servers import VllmServerSampler

TITLE = "Two servers"
NEW_TOKENS = 8
#: A second server is a second core, as it would be a second GPU.
ONE_THREAD = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}

Found = dict[int, list[list[int]]]


def measure(setup: Setup) -> dict[str, Any]:
    """Seconds of a phase by number of servers and round, and who has answered how much.

    Raises:
        ValueError: on a GPU, or without SERA_VLLM_PYTHON.
    """
    python = os.environ.get("SERA_VLLM_PYTHON")
    if setup.device != "cpu" or not python:
        raise ValueError(
            "two servers are measured on a CPU: set SERA_VLLM_PYTHON to the Python of an "
            "environment with vLLM's CPU build (`make test-slow` makes one)"
        )
    directory = make_model(setup)
    longest, vocabulary = longest_of(setup, directory), vocabulary_of(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    rows = read_rows(setup, 64, vocabulary, longest - NEW_TOKENS)
    texts = [PROMPT_FORMAT.format(row["prompt"]) for row in rows]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    prompts = [np.array(one[: longest - NEW_TOKENS], dtype=np.int32) for one in ids]
    adapter = setup.directory / "adapter"
    make_adapter(AutoModelForCausalLM.from_pretrained(directory), adapter)
    ends = (int(tokenizer.eos_token_id),)
    how = SamplingSettings(4, 0.7, 0.95, NEW_TOKENS, longest, ends, seed=1)
    found: dict[str, list[Found]] = {"1": [], "2": []}
    shares: list[int] = []

    def phase(urls: list[str]) -> float:
        sampler = VllmServerSampler(urls, "", str(directory), adapter, tokenizer, vocabulary)
        start = time.perf_counter()
        chunks = [one for chunk in sampler.sample(prompts, how) for one in chunk]
        seconds = time.perf_counter() - start
        given = {row: [list(one.token_ids) for one in several] for row, several in chunks}
        found[str(len(urls))].append(given)
        if len(urls) == 2:
            shares.append(min(sampler.report["servers"].values()))
        return seconds

    with ExitStack() as stack:
        server = (python, str(directory), longest, setup.directory)
        ports = [stack.enter_context(running_server(*server, ONE_THREAD)) for _ in range(2)]
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        sides = {str(count): lambda count=count: phase(urls[:count]) for count in (1, 2)}
        seconds = interleave(sides, setup.rounds, warm_up=False)
    return {
        "prompts": len(prompts),
        "prompt_tokens": int(sum(map(len, prompts))),
        "new_tokens": sum(len(one) for several in found["1"][-1].values() for one in several),
        "vllm": find_vllm(python),
        "seconds": seconds,
        "fewest_of_a_server": shares,
        "equal": [
            sum(one[row] == two[row] for row in one)
            for one, two in zip(found["1"], found["2"], strict=True)
        ],
    }


def table(result: dict[str, Any]) -> str:
    seconds, total = result["seconds"], result["prompts"]
    rows = [
        [servers, figure(seconds[servers], 1), times(seconds["1"], seconds[servers])]
        for servers in ("1", "2")
    ]
    return (
        f"vLLM {result['vllm']}; {total} prompts of {result['prompt_tokens']:,} tokens, 4 "
        f"candidates each, {result['new_tokens']:,} tokens in all; a LoRA of rank 16. Of two "
        f"servers the one with fewer answered {figure(result['fewest_of_a_server'])} prompts. "
        f"Candidates that are the same token for token as one server's: of "
        f"{figure(result['equal'])} prompts.\n\n"
        + markdown(("servers", "a phase, s", "faster by"), rows)
    )
