"""Sampling with a vLLM that lives for the phase only: a child process on the trainer's own GPU."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from sera_plugin.algorithm.protocols import Candidate, Chunk, SamplingSettings, TokenIds
from sera_plugin.config.quoting import printable
from sera_plugin.rundir.ranks import WHOLE, Shard
from sera_plugin.sampling.answers import read_candidates
from sera_plugin.sampling.child import Child, ChildFailed
from sera_plugin.sampling.prompts import SamplingFailed, longest_first, room

LOG = logging.getLogger("axolotl.sera")
WORKER = Path(__file__).with_name("vllm_worker.py")

#: What vLLM takes as `max_lora_rank`.
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
#: Variables that tell a process which rank it is; the child is not one of our ranks.
_DISTRIBUTED = re.compile(
    r"(RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|NODE_RANK|MASTER_ADDR|MASTER_PORT)$"
    r"|GROUP_|ROLE_|TORCHELASTIC_|ACCELERATE_|FSDP_|DEEPSPEED_"
)
_TAIL = 15


@dataclass(frozen=True)
class ServedPolicy:
    """theta_{t-1} as an engine loads it.

    Attributes:
        model: the base model, or the directory of a policy with weights of its own.
        adapter: the policy's adapter directory, or None.
        rank: the adapter's largest rank.
        dtype: of the weights and the computation, as vLLM names it.
        quantized: how training quantised the base ("nf4", "fp4", "8-bit"), or None.
        options: what else the model needs to load (revision, overrides of its configuration).
        vocabulary: number of token ids that the model knows.
    """

    model: str
    adapter: str | None
    rank: int
    dtype: str
    quantized: str | None
    options: Mapping[str, Any]
    vocabulary: int


@dataclass(frozen=True)
class Memory:
    """What an accelerator (or the host, on a CPU) has left for an engine.

    Attributes:
        utilization: the share of the device's memory that the engine may take, None on a CPU.
        whole_fits: whether the unquantised weights fit into it.
        devices: CUDA devices for the engine by number, empty on a CPU.
        cache_gib: for a CPU, room for the engine's cache.
    """

    utilization: float | None
    whole_fits: bool
    devices: tuple[str, ...] = ()
    cache_gib: int = 1


def adapter_problem(config: Mapping[str, Any]) -> str | None:
    """Why vLLM would not serve an adapter with this PEFT configuration as it was trained."""
    if str(config.get("peft_type", "LORA")).split(".")[-1] != "LORA":
        return f"vLLM serves LoRA adapters, not {config['peft_type']}"
    if config.get("use_dora"):
        return "vLLM does not serve DoRA adapters (peft_use_dora)"
    if config.get("modules_to_save"):
        return "vLLM does not serve adapters with lora_modules_to_save"
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        return "vLLM knows one rank and one alpha per adapter, not a pattern of them"
    if config.get("bias", "none") != "none":
        return f"vLLM does not serve adapters that train biases ({config['bias']})"
    if config["r"] > _LORA_RANKS[-1]:
        return f"vLLM serves ranks up to {_LORA_RANKS[-1]}, not {config['r']}"
    return None


def find_vllm(python: str) -> str:
    """The version of vLLM that an interpreter imports.

    Raises:
        RuntimeError: saying what is wrong with it.
    """
    command = [python, "-c", "import vllm; print(); print('vllm', vllm.__version__)"]
    try:
        # No shell; the interpreter that the YAML names.
        result = subprocess.run(
            command, env=child_environment(python), capture_output=True, text=True, timeout=300
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"{python} does not run: {error}") from None
    lines = (result.stdout.splitlines() or [""])[-1].split()
    if result.returncode == 0 and lines[:1] == ["vllm"]:
        return lines[1]
    said = [printable(line) for line in result.stderr.splitlines() if line.strip()]
    if said and "No module named 'vllm'" in said[-1]:
        raise RuntimeError(f"vLLM is not installed in {python}")
    raise RuntimeError(f"vLLM cannot be imported by {python}: {said[-1] if said else 'no output'}")


def child_environment(python: str, devices: Sequence[str] = ()) -> dict[str, str]:
    """This process's environment without what would mislead an engine in another process."""
    environment = {
        name: value for name, value in os.environ.items() if not _DISTRIBUTED.match(name)
    }
    if python != sys.executable:
        for name in ("PYTHONPATH", "PYTHONHOME"):
            environment.pop(name, None)
    environment |= {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "PYTHONUNBUFFERED": "1",
        # An engine serves this process alone: nothing of it listens on the network, whichever
        # interfaces the training processes use among each other.
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_LOOPBACK_IP": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
    }
    if devices:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    return environment


