"""Whole commands: SeRA in one run against iterative DPO as three runs of the host.

The host ignores `lora_model_dir` for DPO (axolotl 0.19: a second run starts from a new adapter), so
iterative DPO merges the adapter after each run but the last and goes on from the merged model.
"""

import json
import re
import shutil
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.harness import Setup, figure, interleave, markdown, preloaded, times
from benchmarks.host import PROBE, SERA, axolotl, host_config, write_config, write_rows
from benchmarks.workload import make_model, read_rows, vocabulary_of
from sera_plugin.config.sera import AS_PUBLISHED

TITLE = "Whole runs"
ITERATIONS = 3
RATIOS = {"selection": (0.7, 0.0), "full": (0.7, 0.3)}
PHASES = ("score_offline", "sample", "score_candidates", "select", "train")
_RUNTIME = re.compile(r"'train_runtime': '?([0-9.]+)")


def measure(setup: Setup) -> dict[str, Any]:
    """Seconds of each side by round, seconds by phase, and tokens forwarded without gradients.

    Raises:
        ValueError: if SeRA forwarded more tokens than it says.
    """
    model = make_model(setup)
    rows_path = setup.directory / "whole.jsonl"
    config = host_config(setup, model, rows_path)
    count = 16 if setup.device == "cpu" else 256
    rows = read_rows(setup, count, vocabulary_of(model), config["sequence_len"])
    write_rows(rows_path, rows)
    new_tokens = 32 if setup.device == "cpu" else 256

    def sera(name: str, probe: bool = False) -> dict[str, Any]:
        output = fresh(setup.directory / name)
        selection, bootstrap = RATIOS[name]
        block = AS_PUBLISHED | {"selection_ratio": selection, "bootstrap_ratio": bootstrap}
        block |= {"max_new_tokens": new_tokens, "sampler": "transformers"}
        changes = {
            "rl": "sera",
            "plugins": [SERA, *([PROBE] if probe else [])],
            "sera": block,
            "num_epochs": ITERATIONS,
            "output_dir": str(output),
        }
        seconds, printed = timed(
            "train", write_config(output.with_suffix(".yaml"), config | changes)
        )
        found = [
            json.loads(path.read_text(encoding="utf-8"))
            for path in sorted(output.glob("sera/iteration-*/summary.json"))
        ]
        phases = {phase: sum(one["seconds"].get(phase, 0.0) for one in found) for phase in PHASES}
        forwarded: dict[str, int] = {}
        for one in found:
            for phase, cost in one["forwarded"].items():
                forwarded[phase] = forwarded.get(phase, 0) + cost["tokens"]
        return {
            "seconds": seconds,
            "inside": runtime(printed),
            "phases": phases,
            "forwarded": forwarded,
            "probed": probed(output) if probe else None,
        }

    def iterative(probe: bool = False) -> dict[str, Any]:
        base, result = str(model), {"seconds": 0.0, "inside": 0.0, "merging": 0.0, "probed": 0}
        for iteration in range(1, ITERATIONS + 1):
            output = fresh(setup.directory / f"iterative-{iteration}")
            changes: dict[str, Any] = {"base_model": base, "output_dir": str(output)}
            changes |= {"plugins": [PROBE]} if probe else {}
            path = write_config(output.with_suffix(".yaml"), config | changes)
            seconds, printed = timed("train", path)
            result["seconds"] += seconds
            result["inside"] += runtime(printed)
            result["probed"] += probed(output) if probe else 0
            if iteration < ITERATIONS:
                seconds, _ = timed("merge-lora", path)
                result["seconds"] += seconds
                result["merging"] += seconds
                base = str(output / "merged")
        return result

    counted = {"selection": sera("selection", probe=True), "iterative": iterative(probe=True)}
    for side, one in counted.items():  # of use where what follows is cut off
        print(f"round 0/{setup.rounds}: {side}: {one}", flush=True)
    selection = counted["selection"]
    # Fewer where completions share a prompt.
    if selection["probed"] > selection["forwarded"]["score_offline"]:
        raise ValueError(
            f"summary.json counts {selection['forwarded']} tokens, but {selection['probed']} were "
            "forwarded without gradients"
        )
    sides = {
        "selection": lambda: sera("selection"),
        "iterative": iterative,
        "full": lambda: sera("full"),
    }
    found = interleave(sides, setup.rounds, warm_up=False)
    return {
        "pairs": len(rows),
        "iterations": ITERATIONS,
        "imports_counted": not preloaded(),
        "new_tokens": new_tokens,
        "offline_tokens": selection["probed"],
        "reference_tokens": counted["iterative"]["probed"],
        "forwarded": {name: found[name][0]["forwarded"] for name in RATIOS},
        "seconds": {name: [one["seconds"] for one in runs] for name, runs in found.items()},
        "inside": {name: [one["inside"] for one in runs] for name, runs in found.items()},
        "merging": [one["merging"] for one in found["iterative"]],
        "phases": {name: [one["phases"] for one in found[name]] for name in RATIOS},
    }


