"""What the vLLM of another interpreter can do, and the environment it runs in."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache

from sera_plugin.config.quoting import printable

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


def find_vllm(python: str) -> str:
    """The version of vLLM that an interpreter imports.

    Raises:
        RuntimeError: saying what is wrong with it.
    """
    return _answer(python, _VERSION)


@lru_cache
def serves_four_bit(python: str) -> bool:
    """Whether an interpreter's vLLM quantises a model with bitsandbytes while it loads.

    Raises:
        RuntimeError: saying what is wrong with it.
    """
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

    Args:
        python: the interpreter that will run there.
        devices: CUDA devices for it by number or name, empty for all that are visible.
    """
    environment = {name: value for name, value in os.environ.items() if not _OURS.match(name)}
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun has set it to 1 for each of its ranks
        environment.pop("OMP_NUM_THREADS", None)
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
