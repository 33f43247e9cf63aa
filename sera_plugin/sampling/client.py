"""Sampling from a vLLM server over HTTP: token ids in, token ids out.

What an engine answers is checked here, once, before anything of it is stored.
"""

from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from time import monotonic
from typing import Any, Literal, TypeVar

import requests
from pydantic import BaseModel, TypeAdapter, ValidationError
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from sera_plugin.algorithm.method import Candidate, Chunk, SamplingSettings, TokenIds
from sera_plugin.config.credentials import without_credentials
from sera_plugin.config.quoting import printable, quoted, without_secret
from sera_plugin.rundir.ranks import Shard
from sera_plugin.sampling.child import SamplingFailed

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


def room(row: int, prompt: TokenIds, settings: SamplingSettings) -> int:
    """How many tokens may be sampled after a prompt; a ValueError if that is none."""
    limit = settings.max_new_tokens
    if settings.max_length is not None:
        limit = min(limit, settings.max_length - len(prompt))
    if limit < 1:
        raise ValueError(
            f"the prompt of row {row} has {len(prompt)} tokens, which leaves no room to sample "
            f"within {settings.max_length}. Raise sequence_len (or vllm.max_model_len, where that "
            "is the smaller one), or remove the row."
        )
    return limit


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

    def candidates(
        self, row: int, request: Mapping[str, Any], settings: SamplingSettings, vocabulary: int
    ) -> list[Candidate]:
        """What is sampled for a row's prompt; SamplingFailed if it is wrong."""
        choices = self.ask("choices", "/v1/completions", request)
        try:
            return read_candidates(choices, settings, request["max_tokens"], vocabulary)
        except ValueError as error:
            raise self.wrong(
                f"answers the prompt of row {row} wrongly: {error}. Nothing of it is stored. Use "
                "a vLLM that docs/sampling.md lists"
            ) from None

    def words(self, answer: requests.Response) -> str:
        """The server's own words."""
        return server_words(answer, self.key)

    def wrong(self, problem: str) -> SamplingFailed:
        """What to raise, without the key."""
        return SamplingFailed(one_line(f"the vLLM server at {self.url} {problem}.", self.key))


#: A server that is ready: its client, the policy's name there, what watches over it.
Serving = tuple[Client, str, Callable[[], None]]


class EngineSampler:
    """Samples from the vLLM server that `_serving` has ready; see `CandidateSampler`."""

    make_room: Callable[[int], AbstractContextManager[Any]] = nullcontext

    def __init__(self, name: str, vocabulary: int, shard: Shard, longest: int | None) -> None:
        self.report: dict[str, Any] = {"name": name}
        self.seconds: dict[str, float] = {}
        self.longest, self.shard, self.vocabulary = longest, shard, vocabulary

    def sample(
        self, prompts: Sequence[TokenIds], settings: SamplingSettings, skip: Collection[int] = ()
    ) -> Generator[Chunk, None, None]:
        """See `CandidateSampler.sample`. A chunk is some seconds' worth of finished prompts."""
        settings = settings.within(self.longest)
        # The longest first: what still runs at the end of a phase is then short.
        longest_first = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
        rows = [row for row in longest_first if row not in skip]
        limits = {row: room(row, prompts[row], settings) for row in rows}
        lengths = [len(prompts[row]) + limits[row] for row in rows]
        mine = self.shard.of(rows, lengths)
        if not rows:
            return
        with self.make_room(max(lengths)) as memory:
            if not mine:
                return
            with self._serving(max(lengths), memory) as (client, name, watch):
                fields = sampling_fields(settings) | {"model": name}

                def ask(row: int) -> list[Candidate]:
                    asked = {"prompt": prompts[row].tolist(), "seed": settings.stream(row)}
                    request = fields | asked | {"max_tokens": limits[row]}
                    return client.candidates(row, request, settings, self.vocabulary)

                yield from _in_chunks(mine, ask, watch)

    def _serving(self, length: int, memory: Any) -> AbstractContextManager[Serving]:
        raise NotImplementedError


def _in_chunks(
    rows: Sequence[int], ask: Callable[[int], list[Candidate]], watch: Callable[[], None]
) -> Generator[Chunk, None, None]:
    """Chunks of finished rows; `watch` is called at least every second and may raise."""
    chunk: Chunk = []
    until = monotonic() + CHUNK_SECONDS
    pool = ThreadPoolExecutor(IN_FLIGHT)
    try:
        for finished in in_threads(pool, rows, ask, IN_FLIGHT):
            watch()
            chunk += finished
            if chunk and (len(chunk) >= CHUNK_PROMPTS or monotonic() > until):
                yield chunk
                chunk, until = [], monotonic() + CHUNK_SECONDS
        if chunk:
            yield chunk
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


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
