"""Sampling from a vLLM server over HTTP: token ids in, token ids out."""

import math
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import count, islice
from time import monotonic, sleep
from typing import Any, TypeVar

import numpy as np
import requests

from sera_plugin.algorithm.method import Candidate, Chunk, SamplingSettings, TokenIds
from sera_plugin.rundir.ranks import Shard
from sera_plugin.rundir.tokens import lengths_of
from sera_plugin.sampling.answers import (
    MODELS,
    Known,
    ServedModel,
    answer_logp,
    policy_difference,
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
#: Prompts that are sampled at a time.
IN_FLIGHT = 128
#: A chunk is handed over when it has this many prompts, or is this many seconds old, which is what
#: a crash may lose. A million prompts in small chunks make too many files.
CHUNK_PROMPTS, CHUNK_SECONDS = 256, 5.0

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


def plan(
    prompts: Sequence[TokenIds], settings: SamplingSettings, skip: Collection[int], shard: Shard
) -> tuple[list[int], int]:
    """The rows of a part, and the most tokens of a prompt and its candidate in any (0 of no rows).

    A ValueError if a prompt leaves no room.
    """
    tokens = lengths_of(prompts)
    # The longest first: what still runs at the end of a phase is then short.
    rows = np.argsort(-tokens, kind="stable")
    rows = rows[np.isin(rows, list(skip), invert=True)]
    if not len(rows):
        return [], 0
    room(int(rows[0]), prompts[rows[0]], settings)
    limit = settings.max_length or settings.max_new_tokens + int(tokens.max())
    lengths = np.minimum(tokens[rows] + settings.max_new_tokens, limit)
    return shard.of(rows.tolist(), lengths.tolist()), int(lengths.max())


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


class Client:
    """Sends requests to one server, whose `key` may be an empty text.

    `retries` are tries after the first one, `timeout` is in seconds for a reply, None where `watch`
    sees to it while it samples, and `remedy` says what to do where nothing answers.
    """

    def __init__(
        self, url: str, key: str, retries: int, timeout: float | None, remedy: str = ""
    ) -> None:
        self.url, self.key, self.remedy = url, key, remedy
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
                if attempt == self._retries or isinstance(error, ValueError):
                    raise self.wrong(
                        f"does not answer {path} after {attempt + 1} tries: {error}. {self.remedy}"
                    ) from None
        return answer

    def ask(self, key: str, path: str, body: Any = None, watched: bool = False) -> Any:
        """What stands under a key of the reply; SamplingFailed if there is no such reply."""
        answer = self.send(path, body, watched)
        if answer.status in (401, 403):
            raise self.wrong("refuses this run's key. Set VLLM_API_KEY to the server's own")
        if not answer.ok:
            raise self.wrong(f"refused {path} ({answer.status}): {self.words(answer)}")
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

    def wrong(self, problem: str) -> SamplingFailed:
        """What to raise, without the key."""
        return SamplingFailed(one_line(f"the vLLM server at {self.url} {problem}.", self.key))


#: A server that is ready: its client, the policy's name there, what watches over it.
Serving = tuple[Client, str, Callable[[], None]]


class EngineSampler:
    """Samples from the vLLM server that `_serving` has ready; see `CandidateSampler`."""

    make_room: Callable[[int], AbstractContextManager[Any]] = nullcontext
    #: Pairs of less than so many tokens that the policy has scored, and by how much an engine may
    #: find otherwise, in nats per square root of an answer's tokens.
    known: Callable[[int], Sequence[Known]] = staticmethod(lambda longest: ())
    tolerance: float = math.inf

    def __init__(self, name: str, vocabulary: int, shard: Shard, longest: int | None) -> None:
        self.report: dict[str, Any] = {"name": name}
        self.seconds: dict[str, float] = {}
        self.longest, self.shard, self.vocabulary = longest, shard, vocabulary

    def sample(
        self, prompts: Sequence[TokenIds], settings: SamplingSettings, skip: Collection[int] = ()
    ) -> Generator[Chunk, None, None]:
        """See `CandidateSampler.sample`. A chunk is some seconds' worth of finished prompts."""
        settings = settings.within(self.longest)
        mine, longest = plan(prompts, settings, skip, self.shard)
        if not longest:
            return
        with self.make_room(longest) as memory:
            if not mine:
                return
            with self._serving(longest, memory) as (client, name, watch):
                self._check_policy(client, name, longest)
                fields = sampling_fields(settings) | {"model": name}

                def ask(row: int) -> list[Candidate]:
                    asked = {"prompt": prompts[row].tolist(), "seed": settings.stream(row)}
                    limit = room(row, prompts[row], settings)
                    request = fields | asked | {"max_tokens": limit}
                    return client.candidates(row, request, settings, self.vocabulary)

                yield from _in_chunks(mine, ask, watch)

    def _check_policy(self, client: Client, name: str, longest: int) -> None:
        """Whether the policy that is served is the one that is trained; SamplingFailed if not."""
        known = self.known(longest)
        if not known:
            return
        difference = policy_difference(lambda one: client.logp(name, one), known)
        self.report["nats_per_root_token"] = round(difference, 6)
        if not difference <= self.tolerance:
            raise client.wrong(
                f"serves another policy than the one that is trained: on {len(known)} answers of "
                f"the dataset its log-probabilities differ by {difference:.3g} nats per square "
                f"root of a token (allowed: {self.tolerance:g}). Check that it has the same base "
                "model and sees the same adapter, or set sera.sampler to transformers"
            )

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
