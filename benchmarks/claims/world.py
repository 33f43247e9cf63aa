"""The worlds that claims are tested in: a task, with judged pairs and held-out answers.

All their parameters are here. Those of `WORLD` were fixed by `criteria`, which looks at the base
model and at plain DPO alone, before any other system was run. Others of its kind vary one axis of
it and were added after its first results were seen.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.claims.tasks import task_of
from sera_plugin.rundir.journal import key_of
from sera_plugin.tools.demo.world import Labelling

#: Most answers to a labelled prompt.
ANSWERS = 4
#: Columns of the pairs, for `sera.score_columns`; the first two are what selection by score reads.
SIDES = ("chosen", "rejected")
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
        temperature, top_p: of the samples that policies pair. See the task for those of answers.
        new_tokens: most tokens of an answer, its end included.
        task: what is asked, see `tasks`.
        test_pairs: labelled pairs that are held out, the last ones.
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
    top_p: float = 1.0
    task: str = "letters"
    test_pairs: int = 0

    @property
    def record(self) -> dict[str, Any]:
        """What it is; without fields of later worlds, so that earlier ones keep their key."""
        later = {"top_p", "task", "test_pairs"}
        fields = asdict(self)
        return {k: v for k, v in fields.items() if k not in later or v != getattr(World, k)}

    @property
    def key(self) -> str:
        """What records of this world are found by."""
        return key_of(self.record)[:8]


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
#: The worlds that systems are compared in. Labels are swapped here, in the pairs to train on and in
#: those held out alike.
_LETTERS = replace(WORLD, labelling=replace(LABELLING, noise=0.2), test_pairs=100)
#: A real model; fixed by `criteria` too.
_LANGUAGE = World(
    task="language",
    pairs=700,
    test_pairs=200,
    held_out=300,
    samples=1,
    base_steps=0,
    labelling=Labelling(temperature=0.1, length_bonus=0.1, noise=0.2),
    learning_rate=1e-4,
    batch=16,
    beta=0.1,
    temperature=1.0,
    new_tokens=32,
)
#: By name, with the learning rates that systems are compared at.
COMPARED: Mapping[str, tuple[World, Sequence[float]]] = {
    "letters": (_LETTERS, (1e-5, 3e-5, 1e-4)),
    "fillers": (replace(_LETTERS, task="fillers"), (3e-5, 1e-4)),
    "language": (_LANGUAGE, (3e-5, 1e-4, 3e-4)),
}
#: For trying the harness out: nothing can be learnt from its figures.
SMOKE = World(pairs=48, held_out=24, base_steps=30)
#: The same, of a world that systems are compared in.
SMALL: Mapping[str, Any] = {"pairs": 48, "held_out": 24, "test_pairs": 8, "base_steps": 30}


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


def judged(true: float, text: str, labelling: Labelling, random: Random) -> Answer:
    """An answer with the score of a judge who errs and likes length.

    The score is true reward / temperature + length bonus x words + a standard Gumbel draw. The
    difference of two Gumbel draws is logistic: that the higher score wins is Bradley-Terry exactly
    (McFadden 1974). So labels come from scores, as in datasets that a model has scored.
    """
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


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def swap(rows: Sequence[dict[str, Any]], share: float, random: Random) -> list[dict[str, Any]]:
    """The rows, in exactly that share of them chosen and rejected the other way round."""
    swapped = set(random.sample(range(len(rows)), round(share * len(rows))))
    turned = {"chosen": "rejected", "rejected": "chosen"}

    def other(column: str) -> str:
        *before, side = column.split("_")
        return "_".join((*before, turned.get(side, side)))

    return [
        {column: row[other(column)] for column in row} if number in swapped else row
        for number, row in enumerate(rows)
    ]


def make_world(directory: Path, world: World, seed: int, model_directory: Path | None) -> None:
    """Make the base model; sample and judge its answers; answer the held-out prompts.

    Args:
        directory: gets `base-model/`, `pairs.jsonl`, `curriculum.jsonl` (where the task has answers
            for it), `test.jsonl` (where pairs are held out) and `held-out.json`, all at once at
            the end: a whole world, or none.
        world: the parameters.
        seed: of everything. Another seed is another model, other prompts, answers and labels.
        model_directory: of a model that is not made here.
    """
    task = task_of(world.task)
    partial = directory.with_name(f".{directory.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    task.make_base(partial / "base-model", world, seed, model_directory)
    model, tokenizer = task.load(partial / "base-model")

    def answers_to(prompts: Sequence[str], number: int) -> list[str]:
        return task.answer(model, tokenizer, prompts, world, 100 * seed + number)

    random = Random(f"pairs {seed}")
    asked = task.prompts(random, world.pairs)
    texts = zip(*(answers_to(asked, number) for number in range(task.answers)), strict=True)
    pairs, curriculum = [], []
    for prompt, given in zip(asked, texts, strict=True):
        # One that does not end by itself cannot be shown, and makes no pair.
        shown = [text if task.is_whole(tokenizer, text, world) else "" for text in given]
        answers = [judged(task.reward(prompt, t), t, world.labelling, random) for t in shown]
        pairs.append(pair(prompt, *task.compared(answers)))
        best, *others = sorted(answers, key=lambda one: -one.score)
        curriculum += [pair(prompt, best, other) for other in others]
    found = [row for row in pairs if row]
    split = len(found) - world.test_pairs
    if split < 1:
        raise ValueError(
            f"test_pairs: {world.test_pairs} are to be held out of {len(found)} pairs, which "
            f"leaves none to train on; `pairs` ({world.pairs}) has to be larger"
        )
    files = {
        "pairs": found[:split],
        "test": found[split:],
        "curriculum": [row for row in curriculum if row] if task.answers > 2 else [],
    }
    for name, rows in files.items():
        rows = swap(rows, world.labelling.noise, random)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        if lines:
            (partial / f"{name}.jsonl").write_text(lines, encoding="utf-8")

    random = Random(f"held out {seed}")
    prompts = task.prompts(random, world.held_out, taken=set(asked)) * world.samples
    held_out = {"prompts": prompts, "answers": answers_to(prompts, ANSWERS)}
    (partial / "held-out.json").write_text(json.dumps(held_out), encoding="utf-8")
    partial.rename(directory)
