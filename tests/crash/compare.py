"""What a run left behind, in what two runs differ, and what was done twice."""

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

#: What a continued run may say differently: how long things took, how much was forwarded (what was
#: scored when the run died is scored again), and the check at the first step of an iteration, which
#: a run that continues after that step does not make.
_MAY_DIFFER = ("run_id", "seconds", "forwarded", "step_zero")
_FIGURES_THAT_MAY = ("sera/seconds", "sera/forwarded", "sera/step_zero", "epoch")
#: What a step logs that its weights and its schedule determine.
_LOGGED = ("loss", "grad_norm", "learning_rate")

Event = dict[str, Any]


def read_trace(directory: Path) -> list[list[Event]]:
    """What each of the runs in a directory did, one list a run."""
    path = directory / "trace.jsonl"
    runs: list[list[Event]] = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(json.JSONDecodeError):  # the run was killed in the middle of this line
            event = json.loads(line)
            if event["event"] == "start":
                runs.append([])
            runs[-1].append(event)
    return runs


def left_behind(directory: Path) -> dict[str, Any]:
    """Everything that must be equal, by name."""
    output = directory / "out"
    run = output / "sera"
    found = {f"sera/{path.relative_to(run)}": digest(path) for path in run.rglob("*.parquet")}
    for path in (*run.glob("*.json"), *run.glob("*/*.json")):
        content = json.loads(path.read_text())
        kept = {key: value for key, value in content.items() if key not in _MAY_DIFFER}
        found[f"sera/{path.relative_to(run)}"] = kept
    for policy in run.glob("*/policy"):
        weights = [*policy.glob("*.safetensors"), *policy.glob("base_model.json")]
        found[f"sera/{policy.relative_to(run)}"] = {path.name: digest(path) for path in weights}
    found |= {path.name: digest(path) for path in output.glob("*.safetensors")}
    found |= _last_state(output)
    for event in chain.from_iterable(read_trace(directory)):
        if event["event"] == "begin":
            _agree(found, f"D_{event['iteration']}", event["pairs"])
        elif event["event"] == "step":
            step, batch = event["step"]
            _agree(found, f"step {step} batch {batch}", (event["batch"], event["loss"]))
        elif event["event"] == "evaluation":
            _agree(found, f"evaluation after step {event['step']}", event["loss"])
    return found


def _agree(found: dict[str, Any], name: str, value: Any) -> None:
    """What several runs of a directory have done, they must have done alike."""
    if found.setdefault(name, value) != value:
        found[name] = "not the same each time"


def _last_state(output: Path) -> dict[str, Any]:
    """The host's own record in its last checkpoint: steps, losses, learning rates."""
    states = list(output.glob("checkpoint-*/trainer_state.json"))
    if not states:
        return {}
    last = max(states, key=lambda path: int(path.parent.name.removeprefix("checkpoint-")))
    state = json.loads(last.read_text())
    found = {name: state[name] for name in ("global_step", "max_steps")}
    for entry in state["log_history"]:
        if "loss" in entry:
            shown = {key: entry[key] for key in _LOGGED}
            _agree(found, f"log of step {entry['step']}", shown)
        if "sera/iteration" in entry:
            figures = {k: v for k, v in entry.items() if not k.startswith(_FIGURES_THAT_MAY)}
            found[f"sera figures after step {entry['step']}"] = figures
    return found


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Names of what differs, is missing or is too much."""
    names = sorted(expected.keys() | found.keys())
    said = [f"{name}: missing" for name in names if name not in found]
    said += [f"{name}: not in the uninterrupted run" for name in names if name not in expected]
    common = expected.keys() & found.keys()
    return said + [f"{name}: differs" for name in sorted(common) if expected[name] != found[name]]


@dataclass
class Ledger:
    """What is done twice over the runs of one directory.

    A row's samples are on disk or not when a run dies. If they are, a later run may sample the row
    again only where it has trained the policy that samples it anew, in an earlier iteration.
    """

    sampled_twice: list[tuple[int, int]] = field(default_factory=list)  # (iteration, row)
    repeated_steps: int = 0  # optimizer steps that were made in an earlier run already
    _sampled: dict[int, set[int]] = field(default_factory=dict)
    _steps: set[int] = field(default_factory=set)

    def add(self, events: list[Event], output: Path) -> None:
        """Enter what one run did, and what is on disk now that it has ended."""
        steps = set()
        for event in events:
            iteration = event.get("iteration", 0)
            if event["event"] == "step":
                steps.add(event["step"][0])
                self._sampled = {t: rows for t, rows in self._sampled.items() if t <= iteration}
            elif event["event"] == "sampled":
                again = self._sampled.get(iteration, set()).intersection(event["rows"])
                self.sampled_twice += [(iteration, row) for row in sorted(again)]
            elif event["event"] == "kept":
                self._sampled.setdefault(iteration, set()).update(event["rows"])
        self.repeated_steps += len(steps & self._steps)
        self._steps |= steps
        run = output / "sera"
        for path in (*run.glob("*/samples/*.parquet"), *run.glob("*/cand*.parquet")):
            iteration = int(path.relative_to(run).parts[0].removeprefix("iteration-"))
            with suppress(pa.ArrowInvalid):  # not whole, so not on disk
                rows = pq.read_table(path, columns=["row"])["row"].to_pylist()
                self._sampled.setdefault(iteration, set()).update(rows)
