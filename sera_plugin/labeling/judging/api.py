"""Judges behind an OpenAI-compatible endpoint: two answers at a time, or one.

Every reply goes into a journal under a key of all that determines it, before it is used: judging
that was cut off or is done again asks for nothing twice. What is tried again: lost connections,
time-outs, 408, 409, 429 and 5xx answers, and bodies that are no reply. What is not: an answer that
says the request itself is wrong.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from threading import Event
from typing import Any, TypeVar

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import InvalidHeader
from urllib3.util import Retry

from sera_plugin.config.judge import JudgeConfig
from sera_plugin.labeling.judging import (
    Answered,
    Comparison,
    Judge,
    JudgeFailed,
    ScoringJudge,
    Usage,
    Verdict,
)
from sera_plugin.labeling.judging.prompts import REMINDERS, fill, parse, read_template
from sera_plugin.rundir.journal import Journal, key_of
from sera_plugin.sampling.client import in_threads, one_line, server_words

#: Tries after the first, and seconds before the second of them; doubled each time, so about a
#: minute in all where the endpoint does not say how long to wait.
RETRIES, BACKOFF = 6, 1.0
#: Seconds that an endpoint may ask us to wait.
LONGEST_WAIT = 300.0
#: Replies to one question before its verdict is given up.
REPLIES = 3
#: An endpoint that refuses that many requests, and has answered none, refuses all of them.
REFUSALS = 10

Message = dict[str, str]
Item = TypeVar("Item")
Result = TypeVar("Result")


class Refused(Exception):
    """The endpoint does not take this request; the message has its words."""


class _Again(Exception):
    """Worth another try, after `wait` seconds if the endpoint said so."""

    def __init__(self, problem: str, wait: float | None = None) -> None:
        super().__init__(problem)
        self.wait = wait


class ChatClient:
    """Talks to one endpoint. Threads may share it.

    Raises:
        JudgeFailed: if the environment variable with the key is not there or holds none.
    """

    def __init__(self, config: JudgeConfig) -> None:
        self.config = config
        self._key = _key(config)
        self._session = requests.Session()
        self._session.trust_env = not config.is_local
        adapter = HTTPAdapter(pool_maxsize=config.concurrency, max_retries=0)
        self._session.mount(config.base_url, adapter)

    def ask(self, messages: Sequence[Message], stop: Event) -> tuple[dict[str, Any], int]:
        """The model's reply (`text`, `prompt_tokens`, `completion_tokens`), and tries before it.

        Args:
            messages: the conversation so far.
            stop: set once there is no use in trying again, because something else has failed.

        Raises:
            Refused: if the endpoint does not take this one.
            JudgeFailed: if it takes none, or does not answer after the last try.
        """
        for attempt in range(RETRIES):
            try:
                return self._once(messages), attempt
            except _Again as problem:
                # Many threads that were turned away together should not come back together.
                delay = BACKOFF * 2**attempt * random.uniform(0.75, 1.25)
                if stop.wait(problem.wait or delay):
                    raise self._failed("was not asked again") from None
        try:
            return self._once(messages), RETRIES
        except _Again as problem:
            raise self._failed(
                f"did not answer in {RETRIES + 1} tries; the last time {problem}. Look after the "
                "endpoint"
            ) from None

    def _once(self, messages: Sequence[Message]) -> dict[str, Any]:
        body = {**self.config.request, "model": self.config.model, "messages": list(messages)}
        try:
            answer = self._session.post(
                f"{self.config.base_url}/chat/completions",
                json={key: value for key, value in body.items() if value is not None},
                timeout=(min(10.0, self.config.timeout), self.config.timeout),
                allow_redirects=False,
                auth=self._authorize,
            )
        except requests.exceptions.SSLError as error:
            raise self._failed(f"has no certificate that is trusted here: {error}") from None
        except requests.RequestException as error:
            problem = one_line(f"the connection failed: {error}", self._key)
            raise _Again(problem[:400]) from None
        self._check(answer)
        try:
            reply = answer.json()
            text = reply["choices"][0]["message"]["content"] or ""
            usage = reply.get("usage") or {}
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            text = usage = None
        if not isinstance(text, str):
            raise _Again("its answer was no chat completion")
        counts = usage if isinstance(usage, dict) else {}
        found = {name: counts.get(name) for name in ("prompt_tokens", "completion_tokens")}
        return {"text": text} | {
            name: count if isinstance(count, int) else 0 for name, count in found.items()
        }

    def _authorize(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        # Given even without a key: the session would look for one in ~/.netrc.
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def _check(self, answer: requests.Response) -> None:
        status = answer.status_code
        if status == 200:
            return
        words = server_words(answer, self._key)
        said = f"it answered {status}: {words}"
        if status in (408, 409, 429) or status >= 500:
            wait = None
            with suppress(KeyError, InvalidHeader):
                wait = Retry().parse_retry_after(answer.headers["Retry-After"])
            if wait is not None and wait > LONGEST_WAIT:
                raise self._failed(
                    f"asks to come back in {wait:.0f} seconds: {words}. Start the same command "
                    "again then"
                )
            raise _Again(said, wait)
        # The request is at fault, but the next one may be fine: too long, or not to its taste.
        if status in (400, 413, 422):
            raise Refused(said)
        remedy = "Check base_url and model"
        if status in (401, 403):
            remedy = "Set the environment variable that api_key_env names to a key that it takes"
            if not self._key:
                remedy = "Give the name of the environment variable with the key as api_key_env"
        raise self._failed(f"refuses to judge: {said}. {remedy}")

    def _failed(self, problem: str) -> JudgeFailed:
        text = f"the judge at {self.config.base_url} {problem}. What was judged is kept."
        return JudgeFailed(one_line(text, self._key))


def _key(config: JudgeConfig) -> str:
    """The key from the environment, empty where none is asked for.

    An error does not repeat the variable's name, which could be a key by mistake.
    """
    if config.api_key_env is None:
        return ""
    key = os.environ.get(config.api_key_env, "").strip()
    if not key:
        raise JudgeFailed(
            "api_key_env names an environment variable that is not set. Export the key in it, or "
            "leave api_key_env out where the endpoint takes no key."
        )
    if not (key.isascii() and key.isprintable()):
        raise JudgeFailed(
            "api_key_env names an environment variable whose value cannot be sent as a key: it "
            "has characters other than printable ASCII."
        )
    return key


class _ApiJudge:
    """Asks for one kind of verdict until a reply has one, through the journal."""

    def __init__(self, config: JudgeConfig, journal: Journal) -> None:
        self.name = config.model
        self.description = config.model_dump(mode="json")
        self.usage = Usage()
        self.config = config
        self._template = read_template(config.mode, config.template)
        self._client = ChatClient(config)
        self._journal = journal
        self._refusal = ""

    def _verdict(self, stop: Event, usage: Usage, **texts: str) -> float | None:
        """What the judge says of these texts, None if it says nothing that can be read."""
        mode = self.config.mode
        messages = [{"role": "user", "content": fill(self._template, texts)}]
        for _ in range(REPLIES):
            try:
                text = self._reply(messages, usage, stop)
            except Refused as refusal:
                self._refusal = str(refusal)
                usage.refused += 1
                return None
            value = parse(mode, text)
            if value is not None:
                return value
            usage.malformed += 1
            # Some endpoints take no empty message.
            messages.append({"role": "assistant", "content": text or "(nothing)"})
            messages.append({"role": "user", "content": REMINDERS[mode]})
        usage.unparsed += 1
        return None

    def _reply(self, messages: list[Message], usage: Usage, stop: Event) -> str:
        config = self.config
        key = key_of(config.base_url, config.model, config.request, messages)
        found, counted = self._journal.get(key), usage.cached
        if found is None:
            reply, retries = self._client.ask(messages, stop)
            found, counted = {"model": config.model, **reply}, usage.asked
            usage.retries += retries
            self._journal.add(key, found)
        counted.count += 1
        counted.prompt_tokens += found["prompt_tokens"]
        counted.completion_tokens += found["completion_tokens"]
        text: str = found["text"]
        return text

    def _each(
        self, items: Sequence[Item], work: Callable[[Item, Event, Usage], Result]
    ) -> Iterator[tuple[int, Result]]:
        """Yield (index, result) of every item, worked on in threads; count what that takes.

        Raises:
            JudgeFailed: if one cannot be worked on, once what was under way has ended.
        """
        stop, concurrency = Event(), self.config.concurrency

        def counted(job: tuple[int, Item]) -> tuple[Result, Usage]:
            usage = Usage()
            return work(job[1], stop, usage), usage

        with ThreadPoolExecutor(concurrency) as pool:
            try:
                for finished in in_threads(pool, enumerate(items), counted, concurrency):
                    for (index, _), (result, usage) in finished:
                        self.usage.add(usage)
                        self._check_refusals(REFUSALS)
                        yield index, result
                self._check_refusals(1)
            finally:
                stop.set()

    def _check_refusals(self, most: int) -> None:
        usage = self.usage
        if usage.refused >= most and not usage.asked.count + usage.cached.count:
            raise JudgeFailed(
                f"the judge at {self.config.base_url} has refused all of the first "
                f"{usage.refused} requests; the last time {self._refusal}. Check model, and what "
                "request sends."
            )


class PairwiseJudge(_ApiJudge):
    """Shows both answers, in both orders. Two equal answers tie without being shown."""

    def compare(self, comparisons: Sequence[Comparison]) -> Iterator[tuple[int, Verdict]]:
        """See `Judge.compare`."""
        return self._each(comparisons, self._compare)

    def _compare(self, one: Comparison, stop: Event, usage: Usage) -> Verdict:
        if one.first == one.second:
            return Verdict((0.5, 0.5))
        show = partial(self._verdict, stop, usage, question=one.question)
        first = show(answer_a=one.first, answer_b=one.second)
        second = show(answer_a=one.second, answer_b=one.first)
        return Verdict((first, None if second is None else 1.0 - second))


class RatingJudge(_ApiJudge, ScoringJudge):
    """Rates one answer at a time, from 1 to 10."""

    def score(self, answers: Sequence[Answered]) -> Iterator[tuple[int, float | None]]:
        """See `ScoringJudge.score`."""
        return self._each(answers, lambda one, stop, usage: self._verdict(stop, usage, **vars(one)))


def api_judge(config: JudgeConfig, journal: Journal) -> Judge:
    """The judge that a configuration describes, which keeps its replies in the journal.

    Raises:
        ValueError, OSError: for a template that cannot be used.
        JudgeFailed: if the key's environment variable is not there.
    """
    return (RatingJudge if config.mode == "single" else PairwiseJudge)(config, journal)
