"""Whole iterations: the host's own command in two gloo processes against one, a thread each."""

import json
import os
import subprocess
import sys
from typing import Any

from benchmarks.harness import Setup, figure, interleave, markdown, times
from benchmarks.host import SERA, environment, host_config, write_config, write_rows
from benchmarks.ranks import free_port
from benchmarks.whole_run import fresh
from benchmarks.workload import make_model, read_rows, vocabulary_of
from sera_plugin.config.sera import AS_PUBLISHED

TITLE = "Whole iterations on two ranks"
PHASES = ("score_offline", "sample", "score_candidates", "train")


def measure(setup: Setup) -> dict[str, Any]:
    """Seconds by phase of iterations 2 and 3 together, by number of ranks and round.

    Raises:
        ValueError: on a GPU.
        RuntimeError: if a command fails, with the end of what it printed.
    """
    if setup.device != "cpu":
        raise ValueError("one GPU has one rank: this part is measured on a CPU")
    model, rows_path = make_model(setup), setup.directory / "rows.jsonl"
    config = host_config(setup, model, rows_path)
    rows = read_rows(setup, 16, vocabulary_of(model), config["sequence_len"])
    write_rows(rows_path, rows)
    block = AS_PUBLISHED | {"max_new_tokens": 32, "sampler": "transformers"}
    config |= {"rl": "sera", "plugins": [SERA], "sera": block, "num_epochs": 3}
    # Without an accelerator the host asks for device 0 unless it is told how much memory there is.
    config |= {"max_memory": {"cpu": "8GiB"}, "dataset_num_proc": 1}
    kept: set[str] = set()

    def run(world: int) -> dict[str, float]:
        output = fresh(setup.directory / f"out-{world}")
        # The same batches, of both ranks together.
        changes = {"output_dir": str(output), "gradient_accumulation_steps": 2 // world}
        path = write_config(output.with_suffix(".yaml"), config | changes)
        launcher = ["torch.distributed.run", f"--nproc_per_node={world}"]
        launcher += [f"--master_port={free_port()}", "-m", "axolotl.cli.train", str(path)]
        alone = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        found = subprocess.run(
            [sys.executable, "-m", *launcher],
            env=environment() | alone,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if found.returncode:
            raise RuntimeError(f"{os.fspath(path)} failed:\n{found.stdout[-4000:]}")
        summaries = [
            json.loads((output / f"sera/iteration-0{t}/summary.json").read_text(encoding="utf-8"))
            for t in (2, 3)
        ]
        kept.add(json.dumps([one["pairs"] for one in summaries]))
        return {phase: sum(one["seconds"].get(phase, 0.0) for one in summaries) for phase in PHASES}

    sides = {str(world): lambda world=world: run(world) for world in (1, 2)}
    found = interleave(sides, setup.rounds, warm_up=False)
    return {"pairs": len(rows), "same_counts": len(kept) == 1, "seconds": found}


def table(result: dict[str, Any]) -> str:
    one, two = (
        {phase: [each[phase] for each in result["seconds"][world]] for phase in PHASES}
        | {"together": [sum(each.values()) for each in result["seconds"][world]]}
        for world in ("1", "2")
    )
    rows = [
        [f"`{name}`", figure(one[name], 1), figure(two[name], 1), times(one[name], two[name])]
        for name in (*PHASES, "together")
    ]
    counts = "the same" if result["same_counts"] else "not the same"
    return (
        f"{result['pairs']} pairs, LoRA of rank 8 over DDP, candidates of up to 32 tokens sampled "
        f"with transformers; iterations 2 and 3. Counts of pairs in all runs are {counts}.\n\n"
        + markdown(("phase", "one rank, s", "two ranks, s", "faster by"), rows)
    )
