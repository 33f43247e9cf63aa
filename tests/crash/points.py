"""Kinds of training, places to kill them, and one point from its start to its verdict.

Importing the host takes longer than a whole run here. One process imports it, computes nothing, and
forks for each run: a run is still a fresh process, and dies alone.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import yaml

from tests.conftest import adapter, make_config, with_an_early_best
from tests.crash.compare import Ledger, differences, left_behind, read_trace

_CONTEXT = get_context("forkserver")
#: What a run imports, so that none of them has to.
_CONTEXT.set_forkserver_preload(
    ["axolotl.cli.config", "axolotl.core.builders", "tests.crash.child", "tests.crash.points"]
)
#: A run takes seconds; one that takes this long hangs.
TIME_LIMIT = 600.0

_LORA = adapter()
_QUANTISED = _LORA | {"adapter": "qlora", "load_in_4bit": True}
_ONE_SCHEDULE = {"restart_optimizer": False}
#: Fewer sampled pairs exist than are asked for: iterations are shorter than planned.
_FEW_PAIRS = {"bootstrap_ratio": 2.0, "max_new_tokens": 1, "temperature": 0.2}


def _checkpoints(kept: int, steps: int = 1, **keys: Any) -> dict[str, Any]:
    """Save every so many steps and keep the last checkpoints, beside other keys."""
    return {"save_steps": steps, "saves_per_epoch": None, "save_total_limit": kept, **keys}


#: Kinds of training by name; what is said of each is what it adds to the tests' configuration.
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "full-keep-1": _checkpoints(1),
    "full-keep-2": _checkpoints(2),
    "full-one-schedule": _checkpoints(2, steps=2, sera=_ONE_SCHEDULE),
    "full-short": _checkpoints(3, sera=_FEW_PAIRS),
    "full-short-one-schedule": _checkpoints(3, sera=_FEW_PAIRS | _ONE_SCHEDULE),
    "lora-simpo": _checkpoints(1, **_LORA, sera={"loss": "simpo"}),
    "full-best": {},
    # Ends after iteration 3.
    "lora-best": {**_LORA, "num_epochs": 4},
    "full-4-iterations": {"save_total_limit": 1, "num_epochs": 4},
    "lora": _LORA,
    "lora-keep-1": _checkpoints(1, **_LORA),
    "lora-continued": _checkpoints(2, **_LORA),
    "qlora": _QUANTISED,
    "qlora-keep-1": _checkpoints(1, **_QUANTISED),
}

#: Places where a run kills itself. "half": with the last file cut to half of its length.
PHASES: dict[str, str] = {
    "output-file": "between two files of output_dir before the final save",
    "output-half": "a file of output_dir half written before the final save",
    "score-offline": "scoring offline pairs, before a batch",
    "score-candidates": "scoring candidates, before a batch",
    "score-evaluation": "scoring held-out pairs, before a batch",
    "sample-token": "sampling, inside a chunk",
    "sample-chunk": "sampling, after a chunk",
    "run-half": "a file of the run directory half written",
    "rename-before": "before a file of the run directory gets its name",
    "rename-after": "after a file of the run directory got its name",
    "policy-file": "between two files of a policy",
    "policy-half": "a file of a policy half written",
    "clean": "while finished chunks or old policies are removed",
    "micro-batch": "in the middle of an iteration, before a micro-batch",
    "optimizer": "before or after an optimizer step",
    "checkpoint-file": "between two files of a checkpoint",
    "checkpoint-half": "a file of a checkpoint half written",
    "rotation": "while an old checkpoint is removed",
    "checkpoint-after": "right after a checkpoint",
    "boundary": "between two iterations",
    "before-final": "between the last step and the final save",
    "final-file": "between two files of the final save",
    "final-half": "a file of the final save half written",
}
RANDOM = "random"
CHAIN = "twice"
UNKILLED = "never"
LABELS = {UNKILLED: "not killed, a second run", **PHASES, RANDOM: "at a random instant"}
LABELS[CHAIN] = "killed again after continuing"


@dataclass(frozen=True)
class Point:
    """Where a run of one kind is killed: once, or again after it was continued.

    A kill is (phase, n) of `PHASES`, or (`RANDOM`, n): the n-th random instant of this kind.
    """

    kind: str
    kills: tuple[tuple[str, int], ...] = ()

    @property
    def phase(self) -> str:
        """The row of the table it counts in."""
        if len(self.kills) > 1:
            return CHAIN
        return self.kills[0][0] if self.kills else UNKILLED

    def __str__(self) -> str:
        kills = "+".join(f"{phase}:{n}" for phase, n in self.kills)
        return f"{kills or f'{UNKILLED}:1'}:{self.kind}"

    @classmethod
    def parse(cls, text: str) -> Point:
        """The opposite of `str`, for example `sample-chunk:3:lora`."""
        kills, _, kind = text.rpartition(":")
        found = [kill.partition(":") for kill in kills.split("+")]
        if kind not in KINDS or not {phase for phase, *_ in found} <= LABELS.keys():
            raise ValueError(f"{text} is not PHASE:N:KIND")
        return cls(kind, tuple((phase, int(n)) for phase, _, n in found if phase != UNKILLED))


@dataclass
class Verdict:
    """What became of a point."""

    point: Point
    survived: bool = False  # whether the run finished once it was continued for good
    differences: list[str] = field(default_factory=list)  # from the uninterrupted run
    sampled_twice: int = 0
    repeated_steps: int = 0
    seconds: float = 0.0
    missed: int = 0  # kills that the run ended without
    notes: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return self.survived and not self.differences and not self.sampled_twice


def run(directory: Path, kill: tuple[str, int] | None = None, after: float | None = None) -> str:
    """Run in a directory that holds config.yaml and gets log.txt and trace.jsonl, to whatever end.

    With `kill`, (phase, n), the run kills itself when it is there for the n-th time; with `after`
    it is killed from outside so many seconds after its set-up. It is then `finished`, `killed`,
    `failed` or `hung`.
    """
    ready, set_up = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_run, args=(directory, kill, set_up))
    process.start()
    set_up.close()
    if after is not None:
        # The child closes its end once it is set up, or by dying before.
        ready.poll(TIME_LIMIT)
        process.join(after)
        process.kill()
    process.join(TIME_LIMIT)
    ends = {None: "hung", 0: "finished", -signal.SIGKILL: "killed"}
    how = ends.get(process.exitcode, "failed")
    process.kill()
    process.join()
    return how


def _run(directory: Path, kill: tuple[str, int] | None, set_up: Connection) -> None:
    os.chdir(directory)
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    sys.stdout.reconfigure(line_buffering=True)
    from tests.crash import child

    child.torch.set_num_threads(1)
    child.train(directory, kill, set_up.close)


class Whole(NamedTuple):
    """The uninterrupted run of a kind: what it left, how often it was where, and how long."""

    left: dict[str, Any]
    counts: dict[str, int]
    seconds: float


class Bench:
    """Tries points; everything goes to one directory, and `seed` chooses random instants."""

    def __init__(self, directory: Path, world: Path, seed: int = 0) -> None:
        self.directory, self.world, self.seed = directory, world, seed
        self._whole: dict[str, Whole] = {}

    def whole(self, kind: str) -> Whole:
        """The uninterrupted run, made when it is first asked for."""
        if kind not in self._whole:
            directory = self.prepare(kind, self.directory / "whole" / kind)
            ended = run(directory)
            if ended != "finished":
                raise RuntimeError(f"an uninterrupted run {ended}: {last_words(directory)}")
            (events,) = read_trace(directory)
            at = {event["event"]: event["at"] for event in events}
            seconds = at["end"] - at["open"]
            self._whole[kind] = Whole(left_behind(directory), events[-1]["counts"], seconds)
        return self._whole[kind]

    def try_point(self, point: Point) -> Verdict:
        """Run, kill, continue, compare. The directory stays if the verdict is not good."""
        whole = self.whole(point.kind)
        directory = self.prepare(point.kind, self.place(point))
        verdict, ledger = Verdict(point), Ledger()
        for number, kill in enumerate([*point.kills, None]):
            after = None
            if kill is not None and kill[0] == RANDOM:
                share = Random(f"{self.seed} {point.kind} {kill[1]} {number}").random()
                # A continued run has less to do.
                after, kill = share * 0.95 * 0.5**number * whole.seconds, None
            start = time.monotonic()
            ended = run(directory, kill, after)
            verdict.seconds += time.monotonic() - start
            ledger.add(read_trace(directory)[-1], directory / "out")
            if ended in ("failed", "hung"):
                verdict.notes.append(f"run {number + 1} {ended}: {last_words(directory)}")
                break
            if number < len(point.kills) and ended == "finished":
                verdict.missed += 1
                phase, place = point.kills[number]
                verdict.notes.append(f"{phase}:{place} was not reached")
        else:
            verdict.survived = ended == "finished"
            verdict.differences = differences(whole.left, left_behind(directory))
        verdict.sampled_twice = len(ledger.sampled_twice)
        verdict.repeated_steps = ledger.repeated_steps
        if verdict.good:
            shutil.rmtree(directory)
        return verdict

    def place(self, point: Point) -> Path:
        return self.directory / "points" / str(point).replace(":", "_")

    def prepare(self, kind: str, directory: Path) -> Path:
        """A fresh directory with the configuration; every path in it is the same for all runs."""
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        config = make_config(self.world, directory)
        keys = dict(KINDS[kind])
        config["sera"] = config["sera"] | keys.pop("sera", {})
        # Warm-up and decay: a schedule that is continued wrongly shows in the weights.
        config |= {"lr_scheduler": "linear", "warmup_steps": 2, "output_dir": "out"} | keys
        if kind.endswith("-best"):
            config = with_an_early_best(config)
        config["dataset_prepared_path"] = str(self.directory / "prepared")
        config["auto_resume_from_checkpoints"] = True
        if kind == "lora-continued":
            self.whole("lora")
            config["lora_model_dir"] = str(self.directory / "whole/lora/out")
        (directory / "config.yaml").write_text(yaml.safe_dump(config))
        return directory


def last_words(directory: Path) -> str:
    """The end of a run's log."""
    lines = (directory / "log.txt").read_text(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "nothing in log.txt"


def choose_points(bench: Bench, kinds: list[str], count: int, seed: int) -> Iterator[Point]:
    """Points in turn: every phase once, each with another kind, then every phase again, ...

    After every second phase comes a random instant, and after every fifth a chain of two kills.
    """
    random = Random(seed)
    phases = list(PHASES)
    random.shuffle(phases)
    order = []
    for index, phase in enumerate(phases, start=1):
        order.append(phase)
        order += [RANDOM] if index % 2 == 0 else []
        order += [CHAIN] if index % 5 == 0 else []
    made = 0
    for turn in range(1_000 * count):
        if made == count:
            return
        phase = order[turn % len(order)]
        # Each phase goes through the kinds on its own, beginning with another one.
        kind = kinds[(turn % len(order) + turn // len(order)) % len(kinds)]
        if point := _choose(bench, phase, kind, random):
            made += 1
            yield point


def _choose(bench: Bench, phase: str, kind: str, random: Random) -> Point | None:
    """A point of this phase, None where a run of this kind never gets there."""
    counts = bench.whole(kind).counts
    if phase == RANDOM:
        return Point(kind, ((RANDOM, random.randrange(1_000)),))
    if phase == CHAIN:
        places = [name for name in PHASES if counts.get(name) and "final" not in name]
        first, second = random.sample(places, 2)
        kill = (first, random.randint(1, max(1, counts[first] // 2)))
        if random.random() < 0.5:
            return Point(kind, (kill, (RANDOM, random.randrange(1_000))))
        # A continued run has less to do: an early place, so that it gets there.
        return Point(kind, (kill, (second, random.randint(1, max(1, counts[second] // 4)))))
    if not counts.get(phase):
        return None
    return Point(kind, ((phase, random.randint(1, counts[phase])),))
