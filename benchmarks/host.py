"""Configurations and commands of the host, for parts that train."""

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.harness import ROOT, Setup, preloaded
from benchmarks.workload import ANSWER_FORMAT, PROMPT_FORMAT, longest_of

SERA = "sera_plugin.SeraPlugin"
PROBE = "benchmarks.probe.Probe"


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def host_config(setup: Setup, model: Path, rows: Path) -> dict[str, Any]:
    """What all trainings have in common: a LoRA of rank 8 on all linear layers."""
    cuda = setup.device == "cuda"
    return {
        "base_model": str(model),
        "rl": "dpo",
        "rl_beta": 0.2,
        "datasets": [
            {
                "path": str(rows),
                "ds_type": "json",
                "split": "train",
                "type": {
                    "field_prompt": "prompt",
                    "field_chosen": "chosen",
                    "field_rejected": "rejected",
                    "prompt_format": PROMPT_FORMAT.format("{prompt}"),
                    "chosen_format": ANSWER_FORMAT.format("{chosen}"),
                    "rejected_format": ANSWER_FORMAT.format("{rejected}"),
                },
            }
        ],
        "dataset_prepared_path": str(setup.directory / "prepared"),
        "sequence_len": longest_of(setup, model),
        "num_epochs": 1,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 4 if cuda else 1,
        "adapter": "lora",
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_target_linear": True,
        "learning_rate": 5e-6,
        "lr_scheduler": "constant",
        "optimizer": "adamw_torch",
        "seed": 0,
        "bf16": cuda,
        "fp16": False,
        "tf32": False,
        "attn_implementation": "sdpa",
        "gradient_checkpointing": cuda,
        "logging_steps": 1,
        "save_strategy": "no",
        "val_set_size": 0,
    }


def write_config(path: Path, config: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def environment() -> dict[str, str]:
    """For commands of the host and of this package, which are not to look anything up."""
    programs = str(Path(sys.executable).parent)
    return os.environ | {
        "AXOLOTL_DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "PATH": os.pathsep.join([programs, os.environ.get("PATH", "")]),
    }


def axolotl(*arguments: str) -> str:
    """Run the host's command as a user does, and return what it printed.

    In a process that has imported the host, one that is forked from it.

    Raises:
        RuntimeError: if it fails, with the end of what it printed.
    """
    # As a module: where packages lie in a folder on the path, there is no program `axolotl`.
    command = [sys.executable, "-m", "axolotl.cli.main", *arguments]
    with tempfile.TemporaryFile() as file:
        if preloaded():
            child = multiprocessing.get_context("fork").Process(
                target=_command, args=(arguments, file.fileno())
            )
            child.start()
            child.join()
            code = child.exitcode
        else:
            code = subprocess.run(
                command, env=environment(), stdout=file, stderr=subprocess.STDOUT
            ).returncode
        file.seek(0)
        printed = file.read().decode("utf-8", "replace")
    if code:
        raise RuntimeError(f"{' '.join(command)} failed:\n{printed[-4000:]}")
    return printed


def _command(arguments: Sequence[str], output: int) -> None:
    from axolotl.cli.main import cli

    os.dup2(output, 1)
    os.dup2(output, 2)
    multiprocessing.set_start_method(None, force=True)
    # `axolotl train` starts a launcher; this is what it would start.
    if arguments[0] == "train":
        train_here(Path(arguments[1]))
    else:
        cli(arguments)


def train_here(path: Path) -> None:
    """`axolotl train` in this process, for trainings of which only the loop is timed."""
    from axolotl.cli.train import do_cli

    do_cli(str(path))
