"""Judges behind an OpenAI-compatible endpoint: two answers at a time, or one.

Every reply goes into a journal under a key of all that determines it, before it is used: judging
that was cut off or is done again asks for nothing twice.
"""

import os
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from threading import Event, Lock
from typing import Any, Literal, TypeVar

import requests
from pydantic import BaseModel, Field, ValidationError
from urllib3.exceptions import InvalidHeader
from urllib3.util import Retry

from sera_plugin.config.block import JudgeConfig
from sera_plugin.config.quoting import plain
from sera_plugin.labeling.judging import (
    Answered,
    Comparison,
    Judge,
    JudgeFailed,
    ScoringJudge,
    Verdict,
    fill,
    parse,
    read_template,
)
from sera_plugin.rundir.journal import Journal, key_of
from sera_plugin.sampling.client import in_threads
from sera_plugin.sampling.http import Reply, Session, exchange, one_line

#: Tries after the first, and seconds before the second of them; doubled each time, so about a
#: minute in all where the endpoint does not say how long to wait.
RETRIES, BACKOFF = 6, 1.0
#: Seconds that an endpoint may ask us to wait.
LONGEST_WAIT = 300.0
#: Replies to one question before its verdict is given up.
REPLIES = 3
#: An endpoint that refuses that many requests, and has answered none, refuses all of them.
REFUSALS = 10

#: What a judge is told after a reply without a verdict.
_REMINDERS = {
    "pairwise": "Your reply has no verdict that can be read. Reply with [[A]], [[B]] or [[C]].",
    "single": "Your reply has no rating that can be read. Reply like this: Rating: [[7]]",
}
Item = TypeVar("Item")
Result = TypeVar("Result")


class _Refused(Exception):
    """The endpoint does not take this request; the message has its words."""


class _Again(Exception):
    """Worth another try, after `wait` seconds if the endpoint said so."""

    def __init__(self, problem: str, wait: float | None = None) -> None:
        super().__init__(problem)
        self.wait = wait


class _Tokens(BaseModel, strict=True):
    """What a reply has cost; more than any model can read or write is no count."""

    prompt_tokens: int | None = Field(None, ge=0, le=10**9)
    completion_tokens: int | None = Field(None, ge=0, le=10**9)


class _Message(BaseModel, strict=True):
    role: Literal["assistant"] = "assistant"
    content: str | None = None


class _Choice(BaseModel, strict=True):
    index: Literal[0] = 0
    message: _Message


class _Completion(BaseModel, strict=True):
    """The part of a chat completion that is used: one answer of the assistant's."""

    choices: list[_Choice] = Field(min_length=1, max_length=1, fail_fast=True)
    usage: _Tokens | None = None


