"""What models are asked, and what they answer: sampled once, kept, and taken from there after."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sera_plugin.config.quoting import quoted
from sera_plugin.data.files import json_rows
from sera_plugin.data.text import encodable, visible
from sera_plugin.rundir.journal import Journal, key_of
from sera_plugin.rundir.progress import progress
from sera_plugin.tools.evaluation.models import Model

T = TypeVar("T")
#: Where a row's prompt is, the first of these that it has, and where its category is if it has no
#: `category`.
FIELDS = {
    "turns": None,  # MT-Bench, Vicuna (llm_judge): texts; Arena-Hard v0.1: texts as `content`
    "instruction": "dataset",  # AlpacaEval
    "Instruction": "Skill",  # Evol-Instruct (WizardLM's test set)
    "prompt": None,  # Arena-Hard v2.0, IFEval, UltraFeedback's test sets
    "text": None,  # Vicuna (the older table)
}
#: What a user said and a model answered, in turn; the user's last words are unanswered.
Conversation = tuple[str, ...]
#: Why a turn ended: "stop", "length", "no room" (the prompt fills the model's context), "given".
NO_ROOM = "no room"


def _joined(turns: Sequence[str]) -> str:
    """The texts of several turns in one, numbered; one turn is its own text."""
    if len(turns) == 1:
        return turns[0]
    return "\n\n".join(f"[Turn {number}]\n{text}" for number, text in enumerate(turns, start=1))


@dataclass(frozen=True)
class Prompt:
    """What a model is asked in each turn, its category ("" without one), its row from 0.

    `question` is all turns in one text, for a judge and for export; `content` is the whole row, for
    checks and for the benchmark's own judge.
    """

    turns: tuple[str, ...]
    category: str
    row: int
    content: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def question(self) -> str:
        return _joined(self.turns)


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
    """A model's answer to a prompt, in all of its turns: as one text, characters, whether cut."""

    turns: tuple[Turn, ...]

    @property
    def text(self) -> str:
        return _joined([turn.text for turn in self.turns])

    @property
    def chars(self) -> int:
        return sum(len(turn.text) for turn in self.turns)

    @property
    def unfinished(self) -> bool:
        return any(turn.finish_reason == "length" for turn in self.turns)


#: Samples answers: (conversations, those that are done, seed) -> (index, answer) in any order.
Sample = Callable[[Sequence[Conversation], Collection[int], int], Iterator[tuple[int, Turn]]]


def read_prompts(path: Path, limit: int | None = None, seed: int = 0) -> list[Prompt]:
    """The prompts of a file of JSON lines, a JSON list or parquet, in its order.

    `limit` of them are drawn with the seed; a larger limit has those of a smaller one. A ValueError
    names the file, the row and the field that cannot be used.
    """
    prompts = [_prompt(path, row, content) for row, content in enumerate(rows_of(path))]
    if not prompts:
        raise ValueError(f"{path} holds no prompts.")
    return drawn(prompts, limit, seed)


def drawn(rows: Sequence[T], limit: int | None, seed: int) -> list[T]:
    """At most `limit` rows in their order; a larger limit has those of a smaller one."""
    chosen = np.random.default_rng(seed).permutation(len(rows))[:limit]
    return [rows[row] for row in sorted(chosen.tolist())]


