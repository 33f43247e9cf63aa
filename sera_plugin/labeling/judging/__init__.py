"""Judges: who says which of two answers is better, or how good one is.

- `api`       judges behind an OpenAI-compatible endpoint
- `reward_model`   a sequence-classification model on this machine
- `function`   a Python function, which `worker` calls in a process of its own

What a judge is asked is our wording; the formats of verdicts are published ones: `[[A]]`, `[[B]]`,
`[[C]]` and `Rating: [[7]]` of MT-Bench (Zheng et al. 2023), `Score: 4` of the additive prompt of
self-rewarding language models (Yuan et al. 2024).

Nothing here but `reward_model` knows torch, and nothing the host.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sera_plugin.algorithm.method import Room, no_room
from sera_plugin.config.block import JudgeConfig, read_judge
from sera_plugin.config.labelers import FunctionConfig
from sera_plugin.config.quoting import quoted
from sera_plugin.rundir.journal import Journal

#: The places of each kind of template.
PLACES = {
    "pairwise": ("question", "answer_a", "answer_b"),
    "single": ("question", "answer"),
    "additive": ("question", "answer"),
}
#: What a reply to each kind holds: a verdict and the values that it may have.
_VERDICTS = {
    "pairwise": (re.compile(r"\[\[\s*([ABC])\s*\]\]"), 0, 1),
    "single": (re.compile(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]"), 1, 10),
    "additive": (re.compile(r"score\W{0,8}(\d+(?:\.\d+)?)", re.IGNORECASE), 0, 5),
}
_OUTCOMES = {"A": 1.0, "B": 0.0, "C": 0.5}
#: A reasoning model's thoughts; what it says of verdicts in there is none.
_THOUGHTS = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL)


class JudgeFailed(RuntimeError):
    """Judging stopped; the message says why and what to do. What was judged is kept."""


@dataclass(frozen=True)
class Answered:
    """A question with one answer to it."""

    question: str
    answer: str
    about: str = ""  # what the dataset says of its row beside the texts, as JSON; for a function
    row: str = field(default="", compare=False)  # what to name it by


@dataclass(frozen=True)
class Comparison:
    """A question with two answers to it."""

    question: str
    first: str
    second: str


@dataclass(frozen=True)
class Verdict:
    """What a judge thinks of the first answer against the second.

    `orders` has for each order in which the two were shown (the first answer first, then second):
    1 the first answer is better, 0.5 a tie, 0 the second is better, None no verdict. A judge that
    scores answers one by one has one entry.
    """

    orders: tuple[float | None, ...]

    @property
    def outcome(self) -> float | None:
        """The mean over the orders; None where one is missing, because half would be biased."""
        seen = [one for one in self.orders if one is not None]
        return sum(seen) / len(seen) if len(seen) == len(self.orders) else None

    @property
    def consistent(self) -> bool | None:
        """Whether the verdict is the same in both orders; None where that is unknown."""
        if len(self.orders) < 2 or self.outcome is None:
            return None
        return len(set(self.orders)) == 1


@dataclass
class Replies:
    """Replies of a judge that is paid by the token."""

    count: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass
class Usage:
    """What judging took."""

    asked: Replies = field(default_factory=Replies)  # replies that were asked for
    cached: Replies = field(default_factory=Replies)  # replies that were there from before
    retries: int = 0  # requests that were made again after an error
    malformed: int = 0  # replies without a verdict that can be read; the judge was asked again
    unparsed: int = 0  # verdicts that were given up, so are missing, after several such replies
    refused: int = 0  # verdicts that are missing because the endpoint refused the request
    failed: int = 0  # calls of a function that gave no number


class Judge:
    """Compares answers.

    `name` is for people, `description` what determines its verdicts, without secrets.
    """

    def __init__(self, name: str, description: dict[str, Any]) -> None:
        self.name, self.description = name, description
        self.usage = Usage()

    def compare(self, comparisons: Sequence[Comparison]) -> Iterator[tuple[int, Verdict]]:
        """Yield (index, verdict) of every comparison as they are done, in any order.

        JudgeFailed if it cannot go on.
        """
        raise NotImplementedError


class ScoringJudge(Judge):
    """A judge that gives each answer a number in place of comparing two; see `by_scores`."""

    #: Whether it reads `Answered.about`.
    reads_rows = False

    def score(self, answers: Sequence[Answered]) -> Iterator[tuple[int, float | None]]:
        """Yield (index, score) of every answer, None without one; otherwise like `compare`."""
        raise NotImplementedError

    def score_all(self, answers: Sequence[Answered]) -> Iterator[tuple[int, float | None]]:
        """See `score`. An answer that occurs several times is scored once."""
        places: dict[Answered, list[int]] = {}
        for index, one in enumerate(answers):
            places.setdefault(one, []).append(index)
        of_each = list(places.values())
        for index, score in self.score(list(places)):
            for place in of_each[index]:
                yield place, score


def by_scores(first: float | None, second: float | None) -> Verdict:
    """The verdict that two scores come to."""
    if first is None or second is None:
        return Verdict((None,))
    return Verdict((0.5 * (1 + (first > second) - (first < second)),))


def make_judge(
    spec: str | JudgeConfig | FunctionConfig,
    journal: Journal,
    room: Room = no_room,
    columns: Sequence[str] | None = None,
) -> Judge:
    """The judge that is configured or named, which keeps what it says in the journal.

    A name is a YAML file with an API judge, a directory with a reward model, or a function as
    `module:function` or `file.py:function`. `room` is for a reward model, `columns` are those that
    a function may take, None for there are none.

    ValueError if it is none of these or cannot be used; JudgeFailed without an API judge's key.
    """
    from sera_plugin.labeling.judging.api import PairwiseJudge, RatingJudge

    if isinstance(spec, str) and spec.endswith((".yaml", ".yml")):
        spec = read_judge(Path(spec))
    if isinstance(spec, JudgeConfig):
        return (RatingJudge if spec.mode == "single" else PairwiseJudge)(spec, journal)
    if isinstance(spec, str) and ":" in spec and not Path(spec).is_dir():
        spec = FunctionConfig.parse({"call": spec}, "judge: ")
    if isinstance(spec, FunctionConfig):
        from sera_plugin.labeling.judging.function import FunctionJudge

        return FunctionJudge(spec, journal, columns)
    if Path(spec).is_dir():
        from sera_plugin.labeling.judging.reward_model import RewardModelJudge

        return RewardModelJudge(Path(spec), journal, room)
    raise ValueError(
        f"judge: {quoted(spec)} is neither a YAML file, a directory nor a function. Give "
        "judge.yaml (an API judge), the directory of a reward model, or "
        "module:function or file.py:function."
    )


def fill(template: str, values: Mapping[str, str]) -> str:
    """A template with texts in its places. Braces inside these stay as they are."""
    return re.sub(r"\{(" + "|".join(values) + r")\}", lambda match: values[match[1]], template)


def read_template(kind: str, path: Path | None = None) -> str:
    """A judge's prompt of a kind in `PLACES`, the user's or the shipped one; other braces are text.

    ValueError, naming file and place, if it is not text or lacks a place.
    """
    path = path or Path(__file__).parent / "templates" / f"{kind}.txt"
    try:
        text = path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"template: {path} is not UTF-8 text ({error.reason})") from None
    places = [f"{{{place}}}" for place in PLACES[kind]]
    missing = [place for place in places if place not in text]
    if missing:
        raise ValueError(
            f"template: {path} has no {', '.join(missing)}. A {kind} template holds "
            f"{', '.join(places)} where these texts go."
        )
    return text


def parse(kind: str, reply: str) -> float | None:
    """The verdict of a reply to that kind of template, None without one.

    `pairwise`: 1 where A is better, 0 where B is, 0.5 a tie; `single`: 1 to 10; `additive`: 0 to 5.
    The last verdict counts: a judge may quote others on its way.
    """
    pattern, low, high = _VERDICTS[kind]
    found = pattern.findall(_THOUGHTS.sub("", reply))
    if not found:
        return None
    value = _OUTCOMES[found[-1]] if kind == "pairwise" else float(found[-1])
    return value if low <= value <= high else None
