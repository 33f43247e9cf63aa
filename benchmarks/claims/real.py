"""The questions of Fig. 1, 2 and 6 and of Table 6 to a dataset with scores and a model of yours.

There is no true reward here: how an answer was scored stands in for it. Every way to select is
compared on the same margins, score gaps and log-probabilities, which one run has; the policies are
compared by what their implicit reward follows on answers that no run has trained on.
"""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import yaml

from benchmarks.claims.labelled import in_order
from benchmarks.claims.measure import numbers, rounded
from benchmarks.claims.runs import HOST
from benchmarks.claims.systems import System
from benchmarks.claims.tasks import FloatArray
from sera_plugin.algorithm.selection import select_largest
from sera_plugin.algorithm.summary import jaccard
from sera_plugin.config.sera import AS_PUBLISHED
from sera_plugin.rundir.journal import key_of
from sera_plugin.rundir.tokens import IntArray
from sera_plugin.tools.report.figures import r_squared

SYSTEMS = (
    System("iterative DPO", {"selection": "all", "bootstrap_ratio": 0}),
    System("selection by irm", {"bootstrap_ratio": 0}),
    System("selection by score", {"selection": "score", "bootstrap_ratio": 0}),
    System("selection by reference", {"selection": "reference_logp", "bootstrap_ratio": 0}),
)
#: The policy as a judge in words, which takes long: an iteration is enough to see whether it can.
#: Its questions, a template with an answer inside, are longer than what it trains on.
SELF_JUDGING = System(
    "self-judging",
    {"labeler": "self_judge", "max_new_tokens": 64},
    {"num_epochs": 2, "sequence_len": 1024},
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
        judged: pairs of the self-judging run.
    """

    pairs: int = 128
    tokens: int = 160
    learning_rate: float = 3e-5
    batch: int = 16
    beta: float = 0.2
    iterations: int = 3
    judged: int = 16


def key(
    system: System, settings: Settings, seed: int, data: str, model: str, held_out: str | None
) -> str:
    parts = (asdict(system), asdict(settings), seed, data, model, held_out)
    return key_of("real", *parts)[:16]


def read_pairs(path: Path) -> list[dict[str, Any]]:
    """JSONL, gzipped or not, with prompt, chosen, rejected, score_chosen, score_rejected.

    Raises:
        ValueError: naming the first line that lacks one of them.
    """
    return _read(path, ("prompt", "chosen", "rejected", *COLUMNS))


def read_responses(path: Path) -> list[dict[str, Any]]:
    """JSONL, gzipped or not, with prompt and responses: objects with text and score.

    Raises:
        ValueError: naming the first line that lacks one of them.
    """
    rows = _read(path, ("prompt", "responses"))
    for number, row in enumerate(rows, start=1):
        for one in row["responses"]:
            if not isinstance(one, dict) or one.get("text") is None or one.get("score") is None:
                raise ValueError(
                    f"{path}, line {number} has a response without text or score. Every response "
                    "is an object with both."
                )
    return rows


def _read(path: Path, wanted: Sequence[str]) -> list[dict[str, Any]]:
    opened = gzip.open if path.suffix == ".gz" else open
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
    system: System,
    settings: Settings,
    seed: int,
    data: Path,
    model: Path,
    held_out: Path | None,
    scratch: Path,
) -> dict[str, Any]:
    """Train on the dataset and measure; the record that is kept."""
    from axolotl.cli.train import do_cli
    from transformers import AutoTokenizer

    if system == SELF_JUDGING:
        settings = replace(settings, pairs=settings.judged)

    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
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
    record = {
        "real": system.name,
        "seed": seed,
        "data": data.name,
        "model": model.name,
        "settings": asdict(settings),
        "pairs": len(rows),
        "seconds": round(time.perf_counter() - start, 2),
    }
    if system == SELF_JUDGING:
        return record | {"self_judging": self_judging_figures(output / "sera")}
    numbers = range(2, settings.iterations + 1)
    record["iterations"] = rounded([iteration_figures(output / "sera", t) for t in numbers])
    if held_out is not None:
        found = [one / "policy" for one in sorted((output / "sera").glob("iteration-*"))[1:]]
        responses = Responses.read(held_out, tokenizer, template, settings)
        record["held_out"] = rounded(responses.figures(model, [*found, output]))
    return record


def self_judging_figures(root: Path) -> dict[str, Any]:
    """How many replies the policy gave as a judge, how many had no score, and pairs that came."""
    summary = json.loads((root / "iteration-02" / "summary.json").read_text(encoding="utf-8"))
    return {
        "replies": summary["labeler"]["replies"],
        "unparsed": summary["labeler"]["unparsed"],
        "found": summary["pairs"]["bootstrapped_found"],
    }


@dataclass(frozen=True)
class Responses:
    """Scored answers to prompts that no run trains on, several to a prompt.

    Attributes:
        prompts, answers: (n,) token ids each; an answer ends with its end token.
        scores: (n,) how they were scored.
        rows: (n,) which prompt each is of.
        pad: a token id.
    """

    prompts: Sequence[IntArray]
    answers: Sequence[IntArray]
    scores: FloatArray
    rows: npt.NDArray[np.int64]
    pad: int

    @classmethod
    def read(cls, path: Path, tokenizer: Any, template: str, settings: Settings) -> Responses:
        """Those that are short enough, of a file for `read_responses`."""
        prompts, answers, scores, rows = [], [], [], []
        for number, row in enumerate(read_responses(path)):
            prompt = tokenizer(template.format(prompt=row["prompt"]))["input_ids"]
            for one in row["responses"]:
                ids = tokenizer(one["text"], add_special_tokens=False)["input_ids"]
                if len(prompt) + len(ids) < settings.tokens:
                    prompts.append(np.array(prompt, dtype=np.int32))
                    answers.append(np.array([*ids, tokenizer.eos_token_id], dtype=np.int32))
                    scores.append(float(one["score"]))
                    rows.append(number)
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        return cls(prompts, answers, np.array(scores), np.array(rows), pad)

    def figures(self, base: Path, policies: Sequence[Path]) -> dict[str, Any]:
        """What the implicit reward log pi_t - log pi_0 follows.

        Returns:
            `prompts`, `answers`: how many. `score_r2_length`: R^2 of the scores themselves with
            length. `policies`: for each `r2_score`, `r2_length`, and `order`: of two answers to a
            prompt that differ in score, how often the reward prefers the higher.
        """
        before = self.logps(base)
        lengths = np.array([len(one) for one in self.answers], dtype=np.float64)
        first, second = np.triu_indices(len(self.rows), 1)
        same = self.rows[first] == self.rows[second]
        first, second = first[same], second[same]
        found = []
        for policy in policies:
            reward = self.logps(policy) - before
            found.append(
                {
                    "r2_score": r_squared(reward, self.scores),
                    "r2_length": r_squared(reward, lengths),
                    "order": in_order(
                        reward[first] - reward[second], self.scores[first] - self.scores[second]
                    ),
                }
            )
        return {
            "prompts": len(set(self.rows.tolist())),
            "answers": len(self.answers),
            "score_r2_length": r_squared(self.scores, lengths),
            "policies": found,
        }

    def logps(self, directory: Path) -> FloatArray:
        """(n,) log pi of each answer in nats."""
        import torch
        from transformers import AutoModelForCausalLM

        from sera_plugin.model.budget import scoring_budget
        from sera_plugin.model.scoring import score_sequences

        model = AutoModelForCausalLM.from_pretrained(
            directory, local_files_only=True, dtype=torch.float32
        )
        longest = max(map(len, self.prompts)) + max(map(len, self.answers))
        budget = scoring_budget(model, model.device, longest)
        return score_sequences(model, self.prompts, self.answers, pad_id=self.pad, budget=budget)


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
        **HOST,
        "sera": {
            **AS_PUBLISHED,
            "score_columns": list(COLUMNS),
            "sampler": "transformers",
            "keep_policies": True,
            **system.sera,
        },
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
        "output_dir": str(output),
        "sequence_len": settings.tokens + 8,
        "num_epochs": settings.iterations,
        "micro_batch_size": settings.batch,
        "learning_rate": settings.learning_rate,
        "seed": seed,
        **system.beside,
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
