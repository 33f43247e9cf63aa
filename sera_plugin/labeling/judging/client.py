"""One request to an OpenAI-compatible endpoint, until it is answered or there is no use in asking.

What is tried again: lost connections, time-outs, 408, 409, 429 and 5xx answers, and bodies that are
no reply. What is not: an answer that says the request itself is wrong.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Event
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import InvalidHeader
from urllib3.util import Retry

from sera_plugin.config.judge import JudgeConfig
from sera_plugin.config.quoting import printable, without_credentials, without_secret
from sera_plugin.labeling.judging import JudgeFailed

#: Tries after the first, and seconds before the second of them; doubled each time, so about a
#: minute in all where the endpoint does not say how long to wait.
RETRIES, BACKOFF = 6, 1.0
#: Seconds that an endpoint may ask us to wait.
LONGEST_WAIT = 300.0
_AGAIN = frozenset({408, 409, 429})
#: The request is at fault, but the next one may be fine: too long, or not to the endpoint's taste.
_REFUSED = frozenset({400, 413, 422})
_WORDS = 400

Message = dict[str, str]


class Refused(Exception):
    """The endpoint does not take this request; the message has its words."""


class _Again(Exception):
    """Worth another try, after `wait` seconds if the endpoint said so."""

    def __init__(self, problem: str, wait: float | None = None) -> None:
        super().__init__(problem)
        self.wait = wait


@dataclass(frozen=True)
class Reply:
    """What a model said, and what that took. `retries` are requests made again on the way."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    retries: int = 0


class ChatClient:
    """Talks to one endpoint. Threads may share it.

    Args:
        config: where, which model, and how.

    Raises:
        JudgeFailed: if the environment variable with the key is not there or holds none.
    """

    def __init__(self, config: JudgeConfig) -> None:
        self.config = config
        self._key = _key(config)
        self._session = requests.Session()
        self._session.trust_env = not config.is_local
        self._session.mount(
            config.base_url, HTTPAdapter(pool_maxsize=config.concurrency, max_retries=0)
        )

    def ask(self, messages: Sequence[Message], stop: Event) -> Reply:
        """The model's reply.

        Args:
            messages: the conversation so far.
            stop: set once there is no use in trying again, because something else has failed.

        Raises:
            Refused: if the endpoint does not take this one.
            JudgeFailed: if it takes none, or does not answer after the last try.
        """
        for attempt in range(RETRIES + 1):
            try:
                text, prompt_tokens, completion_tokens = self._once(messages)
                return Reply(text, prompt_tokens, completion_tokens, attempt)
            except _Again as problem:
                if attempt == RETRIES:
                    raise self._failed(
                        f"did not answer in {RETRIES + 1} tries; the last time {problem}. Look "
                        "after the endpoint"
                    ) from None
                # Many threads that were turned away together should not come back together.
                delay = BACKOFF * 2**attempt * random.uniform(0.75, 1.25)
                if stop.wait(problem.wait or delay):
                    raise self._failed("was not asked again") from None
        raise AssertionError  # the last attempt returns or raises

    def _once(self, messages: Sequence[Message]) -> tuple[str, int, int]:
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
            raise _Again(self._shown(f"the connection failed: {error}")[:_WORDS]) from None
        self._check(answer)
        return _content(answer)

    def _authorize(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        # Given even without a key: the session would look for one in ~/.netrc.
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def _check(self, answer: requests.Response) -> None:
        status = answer.status_code
        if status == 200:
            return
        said = f"it answered {status}: {self._words(answer)}"
        if status in _AGAIN or status >= 500:
            raise _Again(said, self._wait(answer))
        if status in _REFUSED:
            raise Refused(said)
        if status in (401, 403):
            remedy = "Set the environment variable that api_key_env names to a key that it takes"
            if not self._key:
                remedy = "Give the name of the environment variable with the key as api_key_env"
        else:
            remedy = "Check base_url and model"
        raise self._failed(f"refuses to judge: {said}. {remedy}")

    def _wait(self, answer: requests.Response) -> float | None:
        asked = answer.headers.get("Retry-After")
        if asked is None:
            return None
        try:
            seconds = Retry().parse_retry_after(asked)
        except InvalidHeader:
            return None
        if seconds > LONGEST_WAIT:
            raise self._failed(
                f"asks to come back in {seconds:.0f} seconds: {self._words(answer)}. Start the "
                "same command again then"
            )
        return seconds

    def _failed(self, problem: str) -> JudgeFailed:
        return JudgeFailed(
            self._shown(f"the judge at {self.config.base_url} {problem}. What was judged is kept.")
        )

    def _words(self, answer: requests.Response) -> str:
        """The endpoint's own words, cut to a readable length."""
        try:
            error: Any = answer.json()
            error = error.get("error", error)
            text = error["message"] if isinstance(error, dict) else error
        except (ValueError, KeyError, AttributeError):
            text = answer.text
        return self._shown(text)[:_WORDS]

    def _shown(self, text: object) -> str:
        """In one line, without the key: an endpoint may send back what it was sent."""
        line = printable(" ".join(without_secret(str(text), self._key).split()))
        return without_credentials(line)


def _content(answer: requests.Response) -> tuple[str, int, int]:
    """Text and token counts of a reply; those that are missing count as 0."""
    try:
        body = answer.json()
        text = body["choices"][0]["message"]["content"]
        if not isinstance(text, str | None):
            raise TypeError
    except (ValueError, KeyError, IndexError, TypeError):
        raise _Again("its answer was no chat completion") from None
    usage = body.get("usage") or {}
    counts = [
        usage.get(name) if isinstance(usage, dict) else None
        for name in ("prompt_tokens", "completion_tokens")
    ]
    prompt, completion = (count if isinstance(count, int) else 0 for count in counts)
    return text or "", prompt, completion


def _key(config: JudgeConfig) -> str:
    """The key from the environment, empty where none is asked for.

    Raises:
        JudgeFailed: without repeating the name, which could be a key by mistake.
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
