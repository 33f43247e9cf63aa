"""Child processes of another Python: what its vLLM can do, and a server that cannot outlive us.

Everything that a child prints goes to a log file, which tells what went wrong. `lifeline` holds the
other end of its standard input.
"""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from time import monotonic

import psutil

from sera_plugin.config.quoting import printable
from sera_plugin.rundir.writing import open_own
from sera_plugin.sampling import lifeline

#: A child that shows no sign of life for this many seconds is hung.
PATIENCE = 900.0
#: Seconds that processes get to end by themselves before they are killed.
GRACE = 10.0
#: Variables that tell a process which rank it is, or how training shares its device. An engine is
#: not one of our ranks and has its own way with memory.
_OURS = re.compile(
    r"(RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|NODE_RANK|MASTER_ADDR|MASTER_PORT"
    r"|PYTORCH_(CUDA_|HIP_)?ALLOC_CONF)$"
    r"|GROUP_|ROLE_|TORCHELASTIC_|ACCELERATE_|FSDP_|DEEPSPEED_|RAY_"
)
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


@lru_cache
def find_vllm(python: str) -> str:
    """The version of vLLM that an interpreter imports; a RuntimeError says why it has none."""
    return _answer(python, "import vllm; print(); print('vllm', vllm.__version__)")


@lru_cache
def serves_four_bit(python: str) -> bool:
    """Whether an interpreter's vLLM quantises a model with bitsandbytes while it loads."""
    return _answer(python, _FOUR_BIT) == "True"


def _answer(python: str, code: str) -> str:
    command, environment = [python, "-c", code], child_environment(python)
    try:  # no shell; the interpreter that the YAML names
        result = subprocess.run(
            command, env=environment, capture_output=True, errors="replace", timeout=300
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"{python} does not run: {error}") from None
    found = re.search(r"^vllm ([\w.+!-]{1,60})\s*\Z", result.stdout, re.ASCII | re.MULTILINE)
    if result.returncode == 0 and found:
        return found[1]
    said = [printable(line) for line in result.stderr.splitlines() if line.strip()]
    if said and "No module named 'vllm'" in said[-1]:
        raise RuntimeError(f"vLLM is not installed in {python}")
    why = said[-1][:500] if said else "it says no version"
    raise RuntimeError(f"vLLM cannot be imported by {python}: {why}")


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


class SamplingFailed(RuntimeError):
    """Sampling stopped. Finished chunks are kept and the next try goes on from them."""


class ChildFailed(SamplingFailed):
    """The child ended or hung: `explain` has made the message."""


class Child:
    """A running child. `environment` is all of its environment; what it prints goes to the log."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(open_own(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab") as file:
            self._log_start = file.tell()
            # No shell; our own file, and the interpreter that the YAML names.
            self._process = subprocess.Popen(
                [sys.executable, "-I", lifeline.__file__, str(GRACE), *command],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=file,
                env=dict(environment),
                cwd=log.parent,
                start_new_session=True,  # Ctrl-C is for us to pass on
            )
        self._seen: object = None
        self._since = monotonic()

    def check(self, sign: Callable[[], object]) -> None:
        """To be called every second or so; `sign` gives something else after any progress.

        ChildFailed if the child has ended, or has made no progress for `PATIENCE` seconds.
        """
        if (end := self.ended(0)) is not None:
            raise self.failed(end)
        seen = sign()
        if seen != self._seen:
            self._seen, self._since = seen, monotonic()
        elif monotonic() - self._since > PATIENCE:
            raise self.failed(f"it hung: no progress for {PATIENCE:.0f} seconds")

    def ended(self, within: float) -> str | None:
        """How it ended, None if it has not within some seconds."""
        try:
            code = self._process.wait(within)
        except subprocess.TimeoutExpired:
            return None
        if code >= 0:
            return f"it ended with exit code {code}"
        killer = " (often the operating system, out of memory)" if -code == signal.SIGKILL else ""
        return f"it was killed by {signal.Signals(-code).name}{killer}"

    def log_size(self) -> int:
        """Bytes in its log: loading and compiling answer nothing for minutes, but they log."""
        return self.log.stat().st_size

    def failed(self, reason: str) -> ChildFailed:
        """What to raise, with the end of what this child has printed."""
        printed = self.log.read_bytes()[self._log_start :][-65_536:]
        return ChildFailed(explain(reason, printed.decode("utf-8", "replace"), self.log))

    def close(self) -> None:
        """End the child and every process it has started; returns when they are gone."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        for process in psutil.process_iter():  # where somebody has killed the lifeline itself
            with suppress(psutil.Error, OSError):
                if os.getsid(process.pid) == self._process.pid:
                    process.kill()


#: An error in a log. A warning quotes the one it warns of; pydantic says the cause a line later.
_ERROR = re.compile(
    r"(?<![`\w])[A-Z]\w*(?:Error|Exception): .+|Value error, .+|error: unrecognized arguments: .+"
)


def explain(reason: str, printed: str, log: Path) -> str:
    """What happened, the first error in the log, its end, and what to change."""
    lines = [printable(line) for line in printed.splitlines()]
    errors = _ERROR.findall("\n".join(lines))
    text = "\n".join([reason, *errors])
    remedies = (a for pattern, a in _REMEDIES.items() if re.search(pattern, text, re.IGNORECASE))
    return "\n".join(
        [
            f"sampling with vLLM stopped: {printable(' '.join(reason.split())).rstrip('.')}.",
            *(f"The first error in its log: {error}" for error in errors[:1]),
            f"The end of {log}:",
            *(f"  | {line}" for line in lines[-15:]),
            f"What to do: {next(remedies)}",
            "What was sampled is kept: with `auto_resume_from_checkpoints: true` the same command "
            "goes on from there.",
        ]
    )


#: What a log says, and what helps.
_REMEDIES = {
    "killed by SIGKILL": "something outside killed it. If host memory was short, end other "
    "programs.",
    "out of memory|available memory|free memory|cache blocks|larger than the available KV": "the "
    "engine did not find enough memory. End other programs on the GPU, lower sera.max_new_tokens "
    "or vllm.max_model_len, set vllm.enforce_eager: true, or leave vllm.gpu_memory_utilization out "
    "so that it is derived from what is free.",
    r"max_model_len \(\d+\) is greater than": "prompt and candidate do not fit into the model's "
    "own context: lower sequence_len, sera.max_new_tokens or vllm.max_model_len to it.",
    "it hung": "run it again. If it hangs at the same place, set vllm.enforce_eager: true or "
    "sera.sampler: transformers.",
    "No module named|cannot import name|undefined symbol": "sera.vllm_python names an environment "
    "whose vLLM does not load; docs/sampling.md says how to make one.",
    "unrecognized arguments|unexpected keyword argument": "this vLLM lacks something that is used "
    "here; docs/sampling.md lists versions.",
    "": "If the log does not tell what to change, set sera.sampler: transformers.",
}
