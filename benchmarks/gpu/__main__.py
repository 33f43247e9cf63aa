"""`python -m benchmarks.gpu --out DIR`: all steps, each a process with a time limit of its own.

DIR/steps.jsonl has a line a step as soon as it ends, DIR/logs.txt the end of what each one printed.
Steps that are not timed run several at once; the others run alone afterwards.
"""

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

from benchmarks.gpu.steps import STEPS, in_time, usual
from benchmarks.harness import fresh
from benchmarks.host import environment

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
    parser.add_argument("--only", nargs="+", choices=STEPS, default=usual(), metavar="STEP")
    parser.add_argument(
        "--seconds", type=float, help="of all steps together; 570 on a GPU, else no end"
    )
    at_once = min(10, max(1, (os.cpu_count() or 1) // 2))
    parser.add_argument("--at-once", type=int, default=at_once, help="steps that are not timed")
    options = parser.parse_args(arguments)
    begin, failed, lock = time.monotonic(), list[str](), Lock()
    end = begin + (options.seconds or (570.0 if options.device == "cuda" else 1e6))
    needed = {name for asked in options.only for name in (asked, *STEPS[asked].needs)}
    needed |= {other for name in needed for other in STEPS[name].needs}
    groups: dict[str, list[str]] = {}
    for name in STEPS:
        if name in needed:
            groups.setdefault(STEPS[name].group, []).append(name)
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ |= environment() | {"PYTHONUNBUFFERED": "1", "WANDB_DISABLED": "true"}
    method = fresh(options.device).get_start_method()
    print(f"steps begin by {method} after {time.monotonic() - begin:.0f} s", flush=True)

    def run(name: str) -> None:
        start, log = time.monotonic(), work / f"{name}.log"
        patience = STEPS[name].limit * (4 if options.device == "cpu" else 1)
        limit = min(patience, max(0.0, end - start))
        try:
            code = in_time(log, limit, name, options.device, options.smoke, work)
        except Exception as error:  # a step that does not even begin is no reason to lose the rest
            code = 1
            log.write_text(f"{type(error).__name__}: {error}\n", encoding="utf-8")
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
    seconds = time.monotonic() - begin
    print(f"{seconds:.0f} s; {len(failed)} steps failed: {', '.join(failed) or 'none'}", flush=True)
    return len(failed)


def failure(code: int | None, said: str) -> dict[str, Any]:
    """What a step died of, and the rounds that it had measured."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    # Of a command that it started, what that one raised.
    raised = [line for line in lines if _RAISED.match(line) and "above" not in line]
    why = "out of time" if code is None else f"exit {code}"
    rounds: dict[str, list[str]] = {}
    for side, value in _ROUND.findall(said):
        rounds.setdefault(side, []).append(value[:2000])
    last = (raised or lines or ["nothing printed"])[-1][:400]
    return {"error": f"{why}: {last}"} | ({"rounds": rounds} if rounds else {})


if __name__ == "__main__":
    sys.exit(min(main(), 1))
