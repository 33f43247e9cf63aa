"""A child process that cannot outlive the training process, and that says what went wrong.

Everything it prints goes to a log file. `lifeline` holds the other end of its standard input.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep

import psutil

from sera_plugin.config.quoting import printable
from sera_plugin.sampling import lifeline

#: A child that shows no sign of life for this many seconds is hung.
PATIENCE = 900.0
#: Seconds that processes get to end by themselves before they are killed.
GRACE = 15.0
#: Lines of the log that a failure quotes.
_TAIL = 15


class ChildFailed(RuntimeError):
    """The child ended or hung.

    Attributes:
        reason: what happened, in one sentence.
        printed: the end of what it printed.
        log: the file with the rest.
    """

    def __init__(self, reason: str, printed: str, log: Path) -> None:
        super().__init__(reason)
        self.reason = reason
        self.printed = printed
        self.log = log


class Child:
    """A running child; a context manager that leaves no process behind.

    Args:
        command: what to run.
        environment: all of its environment.
        log: receives what it prints; appended to.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            self._log_start = file.tell()
            # No shell; our own file, and the interpreter that the YAML names.
            self._process = subprocess.Popen(
                [sys.executable, "-I", lifeline.__file__, *command],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=file,
                env=dict(environment),
                cwd=log.parent,
                start_new_session=True,  # a group of its own; Ctrl-C is for us to pass on
            )
        self._family: dict[int, psutil.Process] = {}
        self._next_look = 0.0
        self._seen: object = None
        self._since = monotonic()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check(self, sign: Callable[[], object]) -> None:
        """Return at once where the child runs; to be called every second or so.

        Args:
            sign: gives something else whenever the child has made progress. It is called now and
                then only.

        Raises:
            ChildFailed: if the child has ended, or has made no progress for `PATIENCE` seconds.
        """
        if self._process.poll() is not None:
            raise self.failed(_how_it_ended(self._process.returncode))
        if monotonic() < self._next_look:
            return
        self._remember_family()
        seen = sign()
        self._next_look = monotonic() + PATIENCE / 60
        if seen != self._seen:
            self._seen, self._since = seen, monotonic()
        elif monotonic() - self._since > PATIENCE:
            raise self.failed(f"it hung: no progress for {PATIENCE:.0f} seconds")

    def ended(self, within: float) -> str | None:
        """How it ended, None if it has not within some seconds."""
        with suppress(subprocess.TimeoutExpired):
            return _how_it_ended(self._process.wait(within))
        return None

    def log_size(self) -> int:
        """Bytes in its log: loading and compiling answer nothing for minutes, but they log."""
        return self.log.stat().st_size

    def failed(self, reason: str) -> ChildFailed:
        """What to raise, with the end of what this child has printed."""
        with self.log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(self._log_start, size - 65_536))
            return ChildFailed(reason, file.read().decode("utf-8", "replace"), self.log)

    def close(self) -> None:
        """End the child and every process it has started; returns when they are gone."""
        self._remember_family()
        assert self._process.stdin is not None
        self._process.stdin.close()
        if not self._finished():
            for process in self._left():
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            self._finished()
        self._process.wait()

    def _remember_family(self) -> None:
        """Descendants are only known while their parents live."""
        with suppress(psutil.NoSuchProcess):
            family = psutil.Process(self._process.pid).children(recursive=True)
            self._family.update({process.pid: process for process in family})

    def _finished(self) -> bool:
        """Wait for all of the family to end by itself, for a while."""
        until = monotonic() + GRACE
        while monotonic() < until:
            self._process.poll()  # collects it
            if not self._left():
                return True
            sleep(0.1)
        return False

    def _left(self) -> list[psutil.Process]:
        """Of its descendants and its process group those that are alive."""
        members = [each for each in psutil.process_iter() if _group(each.pid) == self._process.pid]
        return [each for each in [*members, *self._family.values()] if _alive(each)]


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"it ended with exit code {code}"
    name = signal.Signals(-code).name
    killer = " (often the operating system, out of memory)" if -code == signal.SIGKILL else ""
    return f"it was killed by {name}{killer}"


def _alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _group(pid: int) -> int | None:
    with suppress(ProcessLookupError, PermissionError):
        return os.getpgid(pid)
    return None


#: An error in a log. A warning quotes the one it warns of; pydantic says the cause a line later.
_ERROR = re.compile(
    r"(?<![`\w])[A-Z]\w*(?:Error|Exception): .+|Value error, .+|error: unrecognized arguments: .+"
)


def explain(failure: ChildFailed) -> str:
    """What happened, the first error in the log, its end, and what to change."""
    lines = [printable(line) for line in failure.printed.splitlines()]
    errors = _ERROR.findall("\n".join(lines))
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
        r"killed by SIGKILL",
        "something outside killed it. If host memory was short, end other programs.",
    ),
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
        r"unrecognized arguments|unexpected keyword argument",
        "this vLLM lacks something that is used here; docs/sampling.md lists versions.",
    ),
)
