"""What `axolotl sera plan` says before a run, against what the run then takes."""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.harness import Setup, figure, interleave, markdown
from benchmarks.host import PROBE, SERA, environment, host_config, write_config, write_rows
from benchmarks.workload import make_model, read_rows, vocabulary_of
from sera_plugin.config.sera import AS_PUBLISHED

TITLE = "A plan against the run"
ITERATIONS = 3
PHASES = ("score_offline", "score_evaluation", "sample", "score_candidates", "select", "train")
EXACT = ("score_offline", "score_evaluation")
EXPECTED = ("sample", "score_candidates")
_ADAPTER = re.compile(r"adapter$|lora_")


def measure(setup: Setup) -> dict[str, Any]:
    """Seconds, tokens, bytes on disk and in memory, planned and taken, by kind and round."""
    model = make_model(setup)
    path = setup.directory / "plan.jsonl"
    config = host_config(setup, model, path)
    rows = read_rows(setup, 48, vocabulary_of(model), config["sequence_len"])
    write_rows(path, rows)
    new_tokens = 96 if setup.device == "cpu" else 256
    config |= {
        "rl": "sera",
        "plugins": [SERA, PROBE],
        "sera": AS_PUBLISHED | {"max_new_tokens": new_tokens, "sampler": "transformers"},
        "num_epochs": ITERATIONS,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "val_set_size": 0.05,
        "evals_per_epoch": 1,
    }
    del config["save_strategy"]
    full = {key: value for key, value in config.items() if not _ADAPTER.match(key)}
    kinds = {"LoRA": config, "full": full | {"learning_rate": 1e-6}}
    sides = {
        kind: lambda kind=kind, changed=changed: run(setup.directory / kind, changed)
        for kind, changed in kinds.items()
    }
    return {
        "pairs": len(rows),
        "iterations": ITERATIONS,
        "new_tokens": new_tokens,
        "batch": config["micro_batch_size"] * config["gradient_accumulation_steps"],
        "rounds": interleave(sides, setup.rounds, warm_up=False),
    }


def run(output: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Plan, plan with a short run, and run."""
    shutil.rmtree(output, ignore_errors=True)
    path = write_config(output.with_suffix(".yaml"), config | {"output_dir": str(output)})
    command = [sys.executable, "-m", "sera_plugin", "plan", str(path), "--json"]
    printed, planning = timed(command)
    floor = json.loads(printed)
    printed, measuring = timed([*command, "--measure"])
    planned = json.loads(printed)
    timed([sys.executable, "-m", "axolotl.cli.main", "train", str(path), "--launcher", "python"])
    found = [
        json.loads(file.read_text(encoding="utf-8"))
        for file in sorted(output.glob("sera/iteration-*/summary.json"))
    ]
    probe = json.loads((output / "probe.json").read_text(encoding="utf-8"))
    return {
        "planning": planning,
        "measuring": measuring,
        "seconds": {
            "floor": _seconds(floor["iterations"]),
            "planned": _seconds(planned["iterations"]),
            "taken": _seconds(found),
        },
        "tokens": {
            "floor": _tokens(one["phases"] for one in floor["iterations"]),
            "planned": _tokens(one["phases"] for one in planned["iterations"]),
            "taken": _tokens(one["forwarded"] for one in found),
        },
        "steps": {
            "planned": sum(one["steps"] for one in planned["iterations"]),
            "taken": len(probe["step_ends"]),
        },
        "disk": {
            "planned": sum(planned["disk"].values()),
            "taken": sum(file.stat().st_size for file in output.rglob("*") if file.is_file()),
        },
        "memory": {"planned": _memory(planned["memory"]), "taken": probe["memory"]},
    }


def timed(command: Sequence[str]) -> tuple[str, float]:
    """What a command prints to stdout, and its seconds.

    Raises:
        RuntimeError: if it fails, with the end of what it said.
    """
    start = time.perf_counter()
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    if done.returncode:
        said = (done.stdout + done.stderr)[-4000:]
        raise RuntimeError(f"{' '.join(command)} failed:\n{said}")
    return done.stdout, time.perf_counter() - start


def _memory(planned: dict[str, Any]) -> int | None:
    """Of the device; no plan has a CPU's."""
    return max((phase["all"] for phase in planned["phases"]), default=None)


def _seconds(iterations: list[dict[str, Any]]) -> dict[str, float]:
    return {phase: sum(one["seconds"].get(phase, 0.0) for one in iterations) for phase in PHASES}


def _tokens(iterations: Iterable[dict[str, Any]]) -> dict[str, int]:
    found = dict.fromkeys((*EXACT, *EXPECTED), 0)
    for phases in iterations:
        for phase in found:
            found[phase] += phases.get(phase, {"tokens": 0})["tokens"]
    return found


def table(result: dict[str, Any]) -> str:
    about = (
        f"{result['pairs']} pairs, T = {result['iterations']}, {result['batch']} pairs a step, "
        f"candidates of up to {result['new_tokens']} tokens sampled with transformers."
    )
    return "\n\n".join(
        [
            about,
            *(_times(kind, rounds) for kind, rounds in result["rounds"].items()),
            _sizes(result["rounds"]),
        ]
    )


def _times(kind: str, rounds: list[dict[str, Any]]) -> str:
    rows = []
    for phase in (*PHASES, "all"):
        seconds = {
            side: [
                sum(one["seconds"][side].values())
                if phase == "all"
                else one["seconds"][side][phase]
                for one in rounds
            ]
            for side in ("floor", "planned", "taken")
        }
        rows.append(
            [
                f"`{phase}`" if phase != "all" else "all",
                figure(seconds["taken"], 1),
                figure(seconds["planned"], 1),
                _error(seconds["planned"], seconds["taken"]),
                figure(seconds["floor"], 1),
            ]
        )
    measuring = figure([one["measuring"] for one in rounds])
    planning = figure([one["planning"] for one in rounds])
    head = (f"{kind}, seconds", "taken", "planned, `--measure`", "error, %", "at least")
    return f"{markdown(head, rows)}\n\n" + (
        f"The command took {planning} s, with `--measure` {measuring} s, imports included."
    )


def _sizes(kinds: dict[str, list[dict[str, Any]]]) -> str:
    rows = []
    for kind, rounds in kinds.items():
        for phase in (*EXACT, *EXPECTED):
            taken = [one["tokens"]["taken"][phase] for one in rounds]
            rows.append([f"{kind}: tokens, `{phase}`", figure(taken)])
            for side in ("planned", "floor"):
                found = [one["tokens"][side][phase] for one in rounds]
                rows[-1] += [figure(found), _error(found, taken)]
        for name, unit, digits in (("steps", 1, 0), ("disk", 2**20, 1), ("memory", 2**20, 0)):
            if any(one[name]["planned"] is None for one in rounds):
                continue
            found, taken = (
                [one[name][side] / unit for one in rounds] for side in ("planned", "taken")
            )
            label = name if unit == 1 else f"{name}, MiB"
            rows.append([f"{kind}: {label}", figure(taken, digits), figure(found, digits)])
            rows[-1] += [_error(found, taken), "", ""]
    head = ("", "taken", "planned, `--measure`", "error, %", "planned without", "error, %")
    return markdown(head, rows)


def _error(planned: Sequence[float], taken: Sequence[float]) -> str:
    """Median and spread of how far off a plan was, round by round."""
    errors = [100 * (p / t - 1) for p, t in zip(planned, taken, strict=True)]
    least, most = min(errors), max(errors)
    if least == most == 0:
        return "exact"
    return f"{median(errors):+.0f} ({least:+.0f} to {most:+.0f})"
