"""What is measured of a run: its policies on held-out prompts, its choices on the true reward."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from benchmarks.claims import labelled
from benchmarks.claims.labelled import in_order, mean_words, true_rewards
from benchmarks.claims.tasks import FloatArray, Letters, task_of
from benchmarks.claims.world import World
from sera_plugin.algorithm.selection import select_largest
from sera_plugin.algorithm.summary import jaccard
from sera_plugin.tools.evaluation.winrate import win_rate
from sera_plugin.tools.report.figures import r_squared

#: Figures are kept with this many digits: more than any conclusion needs.
DIGITS = 5


def measure(directory: Path, place: Path, world: World, seed: int) -> dict[str, Any]:
    """All figures of one run.

    Args:
        directory: the run's `output_dir`.
        place: the world's.
        world, seed: what it was made from.

    Returns:
        `policies`, one per iteration (theta_1, ..., theta_T), and `iterations` (t = 1, ..., T);
        where pairs are held out, `base` too, see `labelled`.
    """
    places = sorted((directory / "sera").glob("iteration-*"))
    policies = [one / "policy" for one in places[1:]] + [directory]
    task = task_of(world.task)
    iterations = [iteration_figures(one, number, task) for number, one in enumerate(places, 1)]
    if world.test_pairs:
        figures = labelled.figures(directory, place, world, seed)
        judged = map(labelled.reward_figures, places)
        iterations = [one | other for one, other in zip(iterations, judged, strict=True)]
    else:
        held_out = HeldOut.read(place, world)
        figures = {"policies": [policy_figures(one, held_out, world, seed) for one in policies]}
    return rounded({**figures, "iterations": iterations})


def base_figures(place: Path, world: World) -> dict[str, Any]:
    """The base model's answers to the held-out prompts, and how two answers to one differ."""
    if world.test_pairs:
        return rounded(labelled.base_figures(place, world))
    held_out = HeldOut.read(place, world)
    figures = {
        "true_reward": float(held_out.rewards.mean()),
        "words": mean_words(held_out.answers),
    }
    if world.samples > 1:
        by_sample = held_out.rewards.reshape(-1, held_out.count)
        figures["spread"] = float(by_sample.std(axis=0, ddof=1).mean())
    return rounded(figures)


@dataclass(frozen=True)
class HeldOut:
    """What no policy was trained on.

    Attributes:
        prompts, answers: texts, the base model's answers; prompts repeat for every sample.
        rewards: (n,) their true rewards.
        logps: (n,) log pi_0 of the answers.
        count: how many different prompts there are.
    """

    prompts: Sequence[str]
    answers: Sequence[str]
    rewards: FloatArray
    logps: FloatArray
    count: int

    @classmethod
    def read(cls, place: Path, world: World) -> HeldOut:
        task = task_of(world.task)
        texts = json.loads((place / "held-out.json").read_text(encoding="utf-8"))
        prompts, answers = texts["prompts"], texts["answers"]
        logps = task.logps(*task.load(place / "base-model"), prompts, answers)
        rewards = true_rewards(task, prompts, answers)
        return cls(prompts, answers, rewards, logps, len(set(prompts)))


def policy_figures(policy: Path, held_out: HeldOut, world: World, seed: int) -> dict[str, Any]:
    """A policy's answers, and its implicit reward log pi / pi_0 on the base model's answers.

    Returns:
        `true_reward`, `win_rate` (against the base model's answer to the same prompt, by true
        reward, a tie is half) and `words` of its answers; of the implicit reward its R^2 with true
        reward (`r2_true`) and with words (`r2_words`), and `order`: of two answers of the base
        model to one prompt that differ in true reward, how often it prefers the better.
    """
    task = task_of(world.task)
    model, tokenizer = task.load(policy)
    prompts, theirs = held_out.prompts, held_out.rewards
    ours = task.answer(model, tokenizer, prompts, world, 100 * seed + 99)
    rewards = true_rewards(task, prompts, ours)
    implicit = task.logps(model, tokenizer, prompts, held_out.answers) - held_out.logps
    first, second = slice(0, held_out.count), slice(held_out.count, 2 * held_out.count)
    return {
        "true_reward": float(rewards.mean()),
        "win_rate": win_rate((np.sign(rewards - theirs) + 1) / 2).rate,
        "words": mean_words(ours),
        "r2_true": r_squared(implicit, theirs),
        "r2_words": r_squared(implicit, [len(text.split()) for text in held_out.answers]),
        "order": in_order(implicit[first] - implicit[second], theirs[first] - theirs[second]),
    }


