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
from sera_plugin.sampling.prompts import SamplingFailed

#: A child that shows no sign of life for this many seconds is hung.
PATIENCE = 900.0
#: Seconds that processes get to end by themselves before they are killed.
GRACE = 15.0


class ChildFailed(SamplingFailed):
    """The child ended or hung: `explain` has made the message."""


class Child:
    """A running child; a context manager that leaves no process behind.

    `environment` is all of its environment. What it prints is appended to the log.
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
        self._family: set[psutil.Process] = set()
        self._next_look = 0.0
        self._seen: object = None
        self._since = monotonic()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check(self, sign: Callable[[], object]) -> None:
        """Return at once where the child runs; to be called every second or so.

        `sign`, called now and then, gives something else whenever the child has made progress.

        Raises:
            ChildFailed: if the child has ended, or has made no progress for `PATIENCE` seconds.
        """
        if (end := self.ended(0)) is not None:
            raise self.failed(end)
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
            code = self._process.wait(within)
            if code >= 0:
                return f"it ended with exit code {code}"
            killer = " (often the operating system, out of memory)"
            name = signal.Signals(-code).name
            return f"it was killed by {name}{killer if name == 'SIGKILL' else ''}"
        return None

    def log_size(self) -> int:
        """Bytes in its log: loading and compiling answer nothing for minutes, but they log."""
        return self.log.stat().st_size

    def failed(self, reason: str) -> ChildFailed:
        """What to raise, with the end of what this child has printed."""
        with self.log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(self._log_start, size - 65_536))
            printed = file.read().decode("utf-8", "replace")
        return ChildFailed(explain(reason, printed, self.log))

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
            self._family.update(psutil.Process(self._process.pid).children(recursive=True))

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
        left = []
        for each in self._family.union(psutil.process_iter()):
            with suppress(psutil.Error, OSError):  # it has ended
                ours = each in self._family or os.getpgid(each.pid) == self._process.pid
                if ours and each.is_running() and each.status() != psutil.STATUS_ZOMBIE:
                    left.append(each)
        return left


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
