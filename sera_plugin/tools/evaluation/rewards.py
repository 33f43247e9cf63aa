"""How often implicit rewards rank pairs as they are labelled, as RewardBench asks.

A language model that was tuned with preferences is a reward model: the more likely training has
made an answer, the better it is (Rafailov et al. 2023; RewardBench, Lambert et al. 2024).
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from sera_plugin.algorithm.fit import Reward
from sera_plugin.algorithm.rewards import FloatArray, reward_weights
from sera_plugin.config.kinds import is_reference_free
from sera_plugin.config.quoting import quoted
from sera_plugin.data.text import encodable
from sera_plugin.rundir.journal import Journal, key_of
from sera_plugin.rundir.progress import progress
from sera_plugin.tools.evaluation.answers import drawn, rows_of, text_problem
from sera_plugin.tools.evaluation.models import Model, policy_of

#: Answers that are scored, and then kept, at a time.
_BLOCK = 256
#: RewardBench's categories, with the weight of each subset in its own: how many pairs it has, but
#: for `math-prm`, which counts as much as code (`rewardbench/constants.py`, version 0.1).
CATEGORIES: Mapping[str, Mapping[str, int]] = {
    "Chat": {
        "alpacaeval-easy": 100,
        "alpacaeval-length": 95,
        "alpacaeval-hard": 95,
        "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37,
        "llmbar-natural": 100,
        "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 250,
        "xstest-should-respond": 154,
        "donotanswer": 136,
    },
    "Reasoning": {
        "math-prm": 984,
        **{f"hep-{one}": 164 for one in ("cpp", "go", "java", "js", "python", "rust")},
    },
}

#: Scores (question, answer) pairs by index, in any order: nats and tokens, None where they do not
#: fit into the model's context.
Score = Callable[[Sequence[tuple[str, str]]], Iterable[tuple[int, tuple[float, int] | None]]]


@dataclass(frozen=True)
class Labelled:
    """A prompt with an answer that is better than the others, its subset ("" without one)."""

    prompt: str
    chosen: str
    rejected: tuple[str, ...]  # one; RewardBench 2 has three
    subset: str
    row: int


def read_pairs(path: Path, limit: int | None = None, seed: int = 0) -> list[Labelled]:
    """The pairs of a file of JSON lines, a JSON list or parquet, in its order.

    A row has `prompt`, `chosen`, `rejected` and perhaps `subset`, as RewardBench's; `chosen` may be
    a list of one text and `rejected` one of several, as RewardBench 2's. `limit` as in
    `read_prompts`. A ValueError names the file, the row and the field that cannot be used.
    """
    pairs = [_pair(f"{path}: row {row}", row, content) for row, content in enumerate(rows_of(path))]
    if not pairs:
        raise ValueError(f"{path} holds no pairs.")
    return drawn(pairs, limit, seed)


def _pair(where: str, row: int, content: Mapping[str, Any]) -> Labelled:
    for key in ("prompt", "chosen", "rejected"):
        if key not in content:
            raise ValueError(
                f"{where} has no {key}. A pair has prompt, chosen and rejected; this row has "
                f"{', '.join(map(quoted, content)) or 'no fields'}."
            )
    problem = text_problem(content["prompt"])
    if problem:
        raise ValueError(f"{where}: prompt is {problem}")
    found: dict[str, tuple[str, ...]] = {}
    for key in ("chosen", "rejected"):
        value = content[key]
        texts = value if isinstance(value, list) else [value]
        for text in texts:
            if not isinstance(text, str) or not encodable(text):
                raise ValueError(f"{where}: {key} is {quoted(text)}, not text")
        if not texts or (key == "chosen" and len(texts) > 1):
            wanted = "one answer" if key == "chosen" else "at least one"
            raise ValueError(
                f"{where}: {key} is a list of {len(texts)} answers, not {wanted}. Rows with "
                "several good answers (RewardBench 2's Ties) are scored otherwise: remove them."
            )
        found[key] = tuple(texts)
    subset = content.get("subset")
    name = "" if subset is None else str(subset)
    return Labelled(content["prompt"], found["chosen"][0], found["rejected"], name, row)


@dataclass(frozen=True)
class Ranking:
    """A reward, the models that it weighs, newest first, and how a reader calls it."""

    name: str
    models: tuple[Model, ...]
    reward: Reward
    per_token: bool

    @property
    def weights(self) -> dict[str, float]:
        """What it weighs, by name."""
        found = dict(zip((one.name for one in self.models), self.reward.weights, strict=True))
        return found | ({"length": self.reward.length} if self.reward.length else {})


def find_rewards(models: Sequence[Model]) -> tuple[list[Ranking], list[str]]:
    """The rewards of all models but the first, which is their reference, and what was left out.

    Of every model log pi - log pi_ref, as of any DPO model (for a run whose loss has no reference
    log pi, and per token where its loss is). Of a policy of a run also the reward that the next
    iteration has ranked by, or the last one: Eq. 7's and, where there is one, the fitted.
    """
    for model in models:
        if model.answers is not None:
            raise ValueError(
                f"--rewards: {model.source} has answers, and no weights to rank pairs by."
            )
    found: dict[Any, Ranking] = {}
    notes: list[str] = []
    for model in models[1:]:
        description = (model.policy[0].description() or {}) if model.policy else {}
        free = is_reference_free(str(description.get("loss")))
        per_token = bool(description.get("per_token"))
        both = (model,) if free else (model, models[0])
        own = [
            Ranking(f"{model.name}: implicit", both, Reward((1.0, -1.0)[: len(both)]), per_token)
        ]
        if model.policy is not None and model.policy[1]:
            try:
                own += _of_run(model, description, free, per_token)
            except ValueError as error:
                notes.append(f"{model.name}: only its implicit reward, because {error}")
        for one in own:
            weighs = tuple(each.identity for each in one.models)
            found.setdefault((weighs, one.reward, one.per_token), one)
    return list(found.values()), notes


def _of_run(
    model: Model, description: Mapping[str, Any], free: bool, per_token: bool
) -> list[Ranking]:
    """What an iteration of the run has ranked by: the one after the policy, or the last one."""
    assert model.policy is not None
    store, number = model.policy
    iterations = [t for t in range(number + 1, 1, -1) if store.summary(t).get("reward")]
    if not iterations:
        return []
    t = iterations[0]
    recorded = store.summary(t)["reward"]
    gamma = (description["config"].get("sera") or {}).get("gamma") or 0.0
    paper = reward_weights(t, gamma, free)
    spec = str(store.root.parent)
    weighed = tuple(policy_of(store, spec, t - 1 - back) for back in range(len(paper)))
    run = model.name.partition("@")[0]
    equation = f"{run}: Eq. {17 if free else 7} in iteration {t}"
    found = [Ranking(equation, weighed, Reward(paper), per_token)]
    if recorded.get("errors"):
        by_name = {re.sub(r"^theta_", "", name): one for name, one in recorded["weights"].items()}
        weights = tuple(by_name[str(t - 1 - back)] for back in range(len(paper)))
        reward = Reward(weights, by_name["length"])
        found.append(Ranking(f"{run}: fitted in iteration {t}", weighed, reward, per_token))
    return found


def scored(
    model: Model,
    pairs: Sequence[Labelled],
    prompt_format: str | None,
    journal: Journal,
    engine: Callable[[], Score],
) -> tuple[FloatArray, FloatArray]:
    """log pi(y|x) in nats and |y| in tokens of all answers, chosen first, pair after pair.

    Both are (answers,), nan where the model's context has no room. What is in the journal is not
    scored again, and `engine`, which loads the model, is called only if something is missing.
    """
    asked = [(pair.prompt, answer) for pair in pairs for answer in (pair.chosen, *pair.rejected)]
    keys = [key_of(model.identity, prompt_format, *one) for one in asked]

    def missing(block: range) -> list[int]:
        return [index for index in block if journal.get(keys[index], tokens=int) is None]

    # Whole blocks, so that batches, and with them the last digits, are the same when it goes on.
    blocks = [range(at, min(at + _BLOCK, len(asked))) for at in range(0, len(asked), _BLOCK)]
    left = [block for block in blocks if missing(block)]
    if left:
        score = engine()
        with progress(f"scores of {model.name}", sum(map(len, left)), "answer") as advance:
            for block in left:
                wanted = set(missing(block))
                for place, found in score([asked[index] for index in block]):
                    logp, tokens = found or (None, 0)
                    if block[place] in wanted:
                        journal.add(keys[block[place]], {"logp": logp, "tokens": tokens})
                    advance(1)
    records = [journal.get(key, tokens=int) or {} for key in keys]
    logps = np.array([one["logp"] for one in records], dtype=np.float64)
    return logps, np.array([one["tokens"] or math.nan for one in records], dtype=np.float64)


def outcomes(
    ranking: Ranking,
    pairs: Sequence[Labelled],
    scores: Mapping[str, tuple[FloatArray, FloatArray]],
) -> FloatArray:
    """(n,) 1 where the chosen answer has the largest reward, 1/2 where another has the same.

    Otherwise 0; nan where an answer is not scored. `scores` are by the identity of a model.
    """
    each = [scores[model.identity] for model in ranking.models]
    rewards = ranking.reward([logps for logps, _ in each], each[0][1], ranking.per_token)
    begins = np.cumsum([0, *(1 + len(pair.rejected) for pair in pairs)])
    found = np.empty(len(pairs))
    for row, (begin, end) in enumerate(pairwise(begins)):
        margin = rewards[begin] - rewards[begin + 1 : end].max()
        found[row] = math.nan if math.isnan(margin) else (1 + np.sign(margin)) / 2
    return found
