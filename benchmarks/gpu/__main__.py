"""`python -m benchmarks.gpu --out DIR`: all steps, each a process with a time limit of its own.

DIR/steps.jsonl has a line a step as soon as it ends, DIR/logs.txt the end of what each one printed.
Steps that are not timed run several at once; the others run alone afterwards.
"""

import argparse
import importlib
import json
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import psutil

from benchmarks.harness import ROOT, Setup
from benchmarks.host import environment


@dataclass(frozen=True)
class Step:
    """A function of a `Setup` that returns figures.

    Attributes:
        module: `benchmarks.gpu.MODULE`, where it is.
        limit: seconds until it is killed; four times as many on a CPU.
        group: steps of one group run at the same time, groups one after the other.
        needs: steps that run even if only this one is asked for.
    """

    module: str
    limit: int
    group: str
    needs: tuple[str, ...] = ()


STEPS = {
    "world": Step("runs", 60, "first"),
    "large": Step("precision", 60, "first"),
    "quantised": Step("precision", 60, "first"),
    # The slowest first, so that none of them is left alone at the end; `killed` waits for `full`.
    "full": Step("runs", 150, "checks", ("world",)),
    "killed": Step("runs", 200, "checks", ("world", "full")),
    "evaluate": Step("runs", 200, "checks", ("world",)),
    "qlora": Step("runs", 150, "checks", ("large",)),
    "scorer": Step("precision", 90, "checks", ("large",)),
    "margins": Step("precision", 90, "checks", ("large",)),
    "lora_fp16": Step("runs", 120, "checks", ("world",)),
    "lora_bf16": Step("runs", 120, "checks", ("world",)),
    "torchrun": Step("runs", 120, "checks", ("world",)),
    "sampling": Step("speed", 60, "sampling", ("large",)),
    "scoring": Step("speed", 120, "scoring"),
    "step": Step("speed", 150, "step"),
    "whole_run": Step("speed", 480, "whole_run"),
}
#: What an exception's last line begins with.
_RAISED = re.compile(r"^[A-Za-z_][\w.]*(Error|Exception|Exit|Interrupt|Refused)\b")
#: As `benchmarks.harness.interleave` prints it: a part that is cut off has these.
_ROUND = re.compile(r"^round \d+/\d+: (\w+): (.*)$", re.M)
_LOG_BYTES = 60_000


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps; how many failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="One GPU.")
    parser.add_argument("--out", type=Path, required=True, help="where figures and logs go")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--smoke", action="store_true", help="toy sizes, to try the script out")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS), metavar="STEP")
    parser.add_argument("--seconds", type=float, default=1e6, help="of all steps together")
    parser.add_argument("--at-once", type=int, default=6, help="processes that are not timed")
    parser.add_argument("--inside", choices=STEPS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.inside:
        inside(options.inside, options.device, options.smoke, options.out)
        return 0
    end, failed, lock = time.monotonic() + options.seconds, list[str](), Lock()
    needed = {name for asked in options.only for name in (asked, *STEPS[asked].needs)}
    needed |= {other for name in needed for other in STEPS[name].needs}
    groups: dict[str, list[str]] = {}
    for name in STEPS:
        if name in needed:
            groups.setdefault(STEPS[name].group, []).append(name)
    options.out.mkdir(parents=True, exist_ok=True)

    def run(name: str) -> None:
        command = [sys.executable, "-m", "benchmarks.gpu", "--inside", name, "--out", str(work)]
        command += ["--device", options.device, *(["--smoke"] if options.smoke else [])]
        start, log = time.monotonic(), work / f"{name}.log"
        limit = STEPS[name].limit * (4 if options.device == "cpu" else 1)
        code = in_time(command, log, min(limit, max(0.0, end - start)))
        said, path = log.read_text(encoding="utf-8", errors="replace"), work / f"{name}.json"
        ok = code == 0 and path.exists()
        found = {"step": name, "ok": ok, "seconds": round(time.monotonic() - start, 1)}
        found |= json.loads(path.read_text(encoding="utf-8")) if ok else failure(code, said)
        with lock:
            failed.extend([] if ok else [name])
            print(json.dumps(found), flush=True)
            with (options.out / "steps.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")
            with (options.out / "logs.txt").open("a", encoding="utf-8") as file:
                file.write(f"\n\n======== {name}: exit {code}\n{said[-_LOG_BYTES:]}")

    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        for names in groups.values():
            with ThreadPoolExecutor(options.at_once) as pool:
                list(pool.map(run, names))
    print(f"{len(failed)} steps failed: {', '.join(failed) or 'none'}", flush=True)
    return len(failed)


def inside(name: str, device: str, smoke: bool, work: Path) -> None:
    """Run one step in this process and leave its figures for the one that started it."""
    shape, rounds, pairs = ("toy", 1, 4) if smoke else ("tinyllama-1.1b", 5, None)
    setup = Setup(device, shape, rounds, pairs, None, None, work)
    figures = getattr(importlib.import_module(f"benchmarks.gpu.{STEPS[name].module}"), name)(setup)
    partial = work / f"{name}.partial"
    partial.write_text(json.dumps(figures), encoding="utf-8")
    partial.rename(work / f"{name}.json")


def in_time(command: list[str], log: Path, limit: float) -> int | None:
    """Its exit status, or None where it and all that it started had to be killed."""
    settings = environment() | {"PYTHONUNBUFFERED": "1", "WANDB_DISABLED": "true"}
    with log.open("wb") as file:
        child = psutil.Popen(command, cwd=ROOT, env=settings, stdout=file, stderr=file)
        try:
            return int(child.wait(limit))
        except psutil.TimeoutExpired:
            for process in (*child.children(recursive=True), child):
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    continue
            child.wait()
            return None


def failure(code: int | None, said: str) -> dict[str, Any]:
    """What a step died of, and the rounds that it had measured."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    # Of a command that it started, what that one raised.
    raised = [line for line in lines if _RAISED.match(line) and "above" not in line]
    why = "out of time" if code is None else f"exit {code}"
    rounds: dict[str, list[str]] = {}
    for side, value in _ROUND.findall(said):
        rounds.setdefault(side, []).append(value[:300])
    last = (raised or lines or ["nothing printed"])[-1][:400]
    return {"error": f"{why}: {last}"} | ({"rounds": rounds} if rounds else {})


if __name__ == "__main__":
    sys.exit(min(main(), 1))
