"""Answers of one model to all prompts: sampled once, kept, and taken from there ever after."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sera_plugin.config.quoting import quoted
from sera_plugin.rundir.journal import Journal, key_of
from sera_plugin.rundir.progress import progress
from sera_plugin.tools.evaluation.models import Model
from sera_plugin.tools.evaluation.prompts import Prompt, joined, read_rows

#: What a user said and a model answered, in turn; the user's last words are unanswered.
Conversation = tuple[str, ...]
#: Why a turn ended: "stop", "length", "no room" (the prompt fills the model's context), "given".
NO_ROOM = "no room"


@dataclass(frozen=True)
class Decoding:
    """How every model answers; temperature 0 takes the likeliest token each time."""

    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int
    #: A text with `{prompt}`, in place of the model's chat template.
    prompt_format: str | None = None


@dataclass(frozen=True)
class Turn:
    """An answer in one turn, without special tokens; `tokens` counts the end token too."""

    text: str
    tokens: int
    finish_reason: str


@dataclass(frozen=True)
class Answer:
    """A model's answer to a prompt, in all of its turns."""

    turns: tuple[Turn, ...]

    @property
    def text(self) -> str:
        """All turns in one text, for a judge and for export."""
        return joined([turn.text for turn in self.turns])

    @property
    def chars(self) -> int:
        """Characters of all turns."""
        return sum(len(turn.text) for turn in self.turns)

    @property
    def unfinished(self) -> bool:
        """Whether a turn was cut at the longest length."""
        return any(turn.finish_reason == "length" for turn in self.turns)


#: Samples answers: (conversations, those that are done, seed) -> (index, answer) in any order.
Sample = Callable[[Sequence[Conversation], Collection[int], int], Iterator[tuple[int, Turn]]]


def sampled(
    model: Model,
    prompts: Sequence[Prompt],
    decoding: Decoding,
    journal: Journal,
    engine: Callable[[], Sample],
) -> list[Answer | None]:
    """The model's answers, in the order of the prompts; None where its context has no room.

    What is in the journal is not sampled again, and `engine`, which loads the model, is called only
    if an answer is missing. When it raises, what was sampled is kept.
    """
    turns: list[list[Turn]] = [[] for _ in prompts]
    sample: Sample | None = None
    for number in range(max(len(prompt.turns) for prompt in prompts)):
        rows = [
            row
            for row, prompt in enumerate(prompts)
            if len(prompt.turns) > number and not _is_full(turns[row])
        ]
        conversations = [_conversation(prompts[row], turns[row]) for row in rows]
        # A prompt that occurs again is answered again.
        seen: Counter[Conversation] = Counter()
        keys = []
        for one in conversations:
            keys.append(key_of(model.identity, asdict(decoding), one, seen[one]))
            seen[one] += 1
        done = [index for index, key in enumerate(keys) if key in journal]
        if len(done) < len(keys):
            sample = sample or engine()
            what = f"answers of {model.name}" + (f", turn {number + 1}" if number else "")
            with progress(what, len(keys) - len(done), "answer") as advance:
                # Each turn has seeds of its own.
                seed = decoding.seed + 1_000_003 * number
                for index, turn in sample(conversations, done, seed):
                    journal.add(keys[index], {**asdict(turn), "row": prompts[rows[index]].row})
                    advance(1)
        for row, key in zip(rows, keys, strict=True):
            found = journal.get(key) or {}
            turns[row].append(Turn(found["text"], found["tokens"], found["finish_reason"]))
    return [None if _is_full(each) else Answer(tuple(each)) for each in turns]


def _is_full(turns: Sequence[Turn]) -> bool:
    return any(turn.finish_reason == NO_ROOM for turn in turns)


def _conversation(prompt: Prompt, answered: Sequence[Turn]) -> Conversation:
    said: list[str] = []
    for question, answer in zip(prompt.turns, answered, strict=False):
        said += [question, answer.text]
    return (*said, prompt.turns[len(answered)])


def given(path: Path, prompts: Sequence[Prompt]) -> list[Answer | None]:
    """Answers from a file in AlpacaEval's format, in the order of the prompts; None without one.

    A row belongs to the prompt whose text its `instruction` is.

    Raises:
        ValueError: naming the row and the field that is wrong, or if no row belongs to a prompt.
    """
    outputs: dict[str, list[str]] = {}
    for row, content in enumerate(read_rows(path)):
        for field in ("instruction", "output"):
            if not isinstance(content.get(field), str):
                raise ValueError(
                    f"{path}: row {row}: {field} is {quoted(content.get(field))}, not text. A file "
                    "of answers has `instruction` and `output` in each row."
                )
        outputs.setdefault(content["instruction"].strip(), []).append(content["output"].strip())
    found: list[Answer | None] = []
    for prompt in prompts:
        texts = outputs.get(prompt.question.strip(), [])
        # As many rows as prompts of the same text: each has its own.
        text = texts.pop(0) if len(texts) > 1 else texts[0] if texts else None
        found.append(None if text is None else Answer((Turn(text, 0, "given"),)))
    if not any(found):
        raise ValueError(f"{path}: no row answers any of these prompts. Is it of another set?")
    return found