def rows_of(path: Path) -> Iterator[Mapping[str, Any]]:
    """The rows of JSON lines, a JSON list or parquet; ValueError names what is none."""
    try:
        if path.suffix == ".parquet":
            yield from pq.read_table(path).to_pylist()
            return
        for where, row in json_rows(path):
            if not isinstance(row, dict):
                raise ValueError(f"{where} is {quoted(row)}, not an object with fields")
            yield row
    except pa.ArrowException as error:
        raise ValueError(f"{path} is not a parquet file: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _prompt(path: Path, row: int, content: Mapping[str, Any]) -> Prompt:
    key = next((name for name in FIELDS if name in content), None)
    if key is None:
        raise ValueError(
            f"{path}: row {row} has no prompt. A prompt is in {', '.join(FIELDS)}; this row has "
            f"{', '.join(map(quoted, content)) or 'no fields'}."
        )
    value = content[key]
    turns = value if key == "turns" else [value]
    problem = f"{quoted(value)}, not a list of texts"
    if isinstance(turns, list) and turns:
        turns = [one.get("content", one) if isinstance(one, dict) else one for one in turns]
        problem = next(filter(None, map(text_problem, turns)), "")
    if problem:
        raise ValueError(f"{path}: row {row}: {key} is {problem}")
    category = content.get("category", content.get(FIELDS[key] or ""))
    return Prompt(tuple(turns), "" if category is None else str(category), row, content)


def text_problem(turn: Any) -> str:
    """What is wrong with a text of a row, for a sentence; "" if nothing is."""
    if not isinstance(turn, str):
        return f"{quoted(turn)}, not text"
    if not visible(turn):
        return "empty. Remove the row or mend it."
    return "" if encodable(turn) else "not valid Unicode: half of a surrogate pair"


def given(path: Path, prompts: Sequence[Prompt]) -> list[Answer | None]:
    """Answers from a file, in the order of the prompts; None without one.

    A row of AlpacaEval's belongs to the prompt whose text its `instruction` is, one of
    `model_answer/NAME.jsonl` (Arena-Hard, MT-Bench) to the row with its `uid` or `question_id`. A
    ValueError names the row and the field that is wrong, or says that no row belongs to a prompt.
    """
    outputs: dict[tuple[str, Any], list[Answer]] = {}
    for row, content in enumerate(rows_of(path)):
        key, name, texts = _given(content)
        for field_name, value in ((key, name), *(("output", text) for text in texts)):
            if not isinstance(value, str):
                raise ValueError(
                    f"{path}: row {row}: {field_name} is {quoted(value)}, not text. A file of "
                    "answers has `instruction` and `output` in each row, or is one that the judges "
                    "of Arena-Hard or MT-Bench read."
                )
        answer = Answer(tuple(Turn(text.strip(), 0, "given") for text in texts))
        outputs.setdefault((key, name.strip()), []).append(answer)
    found: list[Answer | None] = []
    for prompt in prompts:
        names = [("instruction", prompt.question.strip())]
        names += [(key, str(prompt.content[key])) for key in _IDS if key in prompt.content]
        answers = next((outputs[one] for one in names if one in outputs), [])
        # As many rows as prompts of the same text: each has its own.
        found.append(answers.pop(0) if len(answers) > 1 else answers[0] if answers else None)
    if not any(found):
        raise ValueError(f"{path}: no row answers any of these prompts. Is it of another set?")
    return found


#: What rows of Arena-Hard (since version 2.0 of its code; before) and MT-Bench are named by.
_IDS = ("uid", "question_id")


def _given(row: Mapping[str, Any]) -> tuple[str, Any, list[Any]]:
    """What a row of answers names its prompt by, that name, and the answer's turns, None for what
    is not as it should be (see `benchmark_answers`)."""
    key = next((key for key in _IDS if key in row and "instruction" not in row), "instruction")
    if key == "instruction":
        return key, row.get(key), [row.get("output")]
    try:
        if key == "uid":
            return key, str(row[key]), [row["messages"][-1]["content"]["answer"]]
        turns = [
            one["content"] if isinstance(one, dict) else one for one in row["choices"][0]["turns"]
        ]
        return key, str(row[key]), turns
    except (KeyError, IndexError, TypeError):
        return key, str(row[key]), [None]


def benchmark_answers(
    name: str, prompts: Sequence[Prompt], answers: Sequence[Answer | None]
) -> Iterator[dict[str, Any]]:
    """Lines of `model_answer/NAME.jsonl`, for prompts whose rows are of a benchmark that has one.

    Rows with `uid` are Arena-Hard's since version 2.0 of its code (its `gen_judgment.py`); those
    with `question_id` and `turns` its older ones, where a turn is a block with `content`, or
    MT-Bench's (FastChat's `llm_judge`), where a turn is a text.
    """
    for prompt, answer in zip(prompts, answers, strict=True):
        row = prompt.content
        if answer is None:
            continue
        if "uid" in row and len(prompt.turns) == 1:
            said = {"role": "assistant", "content": {"answer": answer.text}}
            asked = {"role": "user", "content": prompt.question}
            yield {"uid": row["uid"], "model": name, "messages": [asked, said]}
        elif "question_id" in row and isinstance(row.get("turns"), list):
            of_blocks = isinstance(row["turns"][0], dict)
            texts = [turn.text for turn in answer.turns]
            turns = [{"content": text} for text in texts] if of_blocks else texts
            choices = [{"index": 0, "turns": turns}]
            yield {"question_id": row["question_id"], "model_id": name, "choices": choices}


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
    answers = {row: Answer(()) for row in range(len(prompts))}
    sample: Sample | None = None
    for number in range(max(len(prompt.turns) for prompt in prompts)):
        rows = [row for row in answers if len(prompts[row].turns) > number]
        conversations = [_conversation(prompts[row], answers[row].turns) for row in rows]
        # A prompt that occurs again is answered again.
        seen: Counter[Conversation] = Counter()
        keys = []
        for one in conversations:
            keys.append(key_of(model.identity, asdict(decoding), one, seen[one]))
            seen[one] += 1
        done = [index for index, key in enumerate(keys) if journal.get(key, **_TURN) is not None]
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
            found = journal.get(key, **_TURN) or {}
            turn = Turn(found["text"], found["tokens"], found["finish_reason"])
            if turn.finish_reason == NO_ROOM:
                del answers[row]
            else:
                answers[row] = Answer((*answers[row].turns, turn))
    return [answers.get(row) for row in range(len(prompts))]


#: What a record of an answer has.
_TURN = {"text": str, "tokens": int, "finish_reason": str}


def _conversation(prompt: Prompt, answered: Sequence[Turn]) -> Conversation:
    asked = zip(prompt.turns, answered, strict=False)
    said = [text for question, answer in asked for text in (question, answer.text)]
    return (*said, prompt.turns[len(answered)])
