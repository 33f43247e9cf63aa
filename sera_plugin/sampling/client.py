"""The HTTP client of a vLLM server: token ids in, token ids out.

What an engine answers is checked here, once, before anything of it is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from itertools import islice
from time import monotonic
from typing import Any, Literal, TypeVar

import requests
from pydantic import BaseModel, TypeAdapter, ValidationError
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from sera_plugin.algorithm.method import Candidate, Chunk, SamplingSettings, TokenIds
from sera_plugin.config.quoting import printable, quoted, without_credentials, without_secret
from sera_plugin.sampling.prompts import SamplingFailed

#: Tries after a lost connection or an overloaded answer. urllib3 makes the first of them at once,
#: the others after twice the seconds, four times, ...: about a minute in all.
RETRIES, BACKOFF = 6, 1.0
#: Prompts that are sampled at a time.
IN_FLIGHT = 128
#: A chunk is handed over when it has this many prompts, or is this many seconds old.
CHUNK_PROMPTS, CHUNK_SECONDS = 64, 5.0

Job = TypeVar("Job")
Result = TypeVar("Result")


def sampling_fields(settings: SamplingSettings) -> dict[str, Any]:
    """Every field that shapes a distribution, so that no engine's or model's default does."""
    return {
        "n": settings.candidates,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": 0,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "min_tokens": 0,
        # The end tokens are ours, and the same for every engine.
        "ignore_eos": True,
        "stop_token_ids": list(settings.end_ids),
        "skip_special_tokens": False,
        "return_token_ids": True,
    }


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


def one_line(text: object, key: str) -> str:
    """Text in one line, without the key: a server may send back what it was sent."""
    line = printable(" ".join(without_secret(str(text), key).split()))
    return without_credentials(line)


def server_words(answer: requests.Response, key: str) -> str:
    """A server's own words, cut to a readable length."""
    try:
        error = answer.json()
        error = error.get("error", error)
        text = error["message"] if isinstance(error, dict) else error
    except (ValueError, KeyError, AttributeError):
        text = answer.text
    return one_line(text, key)[:400]


class Client:
    """Sends requests to one server, whose `key` may be an empty text.

    `retries` are tries after the first one, `timeout` is in seconds for a reply, None where `watch`
    sees to it, and `remedy` says what to do where nothing answers.
    """

    def __init__(
        self, url: str, key: str, retries: int, timeout: float | None, remedy: str = ""
    ) -> None:
        self.url, self.key, self.remedy = url, key, remedy
        self._retries, self._timeout = retries, timeout
        retry = Retry(
            total=retries,
            backoff_factor=BACKOFF,
            status_forcelist=(429, 502, 503, 504),
            allowed_methods=None,  # sampling is seeded: asking twice gives the same
            raise_on_status=False,
        )
        self._session = requests.Session()
        self._session.trust_env = False  # no proxy knows this machine
        self._session.mount("http://", HTTPAdapter(pool_maxsize=IN_FLIGHT, max_retries=retry))
        for path in ("/health", "/metrics"):  # without tries, each of which urllib3 warns of
            self._session.mount(url + path, HTTPAdapter())
        if key:
            self._session.headers["Authorization"] = f"Bearer {key}"

    def sample(
        self,
        model: str,
        prompts: Sequence[TokenIds],
        limits: Mapping[int, int],
        settings: SamplingSettings,
        vocabulary: int,
        watch: Callable[[], None] = lambda: None,
    ) -> Generator[Chunk, None, None]:
        """Yield chunks of finished prompts, some seconds' worth each.

        `model` is the name under which the policy is served, `limits` the most tokens to sample by
        row of `prompts`, in the order to take the rows in, `vocabulary` the number of token ids
        that the model knows. `watch` is called at least every second and may raise. SamplingFailed
        if the server does not answer, or wrongly.
        """
        fields = sampling_fields(settings) | {"model": model}

        def ask(row: int) -> list[Candidate]:
            request = {
                "prompt": prompts[row].tolist(),
                "max_tokens": limits[row],
                "seed": settings.stream(row),
            }
            choices = self.ask("choices", "/v1/completions", fields | request)
            try:
                return read_candidates(choices, settings, limits[row], vocabulary)
            except ValueError as error:
                raise self.wrong(
                    f"answers the prompt of row {row} wrongly: {error}. Nothing of it is stored. "
                    "Use a vLLM that docs/sampling.md lists"
                ) from None

        chunk: Chunk = []
        until = monotonic() + CHUNK_SECONDS
        pool = ThreadPoolExecutor(IN_FLIGHT)
        try:
            for finished in in_threads(pool, limits, ask, IN_FLIGHT):
                watch()
                chunk += finished
                if chunk and (len(chunk) >= CHUNK_PROMPTS or monotonic() > until):
                    yield chunk
                    chunk, until = [], monotonic() + CHUNK_SECONDS
            if chunk:
                yield chunk
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def version(self) -> str:
        """Of vLLM, as the server gives it."""
        return one_line(self.ask("version", "/version"), self.key)

    def answers(self, path: str) -> str | None:
        """What a path gives, None where nothing answers within some seconds; tried once."""
        try:
            answer = self._session.get(self.url + path, timeout=5)
        except requests.RequestException:
            return None
        return answer.text if answer.ok else None

    def send(self, path: str, body: Any = None) -> requests.Response:
        """The reply to a GET, or a POST with a body, whatever its status."""
        method, timeout = "GET" if body is None else "POST", (10, self._timeout)
        try:
            return self._session.request(method, self.url + path, json=body, timeout=timeout)
        except requests.RequestException as error:
            raise self.wrong(
                f"does not answer {path} after {self._retries + 1} tries: {error}. {self.remedy}"
            ) from None

    def ask(self, key: str, path: str, body: Any = None) -> Any:
        """What stands under a key of the reply; SamplingFailed if there is no such reply."""
        answer = self.send(path, body)
        if answer.status_code in (401, 403):
            raise self.wrong("refuses this run's key. Set VLLM_API_KEY to the server's own")
        if not answer.ok:
            raise self.wrong(f"refused {path} ({answer.status_code}): {self.words(answer)}")
        try:
            return answer.json()[key]
        except (ValueError, KeyError, TypeError):
            raise self.wrong(
                f"answers {path} as no vLLM does: {self.words(answer) or 'with nothing'}. Set "
                "vllm.host and vllm.port to where `vllm serve` runs"
            ) from None

    def words(self, answer: requests.Response) -> str:
        """The server's own words."""
        return server_words(answer, self.key)

    def wrong(self, problem: str) -> SamplingFailed:
        """What to raise, without the key."""
        return SamplingFailed(one_line(f"the vLLM server at {self.url} {problem}.", self.key))


