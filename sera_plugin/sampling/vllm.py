"""Sampling with a vLLM that lives for the phase only: a server on loopback, as a child process."""

from __future__ import annotations

import json
import logging
import secrets
import socket
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

from sera_plugin.algorithm.protocols import Chunk, SamplingSettings, TokenIds
from sera_plugin.rundir.ranks import WHOLE, Shard
from sera_plugin.sampling.child import Child, ChildFailed, explain
from sera_plugin.sampling.client import Client
from sera_plugin.sampling.interpreter import child_environment, serves_four_bit
from sera_plugin.sampling.prompts import SamplingFailed, longest_first, room

LOG = logging.getLogger("axolotl.sera")

#: vLLM's own `vllm` program does not start in its CPU build.
SERVER = "vllm.entrypoints.openai.api_server"
#: What vLLM takes as `max_lora_rank`.
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
#: The name under which a child serves the policy.
_POLICY = "policy"
#: Seconds in which a server that stopped answering shows how it ended.
_ENDS_WITHIN = 10.0


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


class VllmSampler:
    """Samples from a vLLM server of its own, which is started for the phase and gone after it.

    Args:
        python: interpreter of the environment that has vLLM.
        policy: what to serve.
        options: the host's `vllm:` block, keys that are unset left out.
        log: what the server prints goes here.
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
            SamplingFailed: with what happened, the end of the server's log and what to change.
        """
        settings = settings.within(self.longest)
        rows = longest_first(prompts, skip)
        if not rows:
            return
        limits = {row: room(row, prompts[row], settings) for row in rows}
        lengths = [len(prompts[row]) + limits[row] for row in rows]
        mine = self.shard.of(rows, lengths)
        with self.make_room(max(lengths)) as memory:
            if not mine:
                return
            weights = self._weights(memory)
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            key = secrets.token_urlsafe()
            environment = child_environment(self.python, memory.devices) | {"VLLM_API_KEY": key}
            if memory.utilization is None:
                environment.setdefault("VLLM_CPU_KVCACHE_SPACE", str(memory.cache_gib))
            options = self._engine(max(lengths), memory, weights)
            flags = [_flag(name, value) for name, value in options.items()]
            command = [self.python, "-m", SERVER, f"--port={port}", *flags]
            # A connection that the server has closed while it was idle is opened again.
            client = Client(f"http://127.0.0.1:{port}", key, retries=1, remedy="", timeout=None)
            LOG.info("SeRA: starting vLLM; what it prints goes to %s", self.log)
            starting = perf_counter()
            child = Child(command, environment, self.log)
            try:
                while client.answers("/health") is None:
                    child.check(child.log_size)
                    sleep(0.5)
                self._started(client.version(), weights, perf_counter() - starting)
                yield from client.sample(
                    _POLICY,
                    prompts,
                    {row: limits[row] for row in mine},
                    settings,
                    self.policy.vocabulary,
                    lambda: child.check(lambda: _tokens(client)),
                )
            except ChildFailed as failure:
                raise SamplingFailed(explain(failure)) from None
            except SamplingFailed as failure:
                reason = child.ended(_ENDS_WITHIN) or str(failure)
                raise SamplingFailed(explain(child.failed(reason))) from None
            finally:
                stopping = perf_counter()
                child.close()
                self.seconds["stop_engine"] = round(perf_counter() - stopping, 3)

    def _weights(self, memory: Memory) -> str:
        """The format to serve the base model's weights in.

        Raises:
            SamplingFailed: if there is none that this vLLM can load and that fits.
        """
        quantized = self.policy.quantized
        try:
            if quantized == "nf4" and serves_four_bit(self.python):
                return "bitsandbytes nf4"
        except RuntimeError as error:
            raise SamplingFailed(f"sampling with vLLM stopped: {error}.") from None
        if quantized and not memory.whole_fits:
            raise SamplingFailed(
                f"sampling with vLLM stopped: this vLLM cannot load the base model in {quantized}, "
                f"and in {self.policy.dtype} it does not fit into the memory that is free. Install "
                "vLLM's bitsandbytes plugin package into its environment, or set sera.sampler to "
                "transformers or vllm-server."
            )
        return self.policy.dtype

    def _engine(self, length: int, memory: Memory, weights: str) -> dict[str, Any]:
        """vLLM's options for this phase."""
        policy = self.policy
        engine: dict[str, Any] = {
            "model": policy.model,
            "served_model_name": "base" if policy.adapter else _POLICY,
            "host": "127.0.0.1",
            "dtype": policy.dtype,
            "max_model_len": length,
            "skip_tokenizer_init": True,
            "generation_config": "vllm",
            "enable_prefix_caching": True,
            "uvicorn_log_level": "warning",
            **policy.options,
        }
        if weights.startswith("bitsandbytes"):
            engine["quantization"] = "bitsandbytes"
        if memory.utilization is None:
            engine |= {
                # Compiling takes longer than it saves in a phase of minutes.
                "enforce_eager": True,
                # vLLM 0.30 cannot take a seed for a prompt that it prefills in parts on a CPU.
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(4096, length),
            }
        engine |= self.options
        if memory.utilization is not None:
            engine["gpu_memory_utilization"] = memory.utilization
        if policy.adapter:
            engine |= {
                "enable_lora": True,
                "max_loras": 1,
                "max_lora_rank": next(rank for rank in _LORA_RANKS if rank >= policy.rank),
                "lora_modules": {"name": _POLICY, "path": policy.adapter},
            }
        return engine

    def _started(self, version: str, weights: str, seconds: float) -> None:
        self.seconds["start_engine"] = round(seconds, 3)
        self.report |= {"version": version, "weights": weights}
        LOG.info(
            "SeRA: vLLM %s serves %s in %s, started in %.0f s",
            version,
            self.policy.adapter or self.policy.model,
            weights,
            seconds,
        )


def _flag(name: str, value: Any) -> str:
    """An option as vLLM's command line takes it."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag}={json.dumps(value) if isinstance(value, Mapping) else value}"


def _tokens(client: Client) -> list[str]:
    """The server's counts of tokens so far, which rise while it samples."""
    lines = (client.answers("/metrics") or "").splitlines()
    return [line for line in lines if line.startswith("vllm:generation_tokens_total")]
