"""Candidates from a vLLM server that is ready: what is asked, in which order, and in chunks."""

import math
from collections.abc import Callable, Collection, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from time import monotonic
from typing import Any

from sera_plugin.algorithm.method import Candidate, Chunk, SamplingSettings, TokenIds
from sera_plugin.rundir.ranks import Shard
from sera_plugin.sampling.answers import Known, policy_difference
from sera_plugin.sampling.client import IN_FLIGHT, Client, in_threads

#: A chunk is handed over when it has this many prompts, or is this many seconds old.
CHUNK_PROMPTS, CHUNK_SECONDS = 64, 5.0


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
                self._check_policy(client, name, max(lengths))
                fields = sampling_fields(settings) | {"model": name}

                def ask(row: int) -> list[Candidate]:
                    asked = {"prompt": prompts[row].tolist(), "seed": settings.stream(row)}
                    request = fields | asked | {"max_tokens": limits[row]}
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
