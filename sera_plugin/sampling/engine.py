"""Candidates from vLLM servers that are ready: what is asked of which one, in chunks."""

import logging
import math
from collections import Counter, deque
from collections.abc import Callable, Collection, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, closing, nullcontext
from time import monotonic
from typing import Any, TypeVar

import numpy as np

from sera_plugin.algorithm.method import Candidate, Chunk, SamplingSettings, TokenIds
from sera_plugin.rundir.ranks import Shard
from sera_plugin.rundir.tokens import lengths_of
from sera_plugin.sampling.answers import Known, policy_difference
from sera_plugin.sampling.client import IN_FLIGHT, Client, ServerLost
from sera_plugin.sampling.http import started

LOG = logging.getLogger("axolotl.sera")

#: A chunk is handed over when it has this many prompts, or is this many seconds old, which is what
#: a crash may lose. A million prompts in small chunks make too many files.
CHUNK_PROMPTS, CHUNK_SECONDS = 256, 5.0

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


#: Servers that are ready: their clients, the policy's name there, what watches over them.
Serving = tuple[Sequence[Client], str, Callable[[], None]]


class EngineSampler:
    """Samples from the vLLM servers that `_serving` has ready; see `CandidateSampler`."""

    make_room: Callable[[int], AbstractContextManager[Any]] = nullcontext
    #: Pairs of less than so many tokens that the policy has scored, and by how much an engine may
    #: find otherwise, in nats per square root of an answer's tokens.
    known: Callable[[int], Sequence[Known]] = staticmethod(lambda longest: ())
    tolerance: float = math.inf

    def __init__(self, name: str, vocabulary: int, shard: Shard, longest: int | None) -> None:
        self.report: dict[str, Any] = {"name": name}
        self.seconds: dict[str, float] = {}
        self.longest, self.shard, self.vocabulary = longest, shard, vocabulary
        #: Prompts that each server has answered.
        self.answered: Counter[Client] = Counter()

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
            self.answered.clear()
            with self._serving(longest, memory) as (clients, name, watch):
                clients = self._check_policy(clients, name, longest)
                fields = sampling_fields(settings) | {"model": name}

                def ask(client: Client, row: int) -> list[Candidate]:
                    asked = {"prompt": prompts[row].tolist(), "seed": settings.stream(row)}
                    limit = room(row, prompts[row], settings)
                    request = fields | asked | {"max_tokens": limit}
                    return client.candidates(row, request, settings, self.vocabulary)

                yield from _in_chunks(share_out(mine, clients, ask, self.answered), watch)

    def _check_policy(self, clients: Sequence[Client], name: str, longest: int) -> Sequence[Client]:
        """Those that serve the policy that is trained; SamplingFailed where one serves another."""
        if not (known := self.known(longest)):
            return clients

        def check(client: Client) -> float:
            difference = policy_difference(lambda one: client.logp(name, one), known)
            if not difference <= self.tolerance:
                raise client.wrong(
                    f"serves another policy than the one that is trained: on {len(known)} answers "
                    f"of the dataset its log-probabilities differ by {difference:.3g} nats per "
                    f"square root of a token (allowed: {self.tolerance:g}). Check that it has the "
                    "same base model and sees the same adapter, or set sera.sampler to "
                    "transformers"
                )
            return difference

        found = with_each(clients, check)
        self.report["nats_per_root_token"] = round(max(found.values()), 6)
        return list(found)

    def _serving(self, length: int, memory: Any) -> AbstractContextManager[Serving]:
        raise NotImplementedError


def with_each(clients: Sequence[Client], ask: Callable[[Client], Result]) -> dict[Client, Result]:
    """What each server gives, all being asked at once, without those that are lost over it.

    SamplingFailed from one that is wrong; ServerLost if none is left.
    """

    def attempt(client: Client) -> Result | ServerLost:
        try:
            return ask(client)
        except ServerLost as failure:
            return failure

    with ThreadPoolExecutor(len(clients)) as pool:
        found = dict(zip(clients, pool.map(attempt, clients), strict=True))
    given = {one: got for one, got in found.items() if not isinstance(got, ServerLost)}
    if not given:
        raise ServerLost(" ".join(map(str, found.values())))
    for client, failure in found.items():
        if isinstance(failure, ServerLost):
            _go_on_without(client, failure, len(given))
    return given


def _go_on_without(client: Client, failure: ServerLost, left: int) -> None:
    """Give a server up; raises why, if it was the last."""
    client.lost = True
    if not left:
        raise failure
    LOG.warning("SeRA: this phase goes on with %d other server(s), because %s", left, failure)


def share_out(
    rows: Sequence[int],
    clients: Sequence[Client],
    ask: Callable[[Client, int], list[Candidate]],
    answered: Counter[Client],
) -> Generator[Chunk, None, None]:
    """Yield the rows' candidates as servers finish them, every second at least; each row once.

    One queue: a server takes the next row when it has a place free, the least busy one first. What
    a lost server has not answered goes back to the head of the queue. Seeds are the rows' own, so
    it does not matter which server answers. `answered` counts who does.

    Raises:
        ServerLost: if no server is left.
        SamplingFailed: for a wrong answer.
    """
    left, waiting = list(clients), deque(rows)
    running: dict[Future[list[Candidate]], tuple[Client, int]] = {}
    busy: Counter[Client] = Counter()
    while waiting or running:
        while waiting and busy[client := min(left, key=busy.__getitem__)] < IN_FLIGHT:
            row = waiting.popleft()
            running[started(ask, client, row)] = client, row
            busy[client] += 1
        done: Chunk = []
        for future in wait(running, timeout=1.0, return_when=FIRST_COMPLETED).done:
            client, row = running[future]
            if client.lost:
                continue
            try:
                done.append((row, future.result()))
            except ServerLost as failure:
                left.remove(client)
                _go_on_without(client, failure, len(left))
                continue
            del running[future]
            busy[client] -= 1
            answered[client] += 1
        back = {future: row for future, (client, row) in running.items() if client.lost}
        for future in back:
            del running[future]
        waiting.extendleft(reversed(back.values()))
        yield done


def _in_chunks(
    found: Generator[Chunk, None, None], watch: Callable[[], None]
) -> Generator[Chunk, None, None]:
    """Chunks of what is found; `watch` is called whenever there may be some, and may raise."""
    chunk: Chunk = []
    until = monotonic() + CHUNK_SECONDS
    with closing(found):
        for finished in found:
            watch()
            chunk += finished
            if chunk and (len(chunk) >= CHUNK_PROMPTS or monotonic() > until):
                yield chunk
                chunk, until = [], monotonic() + CHUNK_SECONDS
        if chunk:
            yield chunk