def sampling_fields(settings: SamplingSettings) -> dict[str, Any]:
    """Every field that shapes a distribution, so that no engine's or model's default does."""
    return {
        "n": settings.candidates,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": 0,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "min_tokens": 0,
        # The end tokens are ours, and the same for every engine.
        "ignore_eos": True,
        "stop_token_ids": list(settings.end_ids),
        "skip_special_tokens": False,
    }


class VllmSampler:
    """Samples in a child process with vLLM's offline engine.

    Args:
        python: interpreter of the environment that has vLLM.
        policy: what to serve.
        options: the host's `vllm:` block, keys that are unset left out.
        log: what the child prints goes here.
        make_room: frees accelerator memory for as long as its block lasts.
        shard: this process's part of the prompts. Without any it makes room and waits: another
            process has the engine on its device.
    """

    def __init__(
        self,
        python: str,
        policy: ServedPolicy,
        options: Mapping[str, Any],
        log: Path,
        make_room: Callable[[int], AbstractContextManager[Memory]],
        shard: Shard = WHOLE,
    ) -> None:
        self.python = python
        self.policy = policy
        self.options = options
        self.log = log
        self.make_room = make_room
        self.shard = shard
        self.report: dict[str, Any] = {"name": "vllm"}
        self.seconds: dict[str, float] = {}
        self.longest: int | None = options.get("max_model_len")

    def sample(
        self,
        prompts: Sequence[TokenIds],
        settings: SamplingSettings,
        skip: Collection[int] = (),
    ) -> Generator[Chunk, None, None]:
        """See `CandidateSampler.sample`.

        Raises:
            ValueError: for a prompt that leaves no room to sample.
            SamplingFailed: with what happened, the end of the child's log and what to change.
        """
        settings = settings.within(self.longest)
        rows = longest_first(prompts, skip)
        if not rows:
            return
        jobs = [
            [row, prompts[row].tolist(), room(row, prompts[row], settings), settings.stream(row)]
            for row in rows
        ]
        length = max(len(token_ids) + limit for _, token_ids, limit, _ in jobs)
        mine = self.shard.of(jobs, [len(token_ids) + limit for _, token_ids, limit, _ in jobs])
        limits = {row: limit for row, _, limit, _ in mine}
        with self.make_room(length) as memory:
            if not mine:
                return
            job = {
                "engine": self._engine(length, memory),
                "quantized": self.policy.quantized,
                "whole_fits": memory.whole_fits,
                "adapter": self.policy.adapter,
                "sampling": sampling_fields(settings),
                "prompts": mine,
            }
            environment = child_environment(self.python, memory.devices)
            if memory.utilization is None:
                environment.setdefault("VLLM_CPU_KVCACHE_SPACE", str(memory.cache_gib))
            LOG.info("SeRA: starting vLLM; what it prints goes to %s", self.log)
            starting = perf_counter()
            child = Child([self.python, str(WORKER)], job, environment, self.log)
            try:
                for message in child.messages():
                    if "ready" in message:
                        self._started(message["ready"], perf_counter() - starting)
                    elif message["chunk"]:
                        yield [
                            (row, self._read(row, choices, limits.pop(row, None), settings))
                            for row, choices in message["chunk"]
                        ]
            except ChildFailed as failure:
                raise SamplingFailed(_explain(failure)) from None
            finally:
                stopping = perf_counter()
                child.close()
                self.seconds["stop_engine"] = round(perf_counter() - stopping, 3)

    def _engine(self, length: int, memory: Memory) -> dict[str, Any]:
        """vLLM's engine options for this phase."""
        on_cpu = memory.utilization is None
        engine = {
            "model": self.policy.model,
            "dtype": self.policy.dtype,
            "max_model_len": length,
            "skip_tokenizer_init": True,
            "generation_config": "vllm",
            "enable_prefix_caching": True,
            "disable_log_stats": True,
            **self.policy.options,
        }
        if on_cpu:
            engine |= {
                # Compiling takes longer than it saves in a phase of minutes.
                "enforce_eager": True,
                # vLLM 0.30 cannot take a seed for a prompt that it prefills in parts on a CPU.
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(4096, length),
            }
        engine |= self.options
        if not on_cpu:
            engine["gpu_memory_utilization"] = memory.utilization
        if self.policy.adapter:
            engine |= {
                "enable_lora": True,
                "max_loras": 1,
                "max_lora_rank": next(rank for rank in _LORA_RANKS if rank >= self.policy.rank),
            }
        return engine

    def _read(
        self, row: int, choices: object, limit: int | None, settings: SamplingSettings
    ) -> list[Candidate]:
        try:
            if limit is None:
                raise ValueError("it is not waiting for an answer")
            return read_candidates(choices, settings, limit, self.policy.vocabulary)
        except ValueError as error:
            raise SamplingFailed(
                f"vLLM answers the prompt of row {row} wrongly: {error}. Nothing of it is stored. "
                "Use a vLLM that docs/sampling.md lists, or set sera.sampler: transformers."
            ) from None

    def _started(self, ready: Mapping[str, Any], seconds: float) -> None:
        self.seconds["start_engine"] = round(seconds, 3)
        self.report |= ready
        LOG.info(
            "SeRA: vLLM %s serves %s in %s, started in %.0f s",
            ready["version"],
            self.policy.adapter or self.policy.model,
            ready["weights"],
            seconds,
        )


