"""A Python function as a judge: called in processes of its own, by the clock.

It is the user's own code, and nothing here keeps it from anything. But whatever it does to its
process, a call that hangs, ends the interpreter or raises costs one score.
"""

import hashlib
import importlib.util
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from random import Random
from time import monotonic
from typing import Any

from sera_plugin.config.labelers import FunctionConfig
from sera_plugin.config.quoting import plain, quoted
from sera_plugin.labeling.judging import Answered, JudgeFailed, ScoringJudge, worker
from sera_plugin.rundir.journal import Journal, key_of
from sera_plugin.sampling import lifeline
from sera_plugin.sampling.child import child_environment
from sera_plugin.sampling.client import in_threads

LOG = logging.getLogger("axolotl.sera")

#: Seconds for the function's module to be imported.
IMPORT_WITHIN = 300.0
#: Seconds for what the function has started to end by itself.
_GRACE = "1"
#: A function that fails so often, and nine times of ten, fails always.
FAILURES = 10
#: Failures that are shown.
_NAMED = 5


class _Process:
    """A process with the function, which ends with this one."""

    def __init__(self, config: FunctionConfig) -> None:
        self._config = config
        self._socket, theirs = socket.socketpair()
        environment = child_environment(sys.executable)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        command = [sys.executable, "-P", worker.__file__, config.call]
        with theirs:
            # No shell; the function that the YAML or the command names.
            self._process: subprocess.Popen[bytes] = subprocess.Popen(
                [sys.executable, "-I", lifeline.__file__, _GRACE, *command],
                stdin=subprocess.PIPE,
                stdout=theirs.fileno(),
                env=environment,
                process_group=0,
            )

    @cached_property
    def takes(self) -> dict[str, Any]:
        """`worker.parameters`, once the function is imported, or why it is not."""
        return self._reply(IMPORT_WITHIN)

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        """The reply to a request: `score`, or a `problem`; after some of these it has `ended`."""
        with suppress(OSError):  # it has ended; that is what there is to be read
            self._socket.settimeout(self._config.timeout)
            self._socket.sendall(json.dumps(request).encode() + b"\n")
        return self._reply(self._config.timeout)

    def _reply(self, within: float) -> dict[str, Any]:
        until, line = monotonic() + within, b""
        try:
            while not line.endswith(b"\n"):
                self._socket.settimeout(max(until - monotonic(), 1e-3))
                if not (part := self._socket.recv(65_536)):
                    raise ConnectionError
                line += part
            found: dict[str, Any] = json.loads(line)
            return found
        except TimeoutError:
            problem = f"took longer than {within:g} s (`timeout`)"
        except (OSError, ValueError):
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(5)
            code = self._process.returncode or 0
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            problem = f"ended its process ({how})"
        self.end()
        return {"problem": problem, "ended": True}

    def end(self) -> None:
        """End the process, and what the function has started; a call that runs ends too."""
        with suppress(OSError):  # it has ended
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()


