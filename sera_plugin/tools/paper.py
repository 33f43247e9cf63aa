"""Configurations of the SeRA paper's runs, and of every system it compares with.

Source: Ko et al. 2025, section 4 (datasets, models, learning rates, beta) and its baselines;
docs/systems.md says what each system is and how it differs from its own paper.
"""

import difflib
import json
import os
from pathlib import Path
from typing import Any

import click
import yaml

from sera_plugin.config.quoting import quoted
from sera_plugin.config.sera import AS_PUBLISHED
from sera_plugin.rundir.writing import write_text
from sera_plugin.tools.command import refusing

FULL: dict[str, Any] = {"rl_beta": 0.2, "learning_rate": 3.0e-6}
BY_ONE = {"micro_batch_size": 1, "gradient_accumulation_steps": 16}
MODELS: dict[str, dict[str, Any]] = {
    "tinyllama-1.1b": {
        "base_model": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        "micro_batch_size": 2, "gradient_accumulation_steps": 8, **FULL,
    },
    "pythia-2.8b": {
        "base_model": "EleutherAI/pythia-2.8b", "chat_template": "chatml", **BY_ONE, **FULL,
    },
    "mistral-7b": {
        "base_model": "mistralai/Mistral-7B-Instruct-v0.2",
        "rl_beta": 0.01, **BY_ONE, "learning_rate": 5.0e-6,
        "adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_dropout": 0,
        "lora_target_linear": True,
    },
}  # fmt: skip

CONVERSATIONS = {"split": "train", "type": "chat_template.default", "field_messages": "prompt"}
DATASETS: dict[str, dict[str, Any]] = {
    "ultrafeedback": {
        "path": "argilla/ultrafeedback-binarized-preferences-cleaned",
        "split": "train", "type": "chat_template.argilla_chat",
    },
    "hh-rlhf": {"path": "trl-lib/hh-rlhf-helpful-base", **CONVERSATIONS},
    "tldr": {"path": "trl-lib/tldr-preference", **CONVERSATIONS},
}  # fmt: skip
SCORED = ["chosen-rating", "rejected-rating"]

SELECTED = {"selection_ratio": 0.7, "bootstrap_ratio": 0.3}
ITERATIVE = {"selection": "all", "bootstrap_ratio": 0.0}
ONLINE = {"selection_ratio": 0.0, "bootstrap_ratio": 1.0}
CURRICULUM = {
    "selection": "curriculum", "bootstrap_ratio": 0.0,
    "score_columns": ["score_chosen", "score_rejected"],
    # A row for every pair of a prompt's answers: docs/systems.md shows how to make it.
    "datasets": [{"path": "pairs.jsonl", "ds_type": "json", **CONVERSATIONS}],
}  # fmt: skip
JUDGE = {"base_url": "https://api.openai.com/v1", "model": "gpt-4", "api_key_env": "OPENAI_API_KEY"}

#: Keys that stand beside the block; a system's other ones are lines of `sera:`.
BESIDE = ("datasets", "dpo_label_smoothing", "num_epochs", "rl_beta")
SYSTEMS: dict[str, dict[str, Any]] = {
    "sera-dpo": SELECTED,
    "sera-ipo": {**SELECTED, "loss": "ipo", "ipo_reduction": "sum", "rl_beta": 1.0},
    "sera-slic": {**SELECTED, "loss": "slic"},
    "sera-simpo": {**SELECTED, "loss": "simpo", "rl_beta": 2.0},
    "best-sera": {"selection_ratio": 0.7, "bootstrap_ratio": 2.0},
    "select-irm": {"bootstrap_ratio": 0.0},
    "bootstrap-only": ONLINE,
    "dpo": {**ITERATIVE, "num_epochs": 1},
    "dpo-3-epochs": {**ITERATIVE, "reference": "initial", "restart_optimizer": False},
    "iterative-dpo": ITERATIVE,
    "iterative-cdpo": {**ITERATIVE, "dpo_label_smoothing": 0.1},
    "iterative-rdpo": {**ITERATIVE, "loss": "robust", "dpo_label_smoothing": 0.1},
    "iterative-ipo": {**ITERATIVE, "loss": "ipo", "ipo_reduction": "sum", "rl_beta": 1.0},
    "iterative-slic": {**ITERATIVE, "loss": "slic"},
    "iterative-simpo": {**ITERATIVE, "loss": "simpo", "rl_beta": 2.0},
    "kto-pair": {**ITERATIVE, "loss": "kto_pair", "rl_beta": 0.1},
    "orpo": {**ITERATIVE, "loss": "orpo", "rl_beta": 0.1},
    "curri-dpo": CURRICULUM,
    "spin": {**ONLINE, "labeler": "spin", "candidates": 1},
    "oaif-reward-model": {**ONLINE, "labeler": "reward_model", "reward_model": "./reward-model"},
    "oaif-llm": {**ONLINE, "labeler": "judge", "judge": JUDGE, "candidates": 2},
    "self-rewarding": {**ONLINE, "labeler": "self_judge"},
    "select-reference-logp": {"selection": "reference_logp", "bootstrap_ratio": 0.0},
    "select-score": {"selection": "score", "bootstrap_ratio": 0.0, "score_columns": SCORED},
}
#: The systems that are run on the other datasets too.
ELSEWHERE = ("sera-dpo", "dpo", "iterative-dpo")