def _explain(failure: ChildFailed) -> str:
    """What happened, the first error in the log, its end, and what to change."""
    lines = [printable(line) for line in failure.printed.splitlines()]
    errors = re.findall(r"\b[A-Z]\w*(?:Error|Exception): .+", "\n".join(lines))
    reason = printable(" ".join(failure.reason.split())).rstrip(".")
    text = "\n".join([failure.reason, *errors])
    remedy = next(
        (advice for pattern, advice in _REMEDIES if re.search(pattern, text, re.IGNORECASE)),
        "If the log does not tell what to change, set sera.sampler: transformers.",
    )
    return "\n".join(
        [
            f"sampling with vLLM stopped: {reason}.",
            *([f"The first error in its log: {errors[0]}"] if errors else []),
            f"The end of {failure.log}:",
            *(f"  | {line}" for line in lines[-_TAIL:]),
            f"What to do: {remedy}",
            "What was sampled is kept: with `auto_resume_from_checkpoints: true` the same command "
            "goes on from there.",
        ]
    )


#: What a log says, and what helps.
_REMEDIES = (
    (
        r"out of memory|available memory|free memory|cache blocks|larger than the available KV",
        "the engine did not find enough memory. End other programs on the GPU, lower "
        "sera.max_new_tokens or vllm.max_model_len, set vllm.enforce_eager: true, or leave "
        "vllm.gpu_memory_utilization out so that it is derived from what is free.",
    ),
    (
        r"max_model_len \(\d+\) is greater than",
        "prompt and candidate do not fit into the model's own context: lower sequence_len, "
        "sera.max_new_tokens or vllm.max_model_len to it.",
    ),
    (
        r"killed by SIGKILL",
        "something outside killed it. If host memory was short, end other programs.",
    ),
    (
        r"it hung",
        "run it again. If it hangs at the same place, set vllm.enforce_eager: true or "
        "sera.sampler: transformers.",
    ),
    (
        r"No module named|cannot import name|undefined symbol",
        "sera.vllm_python names an environment whose vLLM does not load; docs/sampling.md says how "
        "to make one.",
    ),
    (
        r"does not know the option|unexpected keyword argument",
        "this vLLM lacks something that is used here; docs/sampling.md lists versions.",
    ),
)
