"""What is measured where labelled pairs are held out: what policies answer and make of the pairs.

The run itself has scored these pairs under every policy but the last.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.claims.tasks import FloatArray, Letters, task_of
from benchmarks.claims.world import SIDES, World, read_rows
from sera_plugin.algorithm.best import best_policy, held_out_losses

Rows = Sequence[Mapping[str, Any]]

#: In an iteration's directory, of the policy it starts from; in `output_dir`, of the last one.
EVALUATION = "evaluation.parquet"


def figures(directory: Path, place: Path, world: World, seed: int) -> dict[str, Any]:
    """What theta_0 makes of the pairs (`base`); that and answers of theta_1, ... (`policies`).

    Which of them is `kept`, too. Leaves the last policy's log-probabilities in the run's
    `directory`. See `measure.measure`.
    """
    task = task_of(world.task)
    iterations = sorted((directory / "sera").glob("iteration-*"))
    policies = [one / "policy" for one in iterations[1:]] + [directory]
    pairs = as_shuffled(read_rows(place / "test.jsonl"), seed)
    tables = [pq.read_table(one / EVALUATION) for one in iterations]
    tables.append(score(task, directory, pairs, tables[0]))
    pq.write_table(tables[-1], directory / EVALUATION)
    base, *made_of_pairs = (pair_figures(one, tables[0], pairs, world.beta) for one in tables)
    return {
        "base": base,
        "kept": kept(tables, world.beta),
        "policies": [
            answer_figures(task, *answers_of(policy, place, world, seed)) | figures
            for policy, figures in zip(policies, made_of_pairs, strict=True)
        ],
    }


def kept(tables: Sequence[pa.Table], beta: float) -> int:
    """The policy that `sera.keep: best` leaves, from the tables of theta_0, ..., theta_T."""
    initial, *policies = (table.to_pydict() for table in tables)
    return best_policy(
        {number: held_out_losses(initial, one, beta) for number, one in enumerate(policies, 1)}
    )


def base_figures(place: Path, world: World) -> dict[str, Any]:
    """The base model's answers to the held-out prompts, and how the two answers of a pair differ.

    Returns:
        Those of `answer_figures`, the number of `pairs` to train on, and `spread`: the standard
        deviation of the true rewards of two answers to one prompt.
    """
    held_out = json.loads((place / "held-out.json").read_text(encoding="utf-8"))
    pairs = read_rows(place / "pairs.jsonl")
    gaps = [abs(row["true_chosen"] - row["true_rejected"]) for row in pairs]
    return {
        **answer_figures(task_of(world.task), held_out["prompts"], held_out["answers"]),
        "pairs": len(pairs),
        "spread": float(np.mean(gaps)) / 2**0.5,  # of two values it is their distance / sqrt 2
    }


def as_shuffled(rows: Rows, seed: int) -> Rows:
    """The rows in the order that the host gives those of one file."""
    return [rows[place] for place in np.random.default_rng(seed).permutation(len(rows))]


def score(task: Letters, policy: Path, pairs: Rows, other: pa.Table) -> pa.Table:
    """The pairs' log pi, with the columns of `other`, which has them under another policy.

    Raises:
        ValueError: if `other` is not of these pairs in this order.
    """
    model, tokenizer = task.load(policy)
    table = other
    for side in SIDES:
        texts = [row[side] for row in pairs]
        lengths = other[f"{side}_length"].to_numpy()
        if not np.array_equal(task.tokens(tokenizer, texts), lengths):
            raise ValueError(f"the run's held-out pairs have {side} answers of other lengths")
        logps = task.logps(model, tokenizer, [row["prompt"] for row in pairs], texts)
        column = f"{side}_logp"
        table = table.set_column(table.column_names.index(column), column, pa.array(logps))
    return table


def pair_figures(table: pa.Table, base: pa.Table, pairs: Rows, beta: float) -> dict[str, Any]:
    """What a policy makes of the m pairs, from its log-probabilities and those of theta_0.

    Returns:
        `chosen_logp`, `rejected_logp` (means, nats); `drift` (log pi - log pi_0 of chosen answers,
        nats per token); `accuracy` and `loss` (DPO's) of log pi - log pi_0 against the labels;
        `likelihood_accuracy` of log pi per token; `order`: how often log pi - log pi_0 is in true
        order.
    """
    logps, before, tokens = (
        np.array([one[f"{side}_{what}"].to_numpy() for side in SIDES])
        for one, what in ((table, "logp"), (base, "logp"), (table, "length"))
    )
    gained, each = logps - before, logps / tokens
    margin, labels = gained[0] - gained[1], np.ones(len(pairs))
    true = np.array([row["true_chosen"] - row["true_rejected"] for row in pairs])
    return {
        "chosen_logp": float(logps[0].mean()),
        "rejected_logp": float(logps[1].mean()),
        "drift": float((gained[0] / tokens[0]).mean()),
        "accuracy": in_order(margin, labels),
        "loss": float(np.logaddexp(0.0, -beta * margin).mean()),
        "likelihood_accuracy": in_order(each[0] - each[1], labels),
        "order": in_order(margin, true),
    }


def answers_of(
    policy: Path, place: Path, world: World, seed: int
) -> tuple[Sequence[str], Sequence[str]]:
    """The world's held-out prompts and a policy's answers.

    They are kept beside the world by what the weights are: every system has the same theta_1.
    """
    prompts = json.loads((place / "held-out.json").read_text(encoding="utf-8"))["prompts"]
    kept = place / "answers" / f"{hash_of(policy)}.json"
    if not kept.exists():
        task = task_of(world.task)
        texts = task.answer(*task.load(policy), prompts, world, 100 * seed + 99)
        kept.parent.mkdir(exist_ok=True)
        partial = kept.with_suffix(f".{policy.stat().st_ino}")
        partial.write_text(json.dumps(texts), encoding="utf-8")
        partial.rename(kept)
    return prompts, json.loads(kept.read_text(encoding="utf-8"))


def hash_of(policy: Path) -> str:
    """Of the weights in a directory, an adapter's or a whole model's."""
    digest = hashlib.sha256()
    for path in sorted(policy.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def answer_figures(task: Letters, prompts: Sequence[str], texts: Sequence[str]) -> dict[str, float]:
    """Means over answers: `true_reward`, its parts by name, and `words`."""
    parts = [task.parts(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    return {
        "true_reward": float(true_rewards(task, prompts, texts).mean()),
        **{name: float(np.mean([one[name] for one in parts])) for name in parts[0]},
        "words": mean_words(texts),
    }


def reward_figures(place: Path) -> dict[str, Any]:
    """What an iteration's summary has of its reward, all of it absent where there is none.

    Returns:
        `reward` (weights and errors by name, `accuracy`, `paper_accuracy`, `by_chance`,
        `followed`), `outranking` (nats per token) and `held_out_accuracy`.
    """
    summary = json.loads((place / "summary.json").read_text(encoding="utf-8"))
    found = {name: summary[name] for name in ("reward", "outranking") if name in summary}
    if "evaluation" in summary:
        found["held_out_accuracy"] = summary["evaluation"]["accuracy"]
    return found


def true_rewards(task: Letters, prompts: Sequence[str], texts: Sequence[str]) -> FloatArray:
    return np.array([task.reward(p, text) for p, text in zip(prompts, texts, strict=True)])


def mean_words(texts: Sequence[str]) -> float:
    return float(np.mean([len(text.split()) for text in texts]))


def in_order(gap: FloatArray, true_gap: FloatArray) -> float | None:
    """How often two gaps have the same sign, where neither is 0; None where one always is."""
    differ = (gap != 0) & (true_gap != 0)
    return float((gap[differ] * true_gap[differ] > 0).mean()) if differ.any() else None