class _ApiJudge(Judge):
    """Asks for one kind of verdict until a reply has one, through the journal.

    Tried again: lost connections, time-outs, 408, 409, 429, 5xx, and bodies that are no reply.
    """

    def __init__(self, config: JudgeConfig, journal: Journal) -> None:
        super().__init__(config.model, config.model_dump(mode="json"))
        self.config, self._journal = config, journal
        self._template = read_template(config.mode, config.template)
        self._key = _key(config)
        self._session = Session(config.concurrency, trust_env=not config.is_local)
        self._refusal = ""
        self._counting = Lock()
        self._stop = Event()  # set once there is no use in trying again

    def _each(
        self, items: Sequence[Item], work: Callable[[Item], Result]
    ) -> Iterator[tuple[int, Result]]:
        """Yield (index, result) of every item, worked on in threads."""
        concurrency = self.config.concurrency
        self._stop.clear()
        with ThreadPoolExecutor(concurrency) as pool:
            try:
                jobs = in_threads(pool, enumerate(items), lambda job: work(job[1]), concurrency)
                for finished in jobs:
                    for (index, _), result in finished:
                        self._check_refusals(REFUSALS)
                        yield index, result
                self._check_refusals(1)
            finally:
                self._stop.set()

    def _check_refusals(self, most: int) -> None:
        usage = self.usage
        if usage.refused >= most and not usage.asked.count + usage.cached.count:
            raise JudgeFailed(
                f"the judge at {self.config.base_url} has refused all of the first "
                f"{usage.refused} requests; the last time {self._refusal}. Check model, and what "
                "request sends."
            )

    def _count(self, what: str, more: int = 1) -> None:
        with self._counting:
            setattr(self.usage, what, getattr(self.usage, what) + more)

    def _verdict(self, **texts: str) -> float | None:
        """What the judge says of these texts, None if it says nothing that can be read."""
        mode = self.config.mode
        messages = [{"role": "user", "content": fill(self._template, texts)}]
        for _ in range(REPLIES):
            try:
                text = self._reply(messages)
            except _Refused as refusal:
                self._refusal = str(refusal)
                self._count("refused")
                return None
            if (value := parse(mode, text)) is not None:
                return value
            self._count("malformed")
            # Some endpoints take no empty message.
            messages.append({"role": "assistant", "content": text or "(nothing)"})
            messages.append({"role": "user", "content": _REMINDERS[mode]})
        self._count("unparsed")
        return None

    def _reply(self, messages: list[dict[str, str]]) -> str:
        """The reply's text, from the journal or the endpoint."""
        config, counted = self.config, self.usage.cached
        key = key_of(config.base_url, config.model, config.request, messages)
        kinds = {"text": str, **dict.fromkeys(_Tokens.model_fields, int)}
        if (found := self._journal.get(key, **kinds)) is None:
            found, counted = {"model": config.model, **self._ask(messages)}, self.usage.asked
            self._journal.add(key, found)
        with self._counting:
            counted.count += 1
            counted.prompt_tokens += found["prompt_tokens"]
            counted.completion_tokens += found["completion_tokens"]
        text: str = found["text"]
        return text

    def _ask(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        """The model's reply: `text`, `prompt_tokens`, `completion_tokens`, after some tries."""
        for attempt in count():
            try:
                reply = self._ask_once(messages)
                break
            except _Again as problem:
                if attempt == RETRIES:
                    raise self._failed(
                        f"did not answer in {RETRIES + 1} tries; the last time {problem}. Look "
                        "after the endpoint"
                    ) from None
                # Many threads that were turned away together should not come back together.
                delay = BACKOFF * 2**attempt * random.uniform(0.75, 1.25)
                if self._stop.wait(problem.wait or delay):
                    raise self._failed("was not asked again") from None
        self._count("retries", attempt)
        return reply

    def _ask_once(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        body = {**self.config.request, "model": self.config.model, "messages": messages}
        try:
            answer = exchange(
                self._session,
                "POST",
                f"{self.config.base_url}/chat/completions",
                self.config.timeout,
                json={key: value for key, value in body.items() if value is not None},
                auth=self._authorize,
            )
        except requests.exceptions.SSLError as error:
            raise self._failed(f"has no certificate that is trusted here: {error}") from None
        except requests.RequestException as error:
            raise _Again(one_line(f"the connection failed: {error}", self._key, 400)) from None
        self._check(answer)
        try:
            completion = _Completion.model_validate(answer.json())
        except ValidationError as error:
            place = ".".join(map(str, error.errors()[0]["loc"]))
            raise _Again(f"its answer was no chat completion: {plain(place)} is wrong") from None
        except ValueError:
            raise _Again("its answer was no chat completion") from None
        tokens = completion.usage.model_dump() if completion.usage else {}
        counts = {key: tokens.get(key) or 0 for key in _Tokens.model_fields}
        return {"text": completion.choices[0].message.content or "", **counts}

    def _authorize(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        # Given even without a key: the session would look for one in ~/.netrc.
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def _check(self, answer: Reply) -> None:
        status = answer.status
        if status == 200:
            return
        words = answer.words(self._key)
        said = f"it answered {status}: {words}"
        if status in (408, 409, 429) or status >= 500:
            wait = None  # without the header, or with one that cannot be read
            with suppress(KeyError, InvalidHeader, ValueError, OverflowError):
                wait = Retry().parse_retry_after(answer.headers["Retry-After"])
            if wait is not None and wait > LONGEST_WAIT:
                raise self._failed(
                    f"asks to come back in {wait:.0f} seconds: {words}. Start the same command "
                    "again then"
                )
            raise _Again(said, wait)
        # The request is at fault, but the next one may be fine: too long, or not to its taste.
        if status in (400, 413, 422):
            raise _Refused(said)
        remedy = "Check base_url and model"
        if status in (401, 403) and self._key:
            remedy = "Set the environment variable that api_key_env names to a key that it takes"
        elif status in (401, 403):
            remedy = "Give the name of the environment variable with the key as api_key_env"
        raise self._failed(f"refuses to judge: {said}. {remedy}")

    def _failed(self, problem: str) -> JudgeFailed:
        text = f"the judge at {self.config.base_url} {problem}. What was judged is kept."
        return JudgeFailed(one_line(text, self._key))


def _key(config: JudgeConfig) -> str:
    """From the environment; errors do not repeat the variable's name, which could be a key."""
    if config.api_key_env is None:
        return ""
    key = os.environ.get(config.api_key_env, "").strip()
    if key and key.isascii() and key.isprintable():
        return key
    problem = "api_key_env names an environment variable that is not set"
    if key:
        problem = "the key that api_key_env names is not printable ASCII"
    raise JudgeFailed(
        f"{problem}. Export the key in it, or leave api_key_env out where the endpoint takes no "
        "key."
    )


class PairwiseJudge(_ApiJudge):
    """Shows both answers, in both orders. Two equal answers tie without being shown."""

    def compare(self, comparisons: Sequence[Comparison]) -> Iterator[tuple[int, Verdict]]:
        """See `Judge.compare`."""

        def compare(one: Comparison) -> Verdict:
            if one.first == one.second:
                return Verdict((0.5, 0.5))
            question, a, b = one.question, one.first, one.second
            first = self._verdict(question=question, answer_a=a, answer_b=b)
            second = self._verdict(question=question, answer_a=b, answer_b=a)
            return Verdict((first, None if second is None else 1.0 - second))

        return self._each(comparisons, compare)


class RatingJudge(_ApiJudge, ScoringJudge):
    """Rates one answer at a time, from 1 to 10."""

    def score(self, answers: Sequence[Answered]) -> Iterator[tuple[int, float | None]]:
        """See `ScoringJudge.score`."""
        return self._each(
            answers, lambda one: self._verdict(question=one.question, answer=one.answer)
        )