class _Choice(BaseModel, strict=True):
    index: int
    token_ids: list[int]
    finish_reason: Literal["stop", "length"]


_CHOICES = TypeAdapter(list[_Choice])


def read_candidates(
    choices: object, settings: SamplingSettings, limit: int, vocabulary: int
) -> list[Candidate]:
    """The R candidates of one prompt, in the order of their index, from an engine's answer.

    `limit` is the most tokens of a candidate of this prompt, `vocabulary` the number of token ids
    that the model knows.

    Raises:
        ValueError: saying what is wrong, where they are not R different choices within the
            vocabulary and the limit, each with an end token if and only if it stopped.
    """
    try:
        found = sorted(_CHOICES.validate_python(choices), key=lambda choice: choice.index)
    except ValidationError as error:
        wrong = error.errors()[0]
        place = ".".join(map(str, ("choices", *wrong["loc"])))
        given = quoted(wrong["input"], 100)
        raise ValueError(f"{place} is {given}: {wrong['msg'].lower()}") from None
    indices = [choice.index for choice in found]
    if indices != list(range(settings.candidates)):
        raise ValueError(
            f"{settings.candidates} choices were asked for, and those with index "
            f"{quoted(indices, 100)} came back"
        )
    for choice in found:
        ids, reason = choice.token_ids, choice.finish_reason
        if not 1 <= len(ids) <= limit:
            raise ValueError(f"1 to {limit} tokens were asked for, and {len(ids)} came back")
        if not 0 <= min(ids) <= max(ids) < vocabulary:
            raise ValueError(
                f"token ids go from {min(ids)} to {max(ids)}, but the model's vocabulary has "
                f"{vocabulary} tokens"
            )
        ends = [place for place, token in enumerate(ids) if token in settings.end_ids]
        if ends != ([len(ids) - 1] if reason == "stop" else []):
            raise ValueError(
                f"a candidate of {len(ids)} tokens with the finish reason {reason!r} has end "
                f"tokens at {quoted(ends, 100)}"
            )
    return [Candidate(choice.token_ids, choice.finish_reason) for choice in found]