class FunctionJudge(ScoringJudge):
    """Scores an answer with `function(question, answer)`, and columns of its row by their names.

    A call that gives no number leaves the answer without a score, and is counted and named; a
    function that fails nearly always is a JudgeFailed; `columns` None is of no run. Scores are
    kept with the file as it is.

    Raises:
        ValueError: where the function cannot be imported, or takes what is none of `columns`.
    """

    def __init__(
        self, config: FunctionConfig, journal: Journal, columns: Sequence[str] | None = None
    ) -> None:
        super().__init__(config.call, {"function": config.call})
        self._config, self._journal = config, journal
        self._identity = key_of("function", config.call, content_of(config.call))
        first = _Process(config)
        takes = first.takes
        first.end()
        if problem := takes.get("problem"):
            if problem.startswith("LookupError: it "):
                raise ValueError(f"{config.call} {problem.removeprefix('LookupError: it ')}.")
            raise ValueError(
                f"{config.call.rpartition(':')[0]} cannot be imported: {problem}. A module has to "
                "be installed; a file is named with its path, which starts in the working "
                "directory if it is relative, and its ending: file.py:function."
            )
        if unknown := [name for name in takes["needs"] if name not in (columns or ())]:
            known = "nothing else is given here. Give"
            if columns is not None:
                named = ", ".join(map(quoted, columns)) or "it is empty"
                known = f"that is no column of sera.score_columns ({named}). Name it there, or give"
            raise ValueError(
                f"{config.call} takes {', '.join(map(quoted, unknown))} beside question and "
                f"answer, and {known} the parameter a default."
            )
        read = {*takes["needs"], *takes["takes"]}
        self.reads_rows = bool(columns)
        #: Of the columns those that it takes.
        self._columns = [
            name
            for name in columns or ()
            if (takes["any"] or name in read) and name not in takes["first"]
        ]

    def score(self, answers: Sequence[Answered]) -> Iterator[tuple[int, float | None]]:
        """See `ScoringJudge.score`. None from the function is a missing verdict."""
        keys: list[str] = []
        asked: list[tuple[int, dict[str, Any]]] = []
        kept = 0
        for index, one in enumerate(answers):
            known = json.loads(one.about or "{}")
            about = {name: known.get(name) for name in self._columns}
            request = {"question": one.question, "answer": one.answer, "columns": about}
            keys.append(key_of(self._identity, request))
            if (found := self._journal.get(keys[-1], score=float)) is not None:
                kept += 1
                self.usage.cached.count += 1
                yield index, found["score"]
            else:
                asked.append((index, request))
        # A prompt's answers often fail together: the first calls must be any, to tell of all.
        Random(0).shuffle(asked)
        with closing(self._replies(asked)) as replies:
            yield from self._scored(replies, answers, keys, kept)

    def _scored(
        self,
        replies: Iterator[tuple[int, dict[str, Any]]],
        answers: Sequence[Answered],
        keys: Sequence[str],
        kept: int,
    ) -> Iterator[tuple[int, float | None]]:
        """Yield (index, score) of every reply, and say what was wrong with how many."""
        problems: Counter[str] = Counter()
        shown: list[str] = []
        done = 0
        for done, (index, reply) in enumerate(replies, start=1):
            self.usage.asked.count += 1
            score = reply.get("score")
            if problem := reply.get("problem"):
                self.usage.failed += 1
                problems[problem.partition(":")[0]] += 1
                shown += [self._named(problem, answers[index])] * (len(shown) < _NAMED)
                # Of what is asked again for want of a score, all may fail again.
                failed, known = problems.total(), done + kept
                if failed == len(answers) or (failed >= FAILURES and 10 * failed >= 9 * known):
                    raise JudgeFailed(
                        f"{self.name} gave no score in {failed} of {done} calls: {shown[0]}. It "
                        "must return a finite number, or None where it cannot tell."
                    )
            elif score is not None:
                self._journal.add(keys[index], {"score": score})
            else:
                self.usage.unparsed += 1
            yield index, score
        if problems:
            counts = ", ".join(f"{count} {what}" for what, count in problems.most_common(_NAMED))
            LOG.warning(
                "SeRA: %s gave no score in %d of %d calls (%s); first: %s",
                self.name, problems.total(), done, counts, "; ".join(shown),
            )  # fmt: skip

    def _replies(
        self, asked: Sequence[tuple[int, dict[str, Any]]]
    ) -> Generator[tuple[int, dict[str, Any]], None, None]:
        """Yield (index, reply) of every request, asked of several processes."""
        count = min(self._config.processes, len(asked))
        if not count:
            return
        started: list[_Process] = []
        free: SimpleQueue[_Process | None] = SimpleQueue()
        for _ in range(count):
            free.put(None)

        def ask(job: tuple[int, dict[str, Any]]) -> dict[str, Any]:
            if (process := free.get()) is None:
                started.append(process := _Process(self._config))
            reply = process.takes if "ended" in process.takes else process(job[1])
            free.put(None if "ended" in reply else process)
            return reply

        def end() -> None:
            for process in started:
                process.end()

        with ExitStack() as stack:
            stack.callback(end)  # what has been started meanwhile
            pool = stack.enter_context(ThreadPoolExecutor(count))
            stack.callback(end)  # calls that run end with their process
            stack.callback(pool.shutdown, wait=False, cancel_futures=True)
            for finished in in_threads(pool, asked, ask, count):
                for (index, _), reply in finished:
                    yield index, reply

    def _named(self, problem: str, one: Answered) -> str:
        row = f"of {one.row} " if one.row else ""
        return (
            f"{plain(problem, 300)} on the question {row}{quoted(one.question)} and the answer "
            f"{quoted(one.answer)}"
        )


def content_of(spec: str) -> str | None:
    """SHA-256 of the file that the function is in, None where there is none."""
    place = spec.rpartition(":")[0]
    with suppress(Exception):  # whatever finding a module raises; importing it says what it is
        if not place.endswith(".py"):
            found = importlib.util.find_spec(place)
            place = str(found.origin) if found else ""
        return hashlib.sha256(Path(place).read_bytes()).hexdigest()
    return None
