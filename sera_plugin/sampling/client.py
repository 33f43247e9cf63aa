"""Sampling from a vLLM server over HTTP: token ids in, token ids out."""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from contextlib import contextmanager
from itertools import count, islice
from time import sleep
from typing import Any, TypeVar

import requests

from sera_plugin.algorithm.method import Candidate, SamplingSettings
from sera_plugin.sampling.answers import (
    MODELS,
    Known,
    ServedModel,
    answer_logp,
    read_candidates,
    shaped,
)
from sera_plugin.sampling.child import PATIENCE, SamplingFailed
from sera_plugin.sampling.http import Reply, Session, exchange, one_line

#: Tries after a lost connection or an overloaded answer. The first of them is made at once, the
#: others after twice the seconds, four times, ...: about a minute in all. A server that asks for
#: another time is not heard: it could be days.
RETRIES, BACKOFF = 6, 1.0
OVERLOADED = (429, 502, 503, 504)
#: Prompts that a server samples at a time.
IN_FLIGHT = 128

Job = TypeVar("Job")
Result = TypeVar("Result")


def in_threads(
    pool: Executor, jobs: Iterable[Job], work: Callable[[Job], Result], at_once: int
) -> Generator[list[tuple[Job, Result]], None, None]:
    """Yield what has finished of some work, every second at least; an empty list for nothing."""
    waiting = iter(jobs)
    running: dict[Future[Result], Job] = {}
    while True:
        for job in islice(waiting, at_once - len(running)):
            running[pool.submit(work, job)] = job
        if not running:
            return
        finished, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
        yield [(running.pop(future), future.result()) for future in finished]


class ServerLost(SamplingFailed):
    """A server is gone, broken, or has begun anew; nothing that it has answered is wrong."""


def broken(answer: Reply) -> bool:
    """Whether a server has failed to answer, and not refused to."""
    return answer.status in OVERLOADED or answer.status >= 500


class Client:
    """Sends requests to one server, whose `key` may be an empty text.

    `retries` are tries after the first one, `timeout` is in seconds for a reply, None where `watch`
    sees to it while it samples, and `named` are the keys that say where a running server is.
    """

    def __init__(
        self, url: str, key: str, retries: int, timeout: float | None, named: str = ""
    ) -> None:
        self.url, self.key, self.named = url, key, named
        self.lost = False  # given up: nothing is tried again
        self._retries, self._timeout = retries, timeout
        self._session = Session(IN_FLIGHT, trust_env=False)  # no proxy knows this machine
        if key:
            self._session.headers["Authorization"] = f"Bearer {key}"

    def version(self) -> str:
        """Of vLLM, as the server gives it."""
        return one_line(str(self.ask("version", "/version")), self.key, 60)

    def answers(self, path: str) -> str | None:
        """What a path gives, None where nothing answers within some seconds; tried once."""
        try:
            answer = exchange(self._session, "GET", self.url + path, 5.0)
        except requests.RequestException:
            return None
        return answer.text if answer.ok else None

    def send(self, path: str, body: Any = None, watched: bool = False) -> Reply:
        """The reply to a GET, or a POST with a body, whatever its status."""
        method, url = "GET" if body is None else "POST", self.url + path
        seconds = self._timeout or (None if watched else PATIENCE)
        for attempt in count():
            sleep(BACKOFF * 2 ** (attempt - 1) if attempt > 1 else 0)
            try:  # sampling is seeded: asking twice gives the same
                answer = exchange(self._session, method, url, seconds, json=body)
                if attempt == self._retries or answer.status not in OVERLOADED:
                    break
            except requests.RequestException as error:
                # A key or an address that cannot be sent is a ValueError too.
                unsent = isinstance(error, ValueError)
                # It has had all of its time. A connection that takes long may be made yet.
                silent = isinstance(error, requests.Timeout) and not isinstance(
                    error, requests.ConnectTimeout
                )
                if attempt == self._retries or self.lost or unsent or silent:
                    tries = f"{attempt + 1} tries" if attempt else "one try"
                    remedy = "Start it (docs/sampling.md has the command), or set "
                    raise self.wrong(
                        f"does not answer {path} after {tries}: {error}. "
                        + (f"{remedy}{self.named} to where it is" if self.named else ""),
                        SamplingFailed if unsent else ServerLost,
                    ) from None
        return answer

    def ask(self, key: str, path: str, body: Any = None, watched: bool = False) -> Any:
        """What stands under a key of the reply; SamplingFailed if there is no such reply."""
        answer = self.send(path, body, watched)
        if answer.status in (401, 403):
            raise self.wrong("refuses this run's key. Set VLLM_API_KEY to the server's own")
        # A server that was started again in the middle of a phase does not know the adapter.
        if not answer.ok:
            lost = broken(answer) or (watched and answer.status == 404)
            problem = f"refused {path} ({answer.status}): {self.words(answer)}"
            raise self.wrong(problem, ServerLost if lost else SamplingFailed)
        try:
            return answer.json()[key]
        except (ValueError, KeyError, TypeError):
            raise self.wrong(
                f"answers {path} as no vLLM does: {self.words(answer) or 'with nothing'}. Set "
                f"{self.named} to where `vllm serve` runs"
            ) from None

    def candidates(
        self, row: int, request: Mapping[str, Any], settings: SamplingSettings, vocabulary: int
    ) -> list[Candidate]:
        """What is sampled for a row's prompt; SamplingFailed if it is wrong."""
        choices = self.ask("choices", "/v1/completions", request, watched=True)
        limit, prompt = request["max_tokens"], request["prompt"]
        with self.said(f"answers the prompt of row {row} wrongly"):
            return read_candidates(choices, settings, limit, vocabulary, prompt)

    def logp(self, model: str, known: Known) -> float:
        """log pi(answer | prompt) in nats under the policy that the server has as `model`."""
        request = {"model": model, "prompt": known.tokens, "max_tokens": 1, "prompt_logprobs": 0}
        with self.said("gives no log-probabilities of a prompt"):
            return answer_logp(self.ask("choices", "/v1/completions", request), known)

    def models(self) -> list[ServedModel]:
        """What the server lists."""
        with self.said("answers /v1/models as no vLLM does"):
            return shaped(MODELS, self.ask("data", "/v1/models"), "data")

    @contextmanager
    def said(self, what: str) -> Iterator[None]:
        """Turn a ValueError about an answer into what to raise; nothing of it is stored."""
        try:
            yield
        except ValueError as error:
            raise self.wrong(
                f"{what}: {error}. Nothing of it is stored. Use a vLLM that docs/sampling.md lists"
            ) from None

    def words(self, answer: Reply) -> str:
        """The server's own words."""
        return answer.words(self.key)

    def wrong(self, problem: str, kind: type[SamplingFailed] = SamplingFailed) -> SamplingFailed:
        """What to raise, without the key."""
        return kind(one_line(f"the vLLM server at {self.url} {problem}.", self.key))

    @property
    def shown(self) -> str:
        """The address as it may be kept."""
        return one_line(self.url, self.key)
