"""Write the configurations of this directory: models, datasets and systems of the SeRA paper.

Each file stands on its own; this one keeps them alike. `python example_yamls/paper/make.py`
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent

FULL: dict[str, Any] = {"learning_rate": 3.0e-6}
MODELS: dict[str, dict[str, Any]] = {
    "tinyllama-1.1b": {
        "base_model": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        "rl_beta": 0.2,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 8,
        **FULL,
    },
    "pythia-2.8b": {
        "base_model": "EleutherAI/pythia-2.8b",
        "chat_template": "chatml",
        "rl_beta": 0.2,
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 16,
        **FULL,
    },
    "mistral-7b": {
        "base_model": "mistralai/Mistral-7B-Instruct-v0.2",
        "rl_beta": 0.01,
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 16,
        "learning_rate": 5.0e-6,
        "adapter": "lora",
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0,
        "lora_target_linear": True,
    },
}

#: What a file says of its model.
NOTES = {
    "EleutherAI/pythia-2.8b": "# Start from your own SFT checkpoint: preference tuning a raw base "
    "model has little to select from.\n",
}

CONVERSATIONS = {"split": "train", "type": "chat_template.default", "field_messages": "prompt"}
DATASETS: dict[str, dict[str, Any]] = {
    "ultrafeedback": {
        "path": "argilla/ultrafeedback-binarized-preferences-cleaned",
        "split": "train",
        "type": "chat_template.argilla_chat",
    },
    "hh-rlhf": {"path": "trl-lib/hh-rlhf-helpful-base", **CONVERSATIONS},
    "tldr": {"path": "trl-lib/tldr-preference", **CONVERSATIONS},
}
SCORED = ["chosen-rating", "rejected-rating"]
#: A row for every pair of a prompt's answers: docs/systems.md shows how to make it.
RANKED = {
    "path": "pairs.jsonl",
    "ds_type": "json",
    "split": "train",
    "type": "chat_template.default",
    "field_messages": "prompt",
}

SELECTED = {"selection_ratio": 0.7, "bootstrap_ratio": 0.3}
ITERATIVE = {"selection": "all", "bootstrap_ratio": 0.0}
ONLINE = {"selection_ratio": 0.0, "bootstrap_ratio": 1.0}
JUDGE = {"base_url": "https://api.openai.com/v1", "model": "gpt-4", "api_key_env": "OPENAI_API_KEY"}

#: What a system is: lines of `sera:`, then keys beside the block.
SYSTEMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dpo": (ITERATIVE, {"num_epochs": 1}),
    "dpo-3-epochs": ({**ITERATIVE, "reference": "initial", "restart_optimizer": False}, {}),
    "iterative-dpo": (ITERATIVE, {}),
    "iterative-cdpo": (ITERATIVE, {"dpo_label_smoothing": 0.1}),
    "iterative-rdpo": ({**ITERATIVE, "loss": "robust"}, {"dpo_label_smoothing": 0.1}),
    "iterative-ipo": ({**ITERATIVE, "loss": "ipo", "ipo_reduction": "sum"}, {"rl_beta": 1.0}),
    "iterative-slic": ({**ITERATIVE, "loss": "slic"}, {}),
    "iterative-simpo": ({**ITERATIVE, "loss": "simpo"}, {"rl_beta": 2.0}),
    "kto-pair": ({**ITERATIVE, "loss": "kto_pair"}, {"rl_beta": 0.1}),
    "orpo": ({**ITERATIVE, "loss": "orpo"}, {"rl_beta": 0.1}),
    "curri-dpo": (
        {
            "selection": "curriculum",
            "bootstrap_ratio": 0.0,
            "score_columns": ["score_chosen", "score_rejected"],
        },
        {"datasets": [RANKED]},
    ),
    "spin": ({**ONLINE, "labeler": "spin", "candidates": 1}, {}),
    "oaif-reward-model": (
        {**ONLINE, "labeler": "reward_model", "reward_model": "./reward-model"},
        {},
    ),
    "oaif-llm": ({**ONLINE, "labeler": "judge", "judge": JUDGE, "candidates": 2}, {}),
    "self-rewarding": ({**ONLINE, "labeler": "self_judge"}, {}),
    "select-reference-logp": ({"selection": "reference_logp", "bootstrap_ratio": 0.0}, {}),
    "select-score": (
        {"selection": "score", "bootstrap_ratio": 0.0, "score_columns": SCORED},
        {},
    ),
    "select-irm": ({"bootstrap_ratio": 0.0}, {}),
    "bootstrap-only": ({**ONLINE}, {}),
    "sera": (SELECTED, {}),
    "best-sera": ({"selection_ratio": 0.7, "bootstrap_ratio": 2.0}, {}),
    "sera-ipo": ({**SELECTED, "loss": "ipo", "ipo_reduction": "sum"}, {"rl_beta": 1.0}),
    "sera-slic": ({**SELECTED, "loss": "slic"}, {}),
    "sera-simpo": ({**SELECTED, "loss": "simpo"}, {"rl_beta": 2.0}),
}
#: The systems that are run on the other datasets too.
ELSEWHERE = ("dpo", "iterative-dpo", "sera")

COMMON: dict[str, Any] = {
    "val_set_size": 0.01,
    "dataset_prepared_path": "./prepared",
    "sequence_len": 1024,
    "num_epochs": 3,
    "lr_scheduler": "cosine",
    "warmup_ratio": 0.1,
    "optimizer": "adamw_torch_fused",
    "seed": 42,
    "bf16": True,
    "tf32": True,
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "attn_implementation": "sdpa",
    "logging_steps": 10,
    "evals_per_epoch": 1,
    "saves_per_epoch": 1,
    "save_total_limit": 2,
    "auto_resume_from_checkpoints": True,
}


def configurations() -> dict[str, dict[str, Any]]:
    """Every configuration by its file's name."""
    found = {}
    for data, dataset in DATASETS.items():
        for model, keys in MODELS.items():
            for system, (block, beside) in SYSTEMS.items():
                if data != "ultrafeedback" and system not in ELSEWHERE:
                    continue
                name = f"{data}-{model}-{system}"
                found[name] = {
                    "base_model": keys["base_model"],
                    "plugins": ["sera_plugin.SeraPlugin"],
                    "rl": "sera",
                    "sera": dict(block),
                    "datasets": [dict(dataset)],
                    "output_dir": f"./outputs/{name}",
                    **keys,
                    **COMMON,
                    **beside,
                }
    return found


def write(name: str, config: dict[str, Any]) -> str:
    """The file's text."""
    body = yaml.dump(config, Dumper=_Plain, sort_keys=False, allow_unicode=True)
    note = NOTES.get(config["base_model"], "")
    return f"# {name}; docs/systems.md says what it is. Written by make.py.\n{note}{body}"


class _Plain(yaml.SafeDumper):
    """Writes what occurs twice twice, without anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


if __name__ == "__main__":
    for old in HERE.glob("*.yaml"):
        old.unlink()
    for name, config in configurations().items():
        (HERE / f"{name}.yaml").write_text(write(name, config), encoding="utf-8")
