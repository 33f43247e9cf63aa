"""Whole `rl: sera` runs through the real host: to the end, killed and continued, every kind."""

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import yaml

from benchmarks.harness import Setup, fresh
from benchmarks.host import SERA, host_config, train_here, write_config, write_rows
from benchmarks.workload import make_model, make_rows, vocabulary_of
from sera_plugin.config.sera import AS_PUBLISHED

#: Short runs of the demo's world; each step adds what it is about.
BASE = """
{rl: sera, rl_beta: 0.2, sera: {max_new_tokens: 16, temperature: 1.0, sampler: transformers,
reward: fitted, trust: warn},
sequence_len: 48, num_epochs: 3, micro_batch_size: 16, gradient_accumulation_steps: 1,
learning_rate: 1.0e-4, lr_scheduler: constant, optimizer: adamw_torch, seed: 11, bf16: true,
fp16: false, tf32: false, attn_implementation: sdpa, gradient_checkpointing: false,
logging_steps: 4, saves_per_epoch: 1, save_total_limit: 1, val_set_size: 0,
dataset_num_proc: 2}
"""
LORA = {"adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True}
FORMATS = {
    **{f"field_{name}": name for name in ("prompt", "chosen", "rejected")},
    "prompt_format": "<s> <|user|> {prompt} <|assistant|>",
    "chosen_format": " {chosen}",
    "rejected_format": " {rejected}",
}
FSDP = {
    "fsdp_version": 2,
    "fsdp_config": {
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
        "reshard_after_forward": True,
        "offload_params": True,
    },
}


def world(setup: Setup) -> dict[str, Any]:
    """The demo's model, trained a little, and pairs of its own answers."""
    from sera_plugin.tools.demo.base_model import load_model, respond, train_base_model
    from sera_plugin.tools.demo.run import make_pairs
    from sera_plugin.tools.demo.world import make_prompt

    smoke = setup.shape == "toy"
    base = setup.directory / "base"
    train_base_model(base, steps=40 if smoke else 200, batch_size=32 if smoke else 64)
    random = Random(5)
    prompts = [make_prompt(random) for _ in range(40 if smoke else 400)]
    answers = [respond(*load_model(base), prompts, seed=seed) for seed in (1, 2)]
    rows = make_pairs(prompts, *answers)
    write_rows(setup.directory / "world.jsonl", rows)
    return {"pairs": len(rows)}


def world_config(setup: Setup, name: str, **changes: Any) -> dict[str, Any]:
    """A run of the demo's world, with its output below the scratch directory."""
    path, place = setup.directory / "world.jsonl", setup.directory / name
    data = {"path": str(path), "ds_type": "json", "split": "train", "type": FORMATS}
    config: dict[str, Any] = yaml.safe_load(BASE)
    return (
        config
        | changes
        | {
            "plugins": [SERA],
            "base_model": str(setup.directory / "base"),
            "datasets": [data],
            "dataset_prepared_path": str(place / "prepared"),
            "output_dir": str(place / "out"),
        }
    )


def start(setup: Setup, config: dict[str, Any], command: Sequence[str] = ()) -> Any:
    """Begin to train in a process of its own, which prints where this one does.

    By the host's function, or by a command with the configuration's path at `{}`.
    """
    output = Path(config["output_dir"])
    output.parent.mkdir(parents=True, exist_ok=True)
    path = write_config(output.with_suffix(".yaml"), config)
    child = fresh(setup.device).Process(
        target=train, args=(path, setup.device, [part.format(path) for part in command])
    )
    child.start()
    return child


def train(path: Path, device: str, command: Sequence[str]) -> None:
    if command:
        os.execv(sys.executable, [sys.executable, *command])
    multiprocessing.set_start_method(None, force=True)  # for data loaders, as in any process
    if device == "cpu":
        from transformers import training_args

        # The host asks a GPU whether it has bf16; a CPU has it too.
        training_args.is_torch_bf16_gpu_available = lambda: True
    train_here(path)


def finish(child: Any, config: dict[str, Any]) -> dict[str, Any]:
    """Wait for a run to end well; figures of each iteration from its summaries."""
    child.join()
    if child.exitcode:
        raise RuntimeError(f"training ended with {child.exitcode}; its own message is above")
    run = Path(config["output_dir"]) / "sera"
    found = [json.loads(path.read_text()) for path in sorted(run.glob("iteration-*/summary.json"))]
    if len(found) != config["num_epochs"]:
        raise RuntimeError(f"{len(found)} of {config['num_epochs']} iterations are recorded")
    return {
        "phases": [one["seconds"] for one in found],
        # Absent in an iteration that was continued after its first step.
        "step_zero": [one.get("step_zero", {}).get("nats_per_root_token") for one in found],
        "pairs": [[one["pairs"][key] for key in ("kept", "trained")] for one in found],
        "reward": [one.get("reward") for one in found],
        "drift": [one.get("drift") for one in found],  # nats an answer, from the initial policy
        "alarms": [[alarm["name"] for alarm in one["alarms"]] for one in found],
    }


def trained(setup: Setup, config: dict[str, Any], command: Sequence[str] = ()) -> dict[str, Any]:
    begun = time.perf_counter()
    found = finish(start(setup, config, command), config)
    return {"command_seconds": round(time.perf_counter() - begun, 1), **found}


def full(setup: Setup) -> dict[str, Any]:
    return trained(setup, world_config(setup, "full"))


def lora_bf16(setup: Setup) -> dict[str, Any]:
    """And how often a step waits for the device, by the line of code that does."""
    config = world_config(setup, "lora_bf16", num_epochs=2, **LORA)
    if setup.device == "cpu":
        return trained(setup, config) | {"waits": "left out: a CPU has no queue to wait for"}
    config["plugins"].append("benchmarks.probe.Waits")
    found = trained(setup, config)
    return found | json.loads((Path(config["output_dir"]) / "waits.json").read_text())


def lora_fp16(setup: Setup) -> dict[str, Any]:
    if setup.device == "cpu":
        return {"left_out": "a CPU has no fp16"}
    kind = {"bf16": False, "fp16": True}
    return trained(setup, world_config(setup, "lora_fp16", num_epochs=2, **LORA, **kind))


def torchrun(setup: Setup) -> dict[str, Any]:
    """The host's own command, with the launcher torchrun and one process."""
    low = setup.device == "cuda"
    command = ["-m", "axolotl.cli.main", "train", "{}", "--launcher", "torchrun"]
    command += ["--", "--nproc_per_node", "1"]
    return trained(setup, world_config(setup, "torchrun", num_epochs=2, bf16=low), command)


def fsdp_offload(setup: Setup) -> dict[str, Any]:
    """FSDP2 with weights in host memory, one process under torchrun."""
    config = world_config(setup, "fsdp_offload", num_epochs=2, **FSDP)
    module = "axolotl.cli.train"
    if setup.device == "cpu":
        # Over gloo, by what the tests replace in the host; memory is pinned for accelerators only.
        module = "tests.host_on_cpu"
        config["fsdp_config"] |= {"cpu_offload_pin_memory": False}
        config |= {"bf16": False, "max_memory": {"cpu": "8GiB"}}
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
    return trained(setup, config, [*command, "-m", module, "{}"])


def killed(setup: Setup) -> dict[str, Any]:
    """Equal to the run that was not killed? Waits for that one to end."""
    found = killed_once(setup, world_config(setup, "killed"))
    waited = 0
    while not (setup.directory / "full.json").exists():
        if (waited := waited + 1) > 60:
            return found | {"against_full": "not ended"}
        time.sleep(1.0)
    full, again = (setup.directory / name / "out" / "sera" for name in ("full", "killed"))
    return found | {"against_full": [compared(full, again, number) for number in (1, 2, 3)]}


def evaluate(setup: Setup) -> dict[str, Any]:
    """With held-out pairs, evaluated by the host as well, and killed once."""
    held_out = {"val_set_size": 0.2, "evals_per_epoch": 2}
    return killed_once(setup, world_config(setup, "evaluate", **held_out))


def killed_once(setup: Setup, config: dict[str, Any]) -> dict[str, Any]:
    """SIGKILL once iteration 2 has samples, then the same command to its end."""
    run = Path(config["output_dir"]) / "sera" / "iteration-02"
    child = start(setup, config)
    patterns = ("samples/*.parquet", "candidates.parquet")
    while child.is_alive() and not any(any(run.glob(each)) for each in patterns):
        time.sleep(0.002)
    if not child.is_alive():
        raise RuntimeError(f"the run ended with {child.exitcode} before it could be killed")
    for process in psutil.Process(child.pid).children(recursive=True):
        process.kill()
    child.kill()
    child.join()
    there = sorted(path.name for path in run.iterdir())
    again = trained(setup, config | {"auto_resume_from_checkpoints": True})
    return {"there_when_killed": there, **again}


def compared(one: Path, other: Path, number: int) -> dict[str, Any]:
    """How many kept pairs two runs do not share in an iteration, and how far scores differ."""
    offline = [
        pq.read_table(run / f"iteration-{number:02d}/offline.parquet") for run in (one, other)
    ]
    scores = [np.array([table["chosen_logp"], table["rejected_logp"]]) for table in offline]
    kept = []
    for run, table in zip((one, other), offline, strict=True):
        chosen = "selected" in table.column_names  # iteration 1 takes all
        kept_rows = np.flatnonzero(table["selected"]) if chosen else np.arange(len(table))
        rows = {("offline", row) for row in kept_rows.tolist()}
        path = run / f"iteration-{number:02d}/bootstrapped.parquet"
        sampled = pq.read_table(path).to_pylist() if path.exists() else []
        names = ("row", "chosen_candidate", "rejected_candidate")
        kept.append(rows | {tuple(pair[n] for n in names) for pair in sampled if pair["selected"]})
    return {
        "kept": len(kept[0]),
        "not_shared": len(kept[0] ^ kept[1]),
        "greatest_difference_nats": float(np.abs(scores[0] - scores[1]).max()),
    }


def qlora(setup: Setup) -> dict[str, Any]:
    """A random model of 1.1 billion weights in nf4, with all that keeps memory low."""
    model, path = make_model(setup), setup.directory / "qlora.jsonl"
    config = host_config(setup, model, path) | {"num_epochs": 2, "rl": "sera", "plugins": [SERA]}
    config["sequence_len"] = min(512, config["sequence_len"])
    write_rows(path, make_rows(setup.pairs or 48, vocabulary_of(model), config["sequence_len"]))
    config |= {"adapter": "qlora", "load_in_4bit": True, "gradient_checkpointing": True}
    config |= {"bf16": True, "learning_rate": 1e-3}
    sera = {"max_new_tokens": 48, "temperature": 1.0, "sampler": "transformers"}
    config |= {"sera": AS_PUBLISHED | sera}
    if setup.device == "cuda":
        config["optimizer"] = "paged_adamw_8bit"
    return trained(setup, config | {"output_dir": str(setup.directory / "qlora" / "out")})
