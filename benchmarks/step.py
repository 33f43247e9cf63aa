"""Optimizer steps per second inside the training loop: `rl: sera` against the host's `rl: dpo`."""

import json
import shutil
from importlib.util import find_spec
from typing import Any

from benchmarks.harness import Setup, figure, in_fresh_process, interleave, markdown, times
from benchmarks.host import PROBE, SERA, host_config, train_here, write_config, write_rows
from benchmarks.workload import make_model, read_rows, vocabulary_of
from sera_plugin.config.sera import AS_PUBLISHED

TITLE = "Training step"
SIDES: dict[str, dict[str, Any]] = {
    # All pairs kept and none sampled: the same epoch over the same data as the host's.
    "sera": {
        "rl": "sera",
        "plugins": [SERA, PROBE],
        "sera": AS_PUBLISHED | {"selection_ratio": 1.0, "bootstrap_ratio": 0.0},
    },
    "dpo": {"rl": "dpo", "plugins": [PROBE]},
    "dpo_precomputed": {"rl": "dpo", "plugins": [PROBE], "precompute_ref_log_probs": True},
}
#: Where flash attention is installed for a GPU.
FLASH = {
    side: SIDES["sera"] | {"attn_implementation": "flash_attention_2", "dpo_padding_free": free}
    for side, free in (("flash", False), ("padding_free", True))
}


def measure(setup: Setup) -> dict[str, Any]:
    """Steps per second of each side, by round.

    Raises:
        ValueError: if the sides did not train on the same number of tokens.
    """
    model = make_model(setup)
    config = host_config(setup, model, setup.directory / "step.jsonl")
    count = 24 if setup.device == "cpu" else 256
    rows = read_rows(setup, count, vocabulary_of(model), config["sequence_len"])
    write_rows(setup.directory / "step.jsonl", rows)
    flash = setup.device == "cuda" and find_spec("flash_attn") is not None
    every = SIDES | (FLASH if flash else {})
    tokens: dict[str, set[int]] = {side: set() for side in every}
    steps: set[int] = set()

    def run(side: str) -> float:
        output = setup.directory / f"step-{side}"
        shutil.rmtree(output, ignore_errors=True)
        path = setup.directory / f"step-{side}.yaml"
        write_config(path, config | every[side] | {"output_dir": str(output)})
        in_fresh_process(setup, train_here, path)
        found = json.loads((output / "probe.json").read_text(encoding="utf-8"))
        tokens[side].add(found["trained_tokens"])
        ends = found["step_ends"]
        steps.add(len(ends))
        # From the end of the first step: what is set up in it is no part of the others.
        return (len(ends) - 1) / (ends[-1] - ends[0])

    sides = {side: lambda side=side: run(side) for side in every}
    rates = interleave(sides, setup.rounds, warm_up=False)
    if len(set.union(*tokens.values())) != 1 or len(steps) != 1 or tokens["sera"] == {0}:
        raise ValueError(f"the sides trained on different data: {tokens} tokens, {steps} steps")
    return {
        "pairs": len(rows),
        "steps": steps.pop(),
        "tokens": tokens["sera"].pop(),
        "batch": config["micro_batch_size"] * config["gradient_accumulation_steps"],
        "steps_per_second": rates,
    }


def table(result: dict[str, Any]) -> str:
    rates = result["steps_per_second"]
    names = {
        "sera": "`rl: sera`",
        "dpo": "`rl: dpo`",
        "dpo_precomputed": "`rl: dpo`, `precompute_ref_log_probs: true`",
        "flash": "`rl: sera`, `attn_implementation: flash_attention_2`",
        "padding_free": "the same with `dpo_padding_free: true`",
    }
    rows = [
        [name, figure(rates[side], 2), times(rates["sera"], rates[side])]
        for side, name in names.items()
        if side in rates
    ]
    return (
        f"LoRA of rank 8; {result['pairs']} pairs, {result['tokens']:,} tokens, {result['steps']} "
        f"steps of {result['batch']} pairs, the first not counted.\n\n"
        + markdown(("", "steps/s", "`rl: sera` is faster by"), rows)
    )