def iteration_figures(place: Path, number: int, task: Letters) -> dict[str, Any]:
    """What an iteration kept, sampled and cost.

    Returns:
        From summary.json: `kept`, `sampled` (pairs), `recall` and `precision` of swapped labels
        among those dropped, `jaccard_previous`, `sequences` forwarded without gradients, `seconds`
        by phase. `r2_true`, `r2_words`: R^2 of the implicit reward (Eq. 7) of the offline answers.
        `wrong_kept`, `wrong_dropped`: how often a label is against the true reward.
        `jaccard_score`, `jaccard_reference`: of what is kept with what the score and the reference
        would keep. `order_found`, `order_kept`: how often sampled pairs that differ in true reward
        are in true order, of all that ranking found and of those trained on. `order_likelihood`,
        `order_since_initial`: the same for the best and worst of each prompt if they were ranked
        by log pi_{t-1} per token, or by log pi_{t-1} - log pi_0.
    """
    summary = json.loads((place / "summary.json").read_text(encoding="utf-8"))
    dataset = pq.read_table(place.parent / "dataset.parquet")
    offline = pq.read_table(place / "offline.parquet")
    pairs, noise = summary["pairs"], summary.get("label_noise", {})
    figures: dict[str, Any] = {
        "kept": pairs["kept"],
        "sampled": pairs["bootstrapped_kept"],
        "recall": noise.get("recall"),
        "precision": noise.get("precision"),
        "jaccard_previous": summary.get("jaccard_with_previous"),
        "sequences": {name: one["sequences"] for name, one in summary["forwarded"].items()},
        "seconds": summary["seconds"],
    }
    true = {side: numbers(dataset, f"true_{side}") for side in ("chosen", "rejected")}
    if "margin" in offline.column_names:
        reward = np.concatenate([numbers(offline, f"{side}_reward") for side in true])
        words = np.concatenate([numbers(offline, f"{side}_length") for side in true])
        figures["r2_true"] = r_squared(reward, np.concatenate(list(true.values())))
        figures["r2_words"] = r_squared(reward, words)
    if 0 < pairs["kept"] < pairs["offline"]:
        kept = offline["selected"].to_numpy(zero_copy_only=False)
        figures |= about_selection(kept, true["chosen"] - true["rejected"], dataset, offline)
    if pairs["bootstrapped_found"]:
        figures |= about_samples(place, dataset, number, task)
    return figures


def about_selection(
    kept: npt.NDArray[np.bool_], gap: FloatArray, dataset: Any, offline: Any
) -> dict[str, Any]:
    """What was kept against the true reward and against other ways to choose as many."""
    score = numbers(dataset, "score_chosen") - numbers(dataset, "score_rejected")
    reference = numbers(offline, "chosen_logp") - numbers(offline, "rejected_logp")
    count = int(kept.sum())
    return {
        "wrong_kept": in_order(gap[kept], -np.ones(count)),
        "wrong_dropped": in_order(gap[~kept], -np.ones(len(gap) - count)),
        "jaccard_score": jaccard(kept, select_largest(score, count)),
        "jaccard_reference": jaccard(kept, select_largest(reference, count)),
    }


def about_samples(place: Path, dataset: Any, number: int, task: Letters) -> dict[str, Any]:
    """Sampled pairs against the true reward of their answers."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(place.parents[1], local_files_only=True)
    candidates = pq.read_table(
        place / "candidates.parquet", columns=["row", "candidate", "token_ids", "logps"]
    )
    texts = tokenizer.batch_decode(candidates["token_ids"].to_pylist(), skip_special_tokens=True)
    prompts = tokenizer.batch_decode(dataset["prompt_ids"].to_pylist(), skip_special_tokens=True)
    prompts = [task.prompt_of(text) for text in prompts]
    prompt_of = dict(zip(dataset["row"].to_pylist(), prompts, strict=True))
    at = zip(candidates["row"].to_pylist(), candidates["candidate"].to_pylist(), strict=True)
    rewards = {
        (row, candidate): task.reward(prompt_of[row], text.strip())
        for (row, candidate), text in zip(at, texts, strict=True)
    }
    found = pq.read_table(place / "bootstrapped.parquet").to_pydict()
    gap = np.array(
        [
            rewards[row, chosen] - rewards[row, rejected]
            for row, chosen, rejected in zip(
                found["row"], found["chosen_candidate"], found["rejected_candidate"], strict=True
            )
        ]
    )
    selected = np.array(found["selected"], dtype=bool)
    figures = {
        "order_found": in_order(gap, np.ones(len(gap))),
        "order_kept": in_order(gap[selected], np.ones(int(selected.sum()))),
    }
    under = np.array(candidates["logps"].to_pylist())
    true = np.array(list(rewards.values()))
    prompts_sampled = len(np.unique(candidates["row"].to_numpy()))
    others = {"likelihood": under[:, 0] / [len(ids) for ids in candidates["token_ids"].to_pylist()]}
    if under.shape[1] == number:
        others["since_initial"] = under[:, 0] - under[:, -1]
    for name, reward in others.items():
        best_and_worst = extremes(
            reward.reshape(prompts_sampled, -1), true.reshape(prompts_sampled, -1)
        )
        figures[f"order_{name}"] = in_order(best_and_worst, np.ones(prompts_sampled))
    return figures


def extremes(reward: FloatArray, true: FloatArray) -> FloatArray:
    """(n,) true reward of the candidate ranked first less that of the last, from (n, R) each."""
    first, last = (pick(reward, axis=1)[:, None] for pick in (np.argmax, np.argmin))
    gaps = np.take_along_axis(true, first, 1) - np.take_along_axis(true, last, 1)
    return gaps[:, 0]


def numbers(table: Any, column: str) -> FloatArray:
    return table[column].to_numpy(zero_copy_only=False).astype(np.float64)


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return round(value, DIGITS) if isinstance(value, float) else value
