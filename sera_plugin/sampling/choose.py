"""Which sampler a run takes and why: what another interpreter's vLLM can do, what vLLM serves."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sera_plugin.config.quoting import printable

SAMPLERS = ("transformers", "vllm", "vllm-server")
#: What vLLM takes as `max_lora_rank`.
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)

#: Variables that tell a process which rank it is, or how training shares its device. An engine is
#: not one of our ranks and has its own way with memory.
_OURS = re.compile(
    r"(RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|NODE_RANK|MASTER_ADDR|MASTER_PORT"
    r"|PYTORCH_(CUDA_|HIP_)?ALLOC_CONF)$"
    r"|GROUP_|ROLE_|TORCHELASTIC_|ACCELERATE_|FSDP_|DEEPSPEED_"
)
_VERSION = "import vllm; print(); print('vllm', vllm.__version__)"
_FOUR_BIT = """
import importlib.util
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins
load_general_plugins()  # from 0.28 on bitsandbytes comes in a package of its own
print()
print('vllm', 'bitsandbytes' in QUANTIZATION_METHODS and current_platform.is_cuda_alike()
    and importlib.util.find_spec('bitsandbytes') is not None)
"""


@dataclass(frozen=True)
class Choice:
    """A sampler as in `sera.sampler`, and why; `fell_back` where the YAML names another one."""

    name: str
    reason: str
    fell_back: bool = False


def choose_sampler(asked: str, python: str, problem: str | None) -> Choice:
    """Decide once, when a run starts.

    `asked` is `sera.sampler`, `python` the interpreter that should have vLLM, and `problem` why it
    would not serve this kind of policy, or None.

    Raises:
        ValueError: if vLLM is asked for by name and its interpreter does not import it.
    """
    if asked == "transformers":
        return Choice(asked, "in the training process, as sera.sampler says")
    if problem:
        return Choice("transformers", f"in the training process: {problem}", asked != "auto")
    if asked == "vllm-server":
        return Choice(asked, "a running server, as sera.sampler says")
    try:
        version = find_vllm(python)
    except RuntimeError as error:
        if asked == "vllm":
            raise ValueError(
                f"sera.sampler: vllm, but {error}. Set sera.vllm_python to the Python of an "
                "environment that has vLLM (docs/sampling.md says how to make one), or set "
                "sera.sampler to auto or transformers."
            ) from None
        return Choice("transformers", f"in the training process: {error}")
    return Choice("vllm", f"{version}, found in {python}; starts for each sampling phase")


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
    if config["r"] > LORA_RANKS[-1]:
        return f"vLLM serves ranks up to {LORA_RANKS[-1]}, not {config['r']}"
    return None


def find_vllm(python: str) -> str:
    """The version of vLLM that an interpreter imports; a RuntimeError says why it has none."""
    return _answer(python, _VERSION)


@lru_cache
def serves_four_bit(python: str) -> bool:
    """Whether an interpreter's vLLM quantises a model with bitsandbytes while it loads."""
    return _answer(python, _FOUR_BIT) == "True"


def _answer(python: str, code: str) -> str:
    try:
        # No shell; the interpreter that the YAML names.
        result = subprocess.run(
            [python, "-c", code],
            env=child_environment(python),
            capture_output=True,
            text=True,
            timeout=300,
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
    """This process's environment without what would mislead an engine in another process.

    `python` will run there, with CUDA `devices` by number or name, none for all that are visible.
    """
    environment = {name: value for name, value in os.environ.items() if not _OURS.match(name)}
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun has set it to 1 for each of its ranks
        environment.pop("OMP_NUM_THREADS", None)
    if python != sys.executable:
        environment.pop("PYTHONPATH", None)
        environment.pop("PYTHONHOME", None)
    environment |= dict.fromkeys(("VLLM_NO_USAGE_STATS", "DO_NOT_TRACK", "PYTHONUNBUFFERED"), "1")
    environment["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    # An engine serves this process alone: nothing of it listens on the network, whichever
    # interfaces the training processes use among each other.
    environment |= dict.fromkeys(("VLLM_HOST_IP", "VLLM_LOOPBACK_IP"), "127.0.0.1")
    environment |= dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), "lo")
    if devices:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    return environment
