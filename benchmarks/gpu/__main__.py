"""`python -m benchmarks.gpu --out DIR`: all steps, each a process with a time limit of its own.

DIR/steps.jsonl has a line a step as soon as it ends, DIR/logs.txt the end of what each one printed.
Steps that are not timed run several at once; the others run alone afterwards.
"""

import argparse
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from benchmarks.harness import ROOT, Setup
from benchmarks.host import environment


@dataclass(frozen=True)
class Step:
    """A function of a `Setup` that returns figures, in `benchmarks.gpu.MODULE`.

    Attributes:
        limit: seconds until it is killed.
        group: steps of one group run at the same time; groups follow each other.
    """

    module: str
    limit: int
    group: str = "checks"


STEPS = {
    "world": Step("runs", 60, "models"),
    "large": Step("precision", 60, "models"),
    "quantised": Step("precision", 60, "models"),
    # The slowest first, so that none of them is left alone at the end.
    "killed": Step("runs", 200),
    "evaluate": Step("runs", 200),
    "full": Step("runs", 150),
    "qlora": Step("runs", 150),
    "scorer": Step("precision", 90),
    "margins": Step("precision", 90),
    "lora_fp16": Step("runs", 120),
    "lora_bf16": Step("runs", 120),
    "torchrun": Step("runs", 120),
    "sampling": Step("speed", 60, "sampling"),
    "scoring": Step("speed", 120, "scoring"),
    "step": Step("speed", 150, "step"),
    "whole_run": Step("speed", 300, "whole_run"),
}
AT_ONCE = 6
#: What an exception's last line begins with.
_RAISED = re.compile(r"^[A-Za-z_][\w.]*(Error|Exception|Exit|Interrupt|Refused|OutOfMemory)\b")
#: As `benchmarks.harness.interleave` prints it: a part that is cut off has these.
_ROUND = re.compile(r"^round (\d+)/\d+: (\w+): (.*)$", re.M)
_LOG_BYTES = 60_000


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="One GPU.")
    parser.add_argument("--out", type=Path, help="where figures and logs go")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--smoke", action="store_true", help="toy sizes, to try the script out")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS), metavar="STEP")
    parser.add_argument("--seconds", type=float, default=1e9, help="kill what takes longer in all")
    parser.add_argument("--at-once", type=int, default=AT_ONCE, help="processes")
    parser.add_argument("--work", type=Path, help="scratch space (default: a temporary directory)")
    parser.add_argument("--inside", choices=STEPS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.out is None and options.inside is None:
        parser.error("--out is needed")
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        if options.inside:
            inside(options.inside, options.device, options.smoke, work)
            return 0
        return all_steps(options, work)


def inside(name: str, device: str, smoke: bool, work: Path) -> None:
    """Run one step in this process and leave its figures for the one that started it."""
    shape = "toy" if smoke else "tinyllama-1.1b"
    setup = Setup(device, shape, 1 if smoke else 5, 4 if smoke else None, None, None, work)
    figures = getattr(importlib.import_module(f"benchmarks.gpu.{STEPS[name].module}"), name)(setup)
    partial = work / f"{name}.partial"
    partial.write_text(json.dumps(figures), encoding="utf-8")
    partial.rename(work / f"{name}.json")


def all_steps(options: argparse.Namespace, work: Path) -> int:
    """Run the steps and return how many failed."""
    options.out.mkdir(parents=True, exist_ok=True)
    end, lock, failed = time.monotonic() + options.seconds, Lock(), []
    groups: dict[str, list[str]] = {}
    # A step needs the models, but not that they are asked for.
    wanted = [name for name, step in STEPS.items() if step.group == "models"]
    for name in (*wanted, *options.only):
        group = groups.setdefault(STEPS[name].group, [])
        if name not in group and (name in options.only or name != "quantised"):
            group.append(name)

    def run(name: str) -> None:
        command = [sys.executable, "-m", "benchmarks.gpu", "--inside", name, "--work", str(work)]
        command += ["--device", options.device, *(["--smoke"] if options.smoke else [])]
        start, left = time.monotonic(), end - time.monotonic()
        log = work / f"{name}.log"
        limit = min(STEPS[name].limit * (4 if options.device == "cpu" else 1), left)
        code = in_time(command, log, limit) if left > 5 else None
        found = {"step": name, "ok": code == 0, "seconds": round(time.monotonic() - start, 1)}
        found |= judged(name, code, limit, log, work)
        with lock:
            if code != 0:
                failed.append(name)
            line = json.dumps(found)
            print(line, flush=True)
            with (options.out / "steps.jsonl").open("a", encoding="utf-8") as file:
                file.write(line + "\n")
            with (options.out / "logs.txt").open("ab") as file:
                said = log.read_bytes()[-_LOG_BYTES:] if log.exists() else b""
                file.write(f"\n\n======== {name}: exit {code}\n".encode() + said)

    for names in groups.values():
        with ThreadPoolExecutor(options.at_once) as pool:
            list(pool.map(run, names))
    print(f"{len(failed)} steps failed{': ' if failed else ''}{', '.join(failed)}", flush=True)
    return len(failed)


def in_time(command: list[str], log: Path, limit: float) -> int | None:
    """Its exit status, or None where it and all that it started had to be killed."""
    with log.open("wb") as file:
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment() | {"PYTHONUNBUFFERED": "1", "WANDB_DISABLED": "true"},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return child.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            return None


def judged(name: str, code: int | None, limit: float, log: Path, work: Path) -> dict[str, Any]:
    """A step's figures, and what it died of."""
    said = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    path = work / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if code == 0:
        return found
    rounds: dict[str, list[str]] = {}
    for _, side, value in _ROUND.findall(said):
        rounds.setdefault(side, []).append(value[:300])
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    raised = [line for line in lines if _RAISED.match(line)]
    error = f"killed after {limit:.0f} s" if code is None else f"exit {code}"
    if raised or lines:
        error += f": {(raised or lines)[-1][:400]}"
    return found | {"error": error} | ({"rounds": rounds} if rounds else {})


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Exception:
        traceback.print_exc()
        sys.exit(1)
