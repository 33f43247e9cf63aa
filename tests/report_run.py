"""Run directories for the report's tests: the real phases, with a scorer and a sampler made up."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from sera_plugin.algorithm.alarms import judge, records
from sera_plugin.algorithm.algorithm import prepare
from sera_plugin.algorithm.method import (
    Candidate,
    Iteration,
    Labeler,
    Method,
    Phases,
    SamplingSettings,
    Schedule,
)
from sera_plugin.algorithm.pairs import Pairs
from sera_plugin.algorithm.selection import Annotations
from sera_plugin.algorithm.summary import summarize
from sera_plugin.algorithm.trust import score_held_out
from sera_plugin.config.kinds import LABELERS
from sera_plugin.config.sera import AS_PUBLISHED, SeraConfig
from sera_plugin.host.run import describe_run
from sera_plugin.rundir.checksums import seal
from sera_plugin.rundir.store import RunStore, make_table
from sera_plugin.rundir.tokens import TokenColumn

END = 0
#: What token ids 0, 1, 2, ... read as unless a test says otherwise.
WORDS = ["</s>", *(f"w{number}" for number in range(1, 40))]
Logps = Mapping[int, Sequence[Sequence[float]]]


def make_scorer(logps: Logps) -> Any:
    """Log-probabilities of offline pairs as the test has them, of all else by chance."""

    def score(policy: int, prompts: Sequence[Any], completions: Sequence[Any], phase: str) -> Any:
        if phase == "score_offline" and policy in logps:
            return np.concatenate([np.asarray(one, float) for one in logps[policy]])
        noise = np.random.default_rng([policy, len(prompts)]).normal(size=len(prompts))
        return -2.0 * np.fromiter(map(len, completions), float) + (1 + policy) * noise

    return score


def sample(prompts: Sequence[Any], settings: SamplingSettings, skip: Any = ()) -> Any:
    """Distinct answers of 2 and more tokens; every seventh prompt's are cut off."""
    answers = [[1 + one] * (1 + one) + [END] for one in range(settings.candidates)]
    ends = ["stop" if row % 7 else "length" for row in range(len(prompts))]
    yield [(row, [Candidate(one, end) for one in answers]) for row, end in enumerate(ends)]


def make_run(
    output_dir: Path,
    *,
    pairs: int = 12,
    iterations: int = 3,
    sera: Mapping[str, Any] | None = None,
    words: Sequence[str] | None = tuple(WORDS),
    scores: Mapping[str, Sequence[Any]] | None = None,
    held_out: int = 4,
    logps: Logps | None = None,
    config: Mapping[str, Any] | None = None,
    annotations: Annotations | None = None,
    labeler: type[Labeler] | None = None,
    prompts: int = 0,
) -> RunStore:
    """A finished run: pair `row` is made of token 1 + row % 30, chosen answers are longer.

    `prompts` are those without answers, and go on as those of pairs would.
    """
    block = SeraConfig(
        **{"selection_ratio": 0.5, "bootstrap_ratio": 0.5, **AS_PUBLISHED, **(sera or {})}
    )
    notes = annotations or Annotations()
    method = Method(
        block, block.loss == "simpo", block.per_token, pairs, iterations, 7, notes, prompts
    )
    resolved = {"base_model": "org/none-such", "num_epochs": iterations}
    resolved |= {"output_dir": str(output_dir), "sera": block.model_dump(mode="json")}
    store, data = RunStore(output_dir), _pairs(pairs)
    more = _pairs(pairs + prompts).select(["row", "prompt_ids"])[pairs:] if prompts else None
    loaded = Pairs.from_table(data)
    other = Pairs.from_table(_pairs(held_out)) if held_out else None
    schedule = Schedule(method.sizes, 4, 1)
    resolved |= config or {}
    run = describe_run(resolved, block.loss, 0.1, method, schedule, loaded, other, (END,), more)
    for name, values in (scores or {}).items():
        data = data.append_column(name, [list(values)])
    store.begin(run, data, more)
    asked = TokenColumn(more["prompt_ids"]) if more else None
    settings = SamplingSettings(block.candidates, 0.7, 0.95, 8, None, (END,), seed=0)
    kind = labeler or LABELERS[block.labeler].load()
    sampler = SimpleNamespace(report={"name": "transformers"}, seconds={}, sample=sample)
    tools = (make_scorer(logps or {}), sampler, settings, kind(method))
    summaries: list[dict[str, Any]] = []
    for iteration in range(1, iterations + 1):
        phases = Phases()
        it = Iteration(
            iteration, method, loaded, store, *tools, phases, held_out=other, more_prompts=asked
        )
        prepare(it)
        if other is not None:
            score_held_out(it)
        summaries.append(summarize(it))
        phases.spend("train", 10.0)
        done = {"seconds": dict(phases.seconds), "alarms": records(judge(summaries))}
        store.write_summary(iteration, summaries[-1] | done)
    if words is not None:
        write_tokenizer(output_dir, words)
    write_history(output_dir, iterations)
    return store


def _pairs(count: int) -> Any:
    tokens = [1 + row % 30 for row in range(count)]
    return make_table(
        {
            "row": range(count),
            "prompt_ids": [[token, token] for token in tokens],
            "chosen_ids": [[token] * 3 + [END] for token in tokens],
            "rejected_ids": [[token, END] for token in tokens],
        }
    )


def write_tokenizer(directory: Path, words: Sequence[str]) -> None:
    vocabulary = {word: number for number, word in enumerate(words)}
    Tokenizer(WordLevel(vocabulary, unk_token=words[1])).save(str(directory / "tokenizer.json"))


def write_history(output_dir: Path, iterations: int) -> None:
    checkpoint, history = output_dir / f"checkpoint-{3 * iterations}", []
    for begun in range(0, 3 * iterations, 3):
        history += [
            {"step": begun, "sera/iteration": 1 + begun / 3},
            {"step": begun + 1, "loss": 0.693, "rewards/margins": 0.0},
            {"step": begun + 3, "loss": 0.6, "rewards/margins": 0.1, "rewards/accuracies": 0.8},
            {"step": begun + 3, "eval_loss": 0.65},
        ]
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    seal(checkpoint)
