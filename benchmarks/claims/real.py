"""The questions of Fig. 1, 2 and 6 to a dataset with scores and a model of yours.

There is no true reward here: how an answer was scored stands in for it. Every way to select is
compared on the same margins, score gaps and log-probabilities, which one run has.
"""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import yaml

from benchmarks.claims.measure import FloatArray, numbers, rounded
from benchmarks.claims.systems import System
from sera_plugin.journal import key_of
from sera_plugin.report.agreement import r_squared
from sera_plugin.selection import select_largest
from sera_plugin.summary import jaccard

SYSTEMS = (
    System("iterative DPO", {"selection": "all", "bootstrap_ratio": 0}),
    System("selection by irm", {"bootstrap_ratio": 0}),
    System("selection by score", {"selection": "score", "bootstrap_ratio": 0}),
    System("selection by reference", {"selection": "reference_logp", "bootstrap_ratio": 0}),
)
COLUMNS = ("score_chosen", "score_rejected")
RATIO = 0.7


@dataclass(frozen=True)
class Settings:
    """What the runs on a dataset have in common.

    Attributes:
        pairs: at most so many, the first that are short enough.
        tokens: most tokens of prompt and answer together.
        learning_rate, batch, beta, iterations: of training.
    """

    pairs: int = 256
    tokens: int = 256
    learning_rate: float = 3e-5
    batch: int = 16
    beta: float = 0.2
    iterations: int = 3


def key(system: System, settings: Settings, seed: int, data: str, model: str) -> str:
    return key_of("real", asdict(system), asdict(settings), seed, data, model)[:16]


def read_pairs(path: Path) -> list[dict[str, Any]]:
    """JSONL, gzipped or not, with prompt, chosen, rejected, score_chosen, score_rejected.

    Raises:
        ValueError: naming the first line that lacks one of them.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    wanted = ("prompt", "chosen", "rejected", *COLUMNS)
    rows = []
    with opened(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            row = json.loads(line)
            if missing := [name for name in wanted if row.get(name) is None]:
                raise ValueError(
                    f"{path}, line {number} has no {missing[0]}. Every line needs "
                    f"{', '.join(wanted)}."
                )
            rows.append({name: row[name] for name in wanted})
    return rows


def perform(
    system: System, settings: Settings, seed: int, data: Path, model: Path, scratch: Path
) -> dict[str, Any]:
    """Train on the dataset and measure; the record that is kept."""
    from axolotl.cli.train import do_cli
    from transformers import AutoTokenizer

    # A directory the user named: there is no revision to pin.
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)  # nosec B615
    template = tokenizer.apply_chat_template(
        [{"role": "user", "content": "{prompt}"}], tokenize=False, add_generation_prompt=True
    )
    # The host fills it with str.format.
    template = template.replace("{", "{{").replace("}", "}}").replace("{{prompt}}", "{prompt}")
    rows = fitting(read_pairs(data), tokenizer, template, settings)
    pairs = scratch / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    output, path = scratch / "out", scratch / "config.yaml"
    path.write_text(
        yaml.safe_dump(config(system, settings, seed, model, template, pairs, output)),
        encoding="utf-8",
    )
    start = time.perf_counter()
    do_cli(config=str(path))
    return {
        "real": system.name,
        "seed": seed,
        "data": data.name,
        "model": model.name,
        "settings": asdict(settings),
        "pairs": len(rows),
        "seconds": round(time.perf_counter() - start, 2),
        "iterations": rounded(
            [iteration_figures(output / "sera", t) for t in range(2, settings.iterations + 1)]
        ),
    }


def fitting(
    rows: Sequence[dict[str, Any]], tokenizer: Any, template: str, settings: Settings
) -> list[dict[str, Any]]:
    """The first rows of which both answers are short enough."""
    found: list[dict[str, Any]] = []
    for row in rows:
        prompt = template.format(prompt=row["prompt"])
        longest = max(len(tokenizer(prompt + row[s])["input_ids"]) for s in ("chosen", "rejected"))
        if longest < settings.tokens:
            found.append(row)
        if len(found) == settings.pairs:
            break
    return found


def config(
    system: System,
    settings: Settings,
    seed: int,
    model: Path,
    template: str,
    pairs: Path,
    output: Path,
) -> dict[str, Any]:
    """The YAML of a run."""
    return {
        "base_model": str(model),
        "plugins": ["sera_plugin.SeraPlugin"],
        "rl": "sera",
        "sera": {"score_columns": list(COLUMNS), "sampler": "transformers", **system.sera},
        "rl_beta": settings.beta,
        "datasets": [
            {
                "path": str(pairs),
                "ds_type": "json",
                "split": "train",
                "type": {
                    "field_prompt": "prompt",
                    "field_chosen": "chosen",
                    "field_rejected": "rejected",
                    "prompt_format": template,
                    "chosen_format": "{chosen}",
                    "rejected_format": "{rejected}",
                },
            }
        ],
        "dataset_prepared_path": str(output.with_name("prepared")),
        "val_set_size": 0,
        "output_dir": str(output),
        "sequence_len": settings.tokens + 8,
        "num_epochs": settings.iterations,
        "micro_batch_size": settings.batch,
        "gradient_accumulation_steps": 1,
        "learning_rate": settings.learning_rate,
        "lr_scheduler": "constant",
        "optimizer": "adamw_torch",
        "seed": seed,
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "attn_implementation": "sdpa",
        "gradient_checkpointing": False,
        "logging_steps": 1_000,
        "save_strategy": "no",
    }


def iteration_figures(root: Path, iteration: int) -> dict[str, Any]:
    """What rewards follow, and what each way to select would keep, in iteration t >= 2.

    Returns:
        `r2_score`, `r2_length`: R^2 of the implicit reward of offline answers with their score and
        their length. For each way to select `kept`: the mean score gap and length gap (tokens) of
        what it keeps, the share of it whose chosen answer is the longer one, and its Jaccard index
        with `irm`.
    """
    dataset = pq.read_table(root / "dataset.parquet")
    offline = pq.read_table(root / f"iteration-{iteration:02}" / "offline.parquet")

    def of_both(table: Any, column: str) -> FloatArray:
        return np.concatenate([numbers(table, column.format(s)) for s in ("chosen", "rejected")])

    def gap(table: Any, column: str) -> FloatArray:
        return numbers(table, column.format("chosen")) - numbers(table, column.format("rejected"))

    reward = of_both(offline, "{}_reward")
    score, length = gap(dataset, "score_{}"), gap(offline, "{}_length")
    count = round(RATIO * len(score))
    orders: Mapping[str, FloatArray] = {
        "irm": numbers(offline, "margin"),
        "score": score,
        "reference_logp": gap(offline, "{}_logp"),
    }
    kept = {name: select_largest(values, count) for name, values in orders.items()}
    kept["none"] = np.ones(len(score), dtype=bool)
    return {
        "iteration": iteration,
        "r2_score": r_squared(reward, of_both(dataset, "score_{}")),
        "r2_length": r_squared(reward, of_both(offline, "{}_length")),
        "accuracy": float((orders["irm"] > 0).mean()),
        "kept": {
            name: {
                "score_gap": float(score[which].mean()),
                "length_gap": float(length[which].mean()),
                "longer": float((length[which] > 0).mean()),
                "jaccard_irm": jaccard(which, kept["irm"]),
            }
            for name, which in kept.items()
        },
    }
