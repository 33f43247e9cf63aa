"""The HTTP client of a vLLM server: token ids in, token ids out."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from time import monotonic
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from sera_plugin.algorithm.protocols import Candidate, Chunk, SamplingSettings, TokenIds
from sera_plugin.config.quoting import printable, without_credentials, without_secret
from sera_plugin.sampling.answers import read_candidates
from sera_plugin.sampling.prompts import SamplingFailed

#: Tries after a lost connection or an overloaded answer. urllib3 makes the first of them at once,
#: the others after twice the seconds, four times, ...: about a minute in all.
RETRIES, BACKOFF = 6, 1.0
#: Prompts that are sampled at a time.
IN_FLIGHT = 128
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


class Client:
    """Sends requests to one server.

    Args:
        url: where it listens.
        key: its API key, or an empty text.
        retries: tries after the first one.
        remedy: what to do where nothing answers there.
        timeout: seconds to wait for a reply, None where `watch` sees to it.
    """

    def __init__(
        self, url: str, key: str, retries: int, remedy: str, timeout: float | None
    ) -> None:
        self.url = url
        self._key = key
        self._retries = retries
        self._remedy = remedy
        self._timeout = timeout
        retry = Retry(
            total=retries,
            backoff_factor=BACKOFF,
            status_forcelist=(429, 502, 503, 504),
            allowed_methods=None,  # sampling is seeded: asking twice gives the same
            raise_on_status=False,
        )
        self._session = requests.Session()
        self._session.trust_env = False  # a proxy does not know this machine
        self._session.mount("http://", HTTPAdapter(pool_maxsize=IN_FLIGHT, max_retries=retry))
        self._once = requests.Session()  # without tries, each of which urllib3 warns of
        self._once.trust_env = False
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

        Args:
            model: the name under which the policy is served.
            prompts: token ids of all rows.
            limits: most tokens to sample by row, in the order to take the rows in.
            settings: how to sample.
            vocabulary: number of token ids that the model knows.
            watch: called at least every second; may raise.

        Raises:
            SamplingFailed: if the server does not answer, or wrongly.
        """
        fields = sampling_fields(settings) | {"model": model}
        waiting = iter(limits.items())
        running: dict[Future[list[Candidate]], int] = {}
        chunk: Chunk = []
        until = monotonic() + CHUNK_SECONDS
        pool = ThreadPoolExecutor(IN_FLIGHT)

        def ask(row: int, limit: int) -> list[Candidate]:
            request = {
                "prompt": prompts[row].tolist(),
                "max_tokens": limit,
                "seed": settings.stream(row),
            }
            choices = self.ask("choices", "POST", "/v1/completions", fields | request)
            try:
                return read_candidates(choices, settings, limit, vocabulary)
            except ValueError as error:
                raise self.wrong(
                    f"answers the prompt of row {row} wrongly: {error}. Nothing of it is stored. "
                    "Use a vLLM that docs/sampling.md lists"
                ) from None

        try:
            while True:
                while len(running) < IN_FLIGHT and (job := next(waiting, None)) is not None:
                    running[pool.submit(ask, *job)] = job[0]
                if chunk and (len(chunk) >= CHUNK_PROMPTS or monotonic() > until or not running):
                    yield chunk
                    chunk, until = [], monotonic() + CHUNK_SECONDS
                if not running:
                    return
                finished, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
                watch()
                chunk += [(running.pop(future), future.result()) for future in finished]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def version(self) -> str:
        """Of vLLM, as the server gives it."""
        return self.shown(self.ask("version", "GET", "/version"))

    def answers(self, path: str) -> str | None:
        """What a path gives, None where nothing answers within some seconds; tried once."""
        try:
            answer = self._once.get(self.url + path, timeout=5)
        except requests.RequestException:
            return None
        return answer.text if answer.ok else None

    def send(self, method: str, path: str, body: Any = None) -> requests.Response:
        """The reply, whatever its status.

        Raises:
            SamplingFailed: if there is none.
        """
        try:
            return self._session.request(
                method, self.url + path, json=body, timeout=(10, self._timeout)
            )
        except requests.RequestException as error:
            raise self.wrong(
                f"does not answer {path} after {self._retries + 1} tries: {error}. {self._remedy}"
            ) from None

    def ask(self, key: str, method: str, path: str, body: Any = None) -> Any:
        """What stands under a key of the reply.

        Raises:
            SamplingFailed: if there is no such reply.
        """
        answer = self.send(method, path, body)
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

    def wrong(self, problem: str) -> SamplingFailed:
        """What to raise, without the key."""
        return SamplingFailed(self.shown(f"the vLLM server at {self.url} {problem}."))

    def words(self, answer: requests.Response) -> str:
        """The server's own words, cut to a readable length."""
        try:
            error = answer.json()["error"]
            text = error["message"] if isinstance(error, dict) else error
        except (ValueError, KeyError, TypeError):
            text = answer.text
        return self.shown(text)[:400]

    def shown(self, text: object) -> str:
        """In one line, without the key: a server may send back what it was sent."""
        line = printable(" ".join(str(text).split()))
        return without_secret(without_credentials(line), self._key)