COMMON: dict[str, Any] = {
    "val_set_size": 0.01, "dataset_prepared_path": "./prepared", "sequence_len": 1024,
    "num_epochs": 3, "lr_scheduler": "cosine", "warmup_ratio": 0.1,
    "optimizer": "adamw_torch_fused", "seed": 42, "bf16": True, "tf32": True,
    "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "attn_implementation": "sdpa", "logging_steps": 10, "evals_per_epoch": 1,
    "saves_per_epoch": 1, "save_total_limit": 2, "auto_resume_from_checkpoints": True,
}  # fmt: skip


def yaml_text(dataset: str, model: str, system: str) -> str:
    """One configuration as a file, by the keys of `DATASETS`, `MODELS` and `SYSTEMS`.

    Raises:
        ValueError: for an unknown name, with the one that comes closest, or for a system that the
            paper does not run on this dataset.
    """
    tables = {"dataset": DATASETS, "model": MODELS, "system": SYSTEMS}
    for name, (what, known) in zip((dataset, model, system), tables.items(), strict=True):
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            hint = f"Did you mean {' or '.join(close)}?" if close else f"Known: {', '.join(known)}."
            raise ValueError(f"{quoted(name)} is not a {what} of the paper. {hint}")
    if system not in systems(dataset):
        there = ", ".join(systems(dataset))
        raise ValueError(f"{system} is not run on {dataset}. These are: {there}.")
    given = SYSTEMS[system]
    keys = {
        "base_model": MODELS[model]["base_model"],
        "plugins": ["sera_plugin.SeraPlugin"],
        "rl": "sera",
        "sera": {k: v for k, v in given.items() if k not in BESIDE} | AS_PUBLISHED,
        "datasets": [DATASETS[dataset]],
        "output_dir": f"./outputs/{dataset}-{model}-{system}",
        **MODELS[model],
        **COMMON,
        **{key: value for key, value in given.items() if key in BESIDE},
    }
    plain = json.loads(json.dumps(keys))  # what occurs twice is written twice, without anchors
    body = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    head = f"# {system} on {dataset} with {model}; docs/systems.md says what it is.\n"
    if model == "pythia-2.8b":
        head += (
            "# Start from your own SFT checkpoint: preference tuning a raw base model has "
            "little to select from.\n"
        )
    return head + body


def listing() -> str:
    """What there is to choose from, each name with what it stands for."""
    datasets = {name: keys["path"] for name, keys in DATASETS.items()}
    for name in datasets:
        if systems(name) == ELSEWHERE:
            datasets[name] += f"; only {', '.join(ELSEWHERE)}"
    models = {name: keys["base_model"] for name, keys in MODELS.items()}
    methods = {
        name: ", ".join(
            f"{key}: {'...' if isinstance(value, dict | list) else value}"
            for key, value in keys.items()
        )
        for name, keys in SYSTEMS.items()
    }
    named = {"DATASET": datasets, "MODEL": models, "SYSTEM": methods}
    return "\n\n".join(
        "\n".join([head, *(f"  {name:<22} {what}" for name, what in rows.items())])
        for head, rows in named.items()
    )


def systems(dataset: str) -> tuple[str, ...]:
    """The systems that the paper runs on a dataset."""
    return tuple(SYSTEMS) if dataset == "ultrafeedback" else ELSEWHERE


@click.command(
    epilog="""\b
Examples:
  axolotl sera paper
  axolotl sera paper ultrafeedback tinyllama-1.1b sera-dpo --output config.yaml
  python -m sera_plugin paper tldr mistral-7b iterative-dpo > config.yaml
"""
)
@click.argument("dataset", required=False)
@click.argument("model", required=False)
@click.argument("system", required=False)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A new file for the YAML; printed unless given.",
)
def paper(dataset: str | None, model: str | None, system: str | None, output: Path | None) -> None:
    """List the configurations of the SeRA paper, or write one.

    Without arguments it lists datasets, models and systems; with one of each it writes a YAML that
    `axolotl train` takes. docs/systems.md describes the systems.
    """
    if dataset is None and output is None:
        click.echo(listing())
        return
    if dataset is None or model is None or system is None:
        raise click.UsageError("Give DATASET, MODEL and SYSTEM, or nothing to list them.")
    with refusing():
        text = yaml_text(dataset, model, system)
        if output is not None:
            if os.path.lexists(output):
                raise FileExistsError(f"{output} exists. Remove it, or name another file.")
            write_text(output, text)
    click.echo(text.rstrip() if output is None else output)
