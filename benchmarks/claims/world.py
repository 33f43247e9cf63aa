"""The world that claims are tested in: the demo's, with scores and held-out answers.

All its parameters are here. Those of `WORLD` were fixed by `criteria`, which looks at the base
model and at plain DPO alone, before any other system was run. The others vary one axis of it and
were added after its first results were seen.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from sera_plugin.rundir.journal import key_of
from sera_plugin.tools.demo.world import Labelling, make_prompt, true_reward

#: Two to compare, and two more for the pairs of a curriculum.
ANSWERS = 4
#: Columns of the pairs, for `sera.score_columns`; the first two are what selection by score reads.
COLUMNS = ("score_chosen", "score_rejected", "true_chosen", "true_rejected")
#: Labels are swapped by the plugin (`label_noise`), not here.
LABELLING = Labelling(temperature=0.15, length_bonus=0.2, noise=0.0)


@dataclass(frozen=True)
class World:
    """What a seed makes a world from.

    Attributes:
        pairs: prompts with a labelled pair; a few give none, where both answers are equal.
        held_out: prompts that policies are measured on.
        samples: answers to each of these.
        base_steps: of the base model's training.
        labelling: of answers: temperature and length bonus.
        learning_rate, batch, beta: of every system whose own lines say nothing else.
        temperature: of the samples that policies pair (top_p 1). Policies are measured at 1.0.
        new_tokens: most tokens of an answer, its end included.
    """

    pairs: int = 1_000
    held_out: int = 500
    samples: int = 2
    base_steps: int = 500
    labelling: Labelling = LABELLING
    learning_rate: float = 1e-4
    batch: int = 32
    beta: float = 0.2
    temperature: float = 1.0
    new_tokens: int = 16

    @property
    def key(self) -> str:
        """What records of this world are found by."""
        return key_of(asdict(self))[:8]


WORLD = World()
#: By the name that `--world` takes.
WORLDS: Mapping[str, World] = {
    "fixed": WORLD,
    "smaller-steps": replace(WORLD, learning_rate=1e-5),
    "small-steps": replace(WORLD, learning_rate=3e-5),
    "large-steps": replace(WORLD, learning_rate=3e-4),
    "more-pairs": replace(WORLD, learning_rate=3e-5, pairs=3_000),
    "less-length": replace(
        WORLD, learning_rate=3e-5, pairs=3_000, labelling=replace(LABELLING, length_bonus=0.1)
    ),
}
#: For trying the harness out: nothing can be learnt from its figures.
SMOKE = World(pairs=48, held_out=24, base_steps=30)


@dataclass(frozen=True)
class Answer:
    """An answer to a prompt.

    Attributes:
        text: words separated by spaces.
        true: its true reward.
        score: what a judge says of it, in log-odds. See `judged`.
    """

    text: str
    true: float
    score: float


def judged(prompt: str, text: str, labelling: Labelling, random: Random) -> Answer:
    """An answer with the score of a judge who errs and likes length.

    The score is true reward / temperature + length bonus x words + a standard Gumbel draw. The
    difference of two Gumbel draws is logistic: that the higher score wins is Bradley-Terry exactly
    (McFadden 1974). So labels come from scores, as in datasets that a model has scored.
    """
    true = true_reward(prompt, text)
    gumbel = -math.log(-math.log(max(random.random(), 1e-12)))
    words = len(text.split())
    return Answer(
        text, true, true / labelling.temperature + labelling.length_bonus * words + gumbel
    )


def pair(prompt: str, one: Answer, other: Answer) -> dict[str, Any] | None:
    """A row of the dataset, None of equal or empty answers."""
    if one.text == other.text or not one.text or not other.text:
        return None
    chosen, rejected = (one, other) if one.score > other.score else (other, one)
    return {
        "prompt": prompt,
        "chosen": chosen.text,
        "rejected": rejected.text,
        "score_chosen": chosen.score,
        "score_rejected": rejected.score,
        "true_chosen": chosen.true,
        "true_rejected": rejected.true,
    }


def make_world(directory: Path, world: World, seed: int) -> None:
    """Train the base model; sample and judge its answers; answer the held-out prompts.

    Args:
        directory: gets `base-model/`, `pairs.jsonl`, `curriculum.jsonl` and `held-out.json`, all at
            once at the end: a whole world, or none.
        world: the parameters.
        seed: of everything. Another seed is another model, other prompts, answers and labels.
    """
    from sera_plugin.tools.demo.base_model import load_model, train_base_model

    partial = directory.with_name(f".{directory.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    train_base_model(partial / "base-model", steps=world.base_steps, seed=seed)
    model, tokenizer = load_model(partial / "base-model")

    def answers_to(prompts: Sequence[str], number: int) -> list[str]:
        return answer(model, tokenizer, prompts, world, 100 * seed + number)

    random = Random(f"pairs {seed}")
    prompts = [make_prompt(random) for _ in range(world.pairs)]
    texts = zip(*(answers_to(prompts, number) for number in range(ANSWERS)), strict=True)
    pairs, curriculum = [], []
    for prompt, given in zip(prompts, texts, strict=True):
        answers = [judged(prompt, text, world.labelling, random) for text in given]
        pairs.append(pair(prompt, answers[0], answers[1]))
        best, *others = sorted(answers, key=lambda one: -one.score)
        curriculum += [pair(prompt, best, other) for other in others]
    for name, rows in (("pairs", pairs), ("curriculum", curriculum)):
        lines = "".join(json.dumps(row) + "\n" for row in rows if row)
        (partial / f"{name}.jsonl").write_text(lines, encoding="utf-8")

    random = Random(f"held out {seed}")
    prompts = [make_prompt(random) for _ in range(world.held_out)] * world.samples
    held_out = {"prompts": prompts, "answers": answers_to(prompts, ANSWERS)}
    (partial / "held-out.json").write_text(json.dumps(held_out), encoding="utf-8")
    partial.rename(directory)


def answer(
    model: Any, tokenizer: Any, prompts: Sequence[str], world: World, seed: int
) -> list[str]:
    """One answer to each prompt at temperature 1, all in one batch."""
    from sera_plugin.tools.demo.base_model import respond

    return respond(
        model,
        tokenizer,
        prompts,
        max_new_tokens=world.new_tokens,
        batch_size=len(prompts),
        seed=seed,
    )
