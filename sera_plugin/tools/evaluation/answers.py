"""Answers of one model to all prompts: sampled once, kept, and taken from there ever after."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from sera_plugin.config.quoting import quoted
from sera_plugin.rundir.journal import Journal, key_of
from sera_plugin.rundir.progress import progress
from sera_plugin.tools.evaluation.models import Model
from sera_plugin.tools.evaluation.prompts import Prompt, joined, read_rows

#: What a user said and a model answered, in turn; the user's last words are unanswered.
Conversation = tuple[str, ...]
#: Why an answer ended: "stop", "length", "no room" (the prompt fills the model's context), "given".
NO_ROOM = "no room"


@dataclass(frozen=True)
class Decoding:
    """How answers are sampled, the same for every model.

    Attributes:
        temperature: 0 takes the likeliest token each time.
        top_p: nucleus sampling.
        max_new_tokens: longest answer of a turn.
        seed: the same seed, prompts and model give the same answers.
        prompt_format: a text with `{prompt}` in place of the model's chat template, or None.
    """

    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int
    prompt_format: str | None = None


@dataclass(frozen=True)
class Turn:
    """An answer in one turn of a conversation.

    Attributes:
        text: the answer, without special tokens and the white space around it.
        tokens: how many tokens were sampled, the end token included.
        finish_reason: why it ended.
    """

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
    def tokens(self) -> int:
        """Tokens of all turns."""
        return sum(turn.tokens for turn in self.turns)

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

    Args:
        model: whose answers.
        prompts: what is asked.
        decoding: how it answers.
        journal: where answers are kept; what is in there is not sampled again.
        engine: loads the model; called only if an answer is missing.

    Raises:
        ValueError, RuntimeError: as the engine does. What was sampled is kept.
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
        keys = _keys(model, decoding, conversations)
        done = [index for index, key in enumerate(keys) if key in journal]
        if len(done) < len(keys):
            # Each turn has seeds of its own.
            seed = decoding.seed + 1_000_003 * number
            sample = sample or engine()
            what = f"answers of {model.name}" + (f", turn {number + 1}" if number else "")
            with progress(what, len(keys) - len(done), "answer") as advance:
                for index, turn in sample(conversations, done, seed):
                    journal.add(keys[index], {**asdict(turn), "row": prompts[rows[index]].row})
                    advance(1)
        for row, key in zip(rows, keys, strict=True):
            found = journal.get(key)
            assert found is not None
            turns[row].append(Turn(**{one.name: found[one.name] for one in fields(Turn)}))
    return [None if _is_full(each) else Answer(tuple(each)) for each in turns]


def _is_full(turns: Sequence[Turn]) -> bool:
    """Whether the model's context had no room for a turn."""
    return any(turn.finish_reason == NO_ROOM for turn in turns)


def _conversation(prompt: Prompt, answered: Sequence[Turn]) -> Conversation:
    said: list[str] = []
    for question, answer in zip(prompt.turns, answered, strict=False):
        said += [question, answer.text]
    return (*said, prompt.turns[len(answered)])


def _keys(model: Model, decoding: Decoding, conversations: Sequence[Conversation]) -> list[str]:
    """A prompt that occurs again is answered again."""
    seen: Counter[Conversation] = Counter()
    keys = []
    for conversation in conversations:
        keys.append(key_of(model.identity, asdict(decoding), conversation, seen[conversation]))
        seen[conversation] += 1
    return keys


def given(path: Path, prompts: Sequence[Prompt]) -> list[Answer | None]:
    """Answers from a file in AlpacaEval's format, in the order of the prompts; None without one.

    Args:
        path: rows with `instruction` and `output`.
        prompts: what was asked; a row belongs to the prompt whose text its instruction is.

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
