"""Sampling with vLLM in a server of our own: a child on loopback that lives for the phase only."""

import json
import logging
import secrets
import socket
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

from peft import LoraConfig

from sera_plugin.config.quoting import plain, quoted
from sera_plugin.model.losses import LOW_PRECISION_LIMIT
from sera_plugin.rundir.progress import EVERY
from sera_plugin.rundir.ranks import WHOLE, Shard
from sera_plugin.sampling.child import (
    Child,
    ChildFailed,
    SamplingFailed,
    child_environment,
    serves_four_bit,
)
from sera_plugin.sampling.client import Client
from sera_plugin.sampling.engine import EngineSampler, Serving

LOG = logging.getLogger("axolotl.sera")

#: What vLLM takes as `max_lora_rank`.
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
#: vLLM's own `vllm` program does not start in its CPU build.
SERVER = "vllm.entrypoints.openai.api_server"
_POLICY = "policy"  # the name under which a child serves the policy
_ENDS_WITHIN = 10.0  # seconds in which a server that stopped answering shows how it ended
#: Where a running server's key is looked for; the variable that `vllm serve` itself reads.
API_KEY = "VLLM_API_KEY"

#: Of a PEFT configuration: where an adapter belongs, and what shapes the product B.A alone.
_SERVED = frozenset(
    [
        *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path"),
        *("revision", "inference_mode", "r", "lora_alpha", "use_rslora", "lora_dropout"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("init_lora_weights", "fan_in_fan_out"),
    ]
)
#: Ways to begin that leave the base model's weights as they are; PiSSA and its like do not.
_INITIAL = (None, True, False, "gaussian", "orthogonal")


def adapter_problem(config: Mapping[str, Any]) -> str | None:
    """Why vLLM would not serve an adapter with this PEFT configuration as it was trained.

    vLLM adds B.A, of one rank and one scale, to the weights of the base model as it was published.
    Whatever PEFT has beyond that, today or in a version to come, is not served.
    """
    if str(config.get("peft_type", "LORA")).split(".")[-1] != "LORA":
        return f"vLLM serves LoRA adapters, not {plain(str(config['peft_type']))}"
    if config.get("init_lora_weights") not in _INITIAL:
        return _other_than("init_lora_weights", config["init_lora_weights"])
    usual = LoraConfig().to_dict()
    for name, value in config.items():
        off = value in (None, False, "none") or value == usual.get(name) or value in ([], {})
        if name not in _SERVED and not off:
            return _other_than(name, value)
    rank = config.get("r")
    if type(rank) is not int or not 1 <= rank <= LORA_RANKS[-1]:
        return f"vLLM serves ranks from 1 up to {LORA_RANKS[-1]}, not {quoted(rank)}"
    return None


def _other_than(name: str, value: object) -> str:
    """The sentence, with the field as the host's YAML calls it."""
    lora = ("modules_to_save", "target_parameters", "rank_pattern", "alpha_pattern")
    host = f"lora_{name}" if name in lora else name
    if name.startswith(("init_", "use_", "layer_", "trainable_")):
        host = f"peft_{name}"
    return (
        f"vLLM adds one product B.A to the base model's own weights, and an adapter with {host}: "
        f"{plain(repr(value))} is more than that"
    )


@dataclass(frozen=True)
class ServedPolicy:
    """theta_{t-1} as an engine loads it."""

    model: str  # the base model, or the directory of a policy with weights of its own
    adapter: str | None  # the policy's adapter directory
    rank: int  # its largest
    dtype: str  # of the weights and the computation, as vLLM names it
    quantized: str | None  # how training quantised the base ("nf4", "fp4", "8-bit")
    options: Mapping[str, Any]  # what else loading takes: revision, overrides of the configuration
    vocabulary: int  # number of token ids that the model knows


@dataclass(frozen=True)
class Memory:
    """What an accelerator (or the host, on a CPU) has left for an engine."""

    utilization: float | None  # the share of the device's memory that it may take, None on a CPU
    whole_fits: bool  # whether the unquantised weights fit into it
    devices: tuple[str, ...] = ()  # CUDA devices for the engine by number, empty on a CPU
    cache_gib: int = 1  # for a CPU, room for the engine's cache


class VllmSampler(EngineSampler):
    """Samples from a vLLM server of its own, which is started for the phase and gone after it.

    `python` is of the environment that has vLLM, `options` the host's `vllm:` block without unset
    keys. What the server prints goes into `log`. `make_room` frees accelerator memory while its
    block lasts. A process without any of the prompts makes room and waits: another one has the
    engine on its device.
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
        super().__init__("vllm", policy.vocabulary, shard, options.get("max_model_len"))
        self.python, self.policy, self.options = python, policy, options
        self.log, self.make_room = log, make_room

    @contextmanager
    def _serving(self, length: int, memory: Memory) -> Generator[Serving, None, None]:
        weights = self._weights(memory)
        if self.policy.quantized and weights != self.policy.dtype:
            self.tolerance = LOW_PRECISION_LIMIT
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        key = secrets.token_urlsafe()
        environment = child_environment(self.python, memory.devices) | {API_KEY: key}
        if memory.utilization is None:
            environment.setdefault("VLLM_CPU_KVCACHE_SPACE", str(memory.cache_gib))
        flags = [_flag(*option) for option in self._engine(length, memory, weights).items()]
        # A connection that the server has closed while it was idle is opened again.
        client = Client(f"http://127.0.0.1:{port}", key, retries=1, timeout=None)
        LOG.info("SeRA: starting vLLM; what it prints goes to %s", self.log)
        starting = perf_counter()
        child = Child([self.python, "-m", SERVER, f"--port={port}", *flags], environment, self.log)
        try:
            said = starting
            while client.answers("/health") is None:
                child.check(child.log_size)
                sleep(0.5)
                if perf_counter() - said > EVERY:
                    said = perf_counter()
                    LOG.info("SeRA: vLLM is still starting (%.0f s)", said - starting)
            self.report |= {"version": client.version(), "weights": weights}
            self.seconds["start_engine"] = round(perf_counter() - starting, 3)
            serves = f"{self.policy.adapter or self.policy.model} in {weights}"
            took = f"started in {self.seconds['start_engine']:.0f} s"
            LOG.info("SeRA: vLLM %s serves %s, %s", self.report["version"], serves, took)
            yield [client], _POLICY, lambda: child.check(lambda: _tokens(client))
        except ChildFailed:
            raise
        except SamplingFailed as failure:
            raise child.failed(child.ended(_ENDS_WITHIN) or str(failure)) from None
        finally:
            stopping = perf_counter()
            child.close()
            self.seconds["stop_engine"] = round(perf_counter() - stopping, 3)

    def _weights(self, memory: Memory) -> str:
        """The format to serve the base model's weights in."""
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
                "max_lora_rank": next(rank for rank in LORA_RANKS if rank >= policy.rank),
                "lora_modules": {"name": _POLICY, "path": policy.adapter},
            }
        return engine


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
