"""What an engine answers, checked before anything of it is stored.

Whether a reply is of a shape that can be used, whether the candidates are what was asked for, and
whether the policy that answers is the one that is trained.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from sera_plugin.algorithm.method import Candidate, SamplingSettings, TokenIds
from sera_plugin.algorithm.pairs import Pairs
from sera_plugin.config.quoting import quoted

Shape = TypeVar("Shape")
#: Of a list of a million wrong things the first is enough: each would take a kilobyte.
_List = Annotated[list[Shape], Field(fail_fast=True)]


class ServedModel(BaseModel, strict=True):
    """A model that a server lists."""

    id: str
    root: str | None = None
    max_model_len: int | None = Field(None, ge=1, lt=2**31)


class _Choice(BaseModel, strict=True):
    index: int
    token_ids: _List[int]
    finish_reason: Literal["stop", "length"]
    prompt_token_ids: _List[int] | None = None


class _Logprob(BaseModel, strict=True):
    logprob: float = Field(ge=-1e6, le=0.001)


class _Scored(BaseModel, strict=True):
    prompt_logprobs: _List[dict[str, Any] | None]


MODELS = TypeAdapter(_List[ServedModel])
_CHOICES = TypeAdapter(_List[_Choice])
_SCORED = TypeAdapter(_List[_Scored])
_LOGPROB = TypeAdapter(_Logprob)


def shaped(adapter: TypeAdapter[Shape], value: object, key: str) -> Shape:
    """What a reply has under a key; ValueError naming the part that is not as it must be."""
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        wrong = error.errors()[0]
        place = ".".join(map(str, (key, *wrong["loc"])))
        given = quoted(wrong["input"], 100)
        raise ValueError(f"{place} is {given}: {wrong['msg'].lower()}") from None


def read_candidates(
    choices: object,
    settings: SamplingSettings,
    limit: int,
    vocabulary: int,
    prompt: Sequence[int] | None = None,
) -> list[Candidate]:
    """The R candidates of one prompt, in the order of their index, from an engine's answer.

    `limit` is the most tokens of a candidate of this prompt, `vocabulary` the number of token ids
    that the model knows. Where the engine repeats the prompt, it has to be the one that was sent.

    Raises:
        ValueError: saying what is wrong, where they are not R different choices within the
            vocabulary and the limit, each with an end token if and only if it stopped.
    """
    found = shaped(_CHOICES, choices, "choices")
    found.sort(key=lambda choice: choice.index)
    indices = [choice.index for choice in found]
    if indices != list(range(settings.candidates)):
        raise ValueError(
            f"{settings.candidates} choices were asked for, and those with index "
            f"{quoted(indices, 100)} came back"
        )
    for choice in found:
        ids, reason = choice.token_ids, choice.finish_reason
        if None not in (prompt, choice.prompt_token_ids) and choice.prompt_token_ids != prompt:
            raise ValueError(
                f"it belongs to another prompt, {quoted(choice.prompt_token_ids, 100)}"
            )
        if not 1 <= len(ids) <= limit:
            raise ValueError(f"1 to {limit} tokens were asked for, and {len(ids)} came back")
        if not 0 <= min(ids) <= max(ids) < vocabulary:
            raise ValueError(
                f"token ids go from {quoted(min(ids))} to {quoted(max(ids))}, but the model's "
                f"vocabulary has {vocabulary} tokens"
            )
        ends = [place for place, token in enumerate(ids) if token in settings.end_ids]
        if ends != ([len(ids) - 1] if reason == "stop" else []):
            raise ValueError(
                f"a candidate of {len(ids)} tokens with the finish reason {reason!r} has end "
                f"tokens at {quoted(ends, 100)}"
            )
    return [Candidate(choice.token_ids, choice.finish_reason) for choice in found]


@dataclass(frozen=True)
class Known:
    """A pair whose answer has been scored under the policy that an engine is to serve."""

    prompt: TokenIds
    answer: TokenIds
    logp: float  # log pi(answer | prompt) in nats

    @property
    def tokens(self) -> list[int]:
        return [*self.prompt.tolist(), *self.answer.tolist()]


def known_pairs(pairs: Pairs, scores: pa.Table | None, longest: int, most: int = 8) -> list[Known]:
    """Some offline pairs of middling length with what `scores` (offline.parquet) has for them.

    Prompt and chosen answer have less than `longest` tokens; fewer pairs, or none, may.
    """
    if scores is None:
        return []
    lengths = pairs.prompt_ids.lengths + pairs.chosen_ids.lengths
    rows = np.argsort(lengths, kind="stable")
    rows = rows[lengths[rows] < longest]
    rows = rows[max(0, (len(rows) - most) // 2) :][:most]
    logps = scores["chosen_logp"].to_numpy()
    return [Known(pairs.prompt_ids[row], pairs.chosen_ids[row], logps[row]) for row in rows]


def answer_logp(choices: object, known: Known) -> float:
    """log pi(answer | prompt) in nats, from an engine's answer to `known` as a prompt.

    ValueError says what is wrong with that answer.
    """
    tokens, scored = known.tokens, shaped(_SCORED, choices, "choices")
    given = scored[0].prompt_logprobs if scored else []
    if len(given) != len(tokens):
        raise ValueError(f"{len(given)} prompt_logprobs came back for {len(tokens)} tokens")
    total = 0.0
    for place in range(len(known.prompt), len(tokens)):
        found = (given[place] or {}).get(str(tokens[place]))
        if found is None:
            raise ValueError(
                f"prompt_logprobs.{place} has no token {tokens[place]}, which was sent"
            )
        total += shaped(_LOGPROB, found, f"prompt_logprobs.{place}.{tokens[place]}").logprob
    return total


def policy_difference(ask: Callable[[Known], float], known: Sequence[Known]) -> float:
    """How far an engine's log-probabilities are from ours, in nats per square root of a token.

    The root mean square over the answers; each is a sum of as many roundings as it has tokens
    (`model.losses`). `ask` gives what the engine finds.
    """
    found = [(ask(one) - one.logp) / math.sqrt(len(one.answer)) for one in known]
    return float(np.sqrt(np.mean(np.square(found))))