def fresh(output: Path) -> Path:
    shutil.rmtree(output, ignore_errors=True)
    return output


def timed(command: str, path: Path) -> tuple[float, str]:
    start = time.perf_counter()
    printed = axolotl(command, str(path))
    return time.perf_counter() - start, printed


def runtime(printed: str) -> float:
    """Seconds inside the host's `train()`."""
    found = _RUNTIME.findall(printed)
    if len(found) != 1:
        raise ValueError(f"train_runtime stands {len(found)} times in:\n{printed[-3000:]}")
    return float(found[0])


def probed(output: Path) -> int:
    found = json.loads((output / "probe.json").read_text(encoding="utf-8"))
    return int(found["forwarded_tokens"])


def table(result: dict[str, Any]) -> str:
    names = {
        "selection": "SeRA 0.7 / 0",
        "iterative": "iterative DPO",
        "full": "SeRA 0.7 / 0.3",
    }
    seconds, inside = result["seconds"], result["inside"]
    rows = [
        [
            name,
            figure(seconds[side], 1),
            times(seconds[side], seconds["iterative"]),
            figure(inside[side], 1),
            times(inside[side], inside["iterative"]),
        ]
        for side, name in names.items()
    ]
    overhead = [
        100 * (mine / theirs - 1)
        for mine, theirs in zip(inside["full"], inside["iterative"], strict=True)
    ]
    extra = result["offline_tokens"] - result["reference_tokens"]
    head = ("", "commands, s", "against iterative DPO", "inside `train()`, s", "against it")
    shares = [
        [names[side], *(_share(result["phases"][side], phase) for phase in PHASES)]
        for side in RATIOS
    ]
    return "\n\n".join(
        (
            f"{result['pairs']} pairs, T = {result['iterations']}, LoRA of rank 8, candidates of "
            f"up to {result['new_tokens']} tokens sampled with transformers. Iterative DPO: "
            f"{result['iterations']} runs of `rl: dpo` and {result['iterations'] - 1} of "
            f"`axolotl merge-lora`, which took {figure(result['merging'], 1)} s of its commands.",
            markdown(head, rows),
            f"SeRA 0.7 / 0.3 takes {figure(overhead, 0)} % more time inside `train()` than "
            "iterative DPO.",
            "Tokens forwarded without gradients: "
            f"{result['offline_tokens']:,} by SeRA 0.7 / 0 to score the offline pairs, "
            f"{result['reference_tokens']:,} by iterative DPO for its reference; {extra:+,}.",
            markdown(("share of time, %", *(f"`{phase}`" for phase in PHASES)), shares),
        )
    )


def _share(rounds: list[dict[str, float]], phase: str) -> str:
    return f"{median(100 * one[phase] / sum(one.values()) for one in rounds):.1f}"
