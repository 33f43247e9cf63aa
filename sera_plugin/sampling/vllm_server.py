"""Sampling from a running OpenAI-compatible vLLM: the adapter is loaded into it over HTTP."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any
from uuid import uuid4

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from sera_plugin.algorithm.protocols import Candidate, Chunk, SamplingSettings, TokenIds
from sera_plugin.config.quoting import printable, without_credentials, without_secret
from sera_plugin.rundir.ranks import WHOLE, Shard
from sera_plugin.sampling.answers import read_candidates
from sera_plugin.sampling.child import PATIENCE
from sera_plugin.sampling.prompts import SamplingFailed, longest_first, room
from sera_plugin.sampling.vllm import sampling_fields

LOG = logging.getLogger("axolotl.sera")

#: Where the server's key is looked for; the variable that `vllm serve` itself reads.
API_KEY = "VLLM_API_KEY"
#: Tries after a lost connection or an overloaded answer. urllib3 makes the first of them at once,
#: the others after twice the seconds, four times, ...: about a minute in all.
RETRIES, BACKOFF = 6, 1.0
#: Prompts asked for at a time.
IN_FLIGHT = 64
#: Finished prompts are handed over at least so often.
_CHUNK_SECONDS = 5.0
#: Text whose tokens tell tokenizers apart.
_PROBE = "Hello, wörld!  1234567 你好 🙂\n\tdef f(x): return x"


class VllmServerSampler:
    """Samples from `vllm serve`.

    Args:
        host, port: where it listens; 0.0.0.0 is taken as this machine.
        base_model: the host's `base_model`.
        adapter: theta_{t-1}'s directory, which the server must see under the same path.
        tokenize: text to token ids without special tokens added, as training tokenizes.
        special_tokens: the tokenizer's special tokens.
        vocabulary: number of token ids that the model knows.
        shard: this process's part of the prompts.
        longest: its context in tokens, as `check` has found it, None where that is not known.
    """

    def __init__(
        self,
        host: str,
        port: int,
        base_model: str,
        adapter: Path,
        tokenize: Callable[[str], list[int]],
        special_tokens: Sequence[str],
        vocabulary: int,
        shard: Shard = WHOLE,
        longest: int | None = None,
    ) -> None:
        # Nothing binds here: a server on all interfaces is asked through loopback.
        host = "127.0.0.1" if host == "0.0.0.0" else host
        self.url = f"http://{host}:{port}"
        self.base_model = base_model
        self.adapter = adapter
        self.tokenize = tokenize
        self.special_tokens = special_tokens
        self.vocabulary = vocabulary
        self.shard = shard
        self.report: dict[str, Any] = {"name": "vllm-server"}
        self.seconds: dict[str, float] = {}
        self.longest = longest
        retry = Retry(
            total=RETRIES,
            backoff_factor=BACKOFF,
            status_forcelist=(429, 502, 503, 504),
            allowed_methods=None,  # sampling is seeded: asking twice gives the same
            raise_on_status=False,
        )
        self._session = requests.Session()
        self._session.trust_env = False  # a proxy does not know this machine
        self._session.mount("http://", HTTPAdapter(pool_maxsize=IN_FLIGHT, max_retries=retry))
        self._key = os.environ.get(API_KEY, "").strip()
        if self._key:
            self._session.headers["Authorization"] = f"Bearer {self._key}"

    def check(self, longest: int = 0) -> int:
        """Whether this server can serve the run's policies; returns its context in tokens.

        Args:
            longest: most tokens of a prompt and its candidate together.

        Raises:
            SamplingFailed: naming what is wrong with it and how to start it right.
        """
        models = self._ask("data", "GET", "/v1/models")
        served = next((model for model in models if self._is_base(model)), None)
        if served is None:
            names = ", ".join(f"{model['id']} ({model.get('root')})" for model in models)
            raise self._wrong(
                f"serves {names}, but base_model is {self.base_model}. Start it with `vllm serve "
                f"{self.base_model}`; if it is the same model under another path, add "
                f"`--served-model-name {self.base_model}`"
            )
        text = _PROBE + "".join(self.special_tokens)
        theirs = self._ask(
            "tokens",
            "POST",
            "/tokenize",
            {"model": served["id"], "prompt": text, "add_special_tokens": False},
        )
        if theirs != self.tokenize(text):
            raise self._wrong(
                "has another tokenizer than this run: a test text gives other token ids. Start it "
                "with `--tokenizer` set to the tokenizer that the YAML names"
            )
        # An empty request is refused where adapters can be loaded, and unknown where not.
        if self._send("POST", "/v1/load_lora_adapter", {}).status_code == 404:
            raise self._wrong(
                "does not load adapters at run time. Start it with "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment and with `--enable-lora "
                "--max-lora-rank` of at least lora_r"
            )
        context = int(served["max_model_len"])
        if longest > context:
            raise self._wrong(
                f"has a context of {context} tokens, but prompt and candidate need up to "
                f"{longest}. Start it with `--max-model-len {longest}` or more, or lower "
                "sera.max_new_tokens or sequence_len"
            )
        return context

    def sample(
        self,
        prompts: Sequence[TokenIds],
        settings: SamplingSettings,
        skip: Collection[int] = (),
    ) -> Generator[Chunk, None, None]:
        """See `CandidateSampler.sample`. A chunk is some seconds' worth of finished prompts.

        Raises:
            ValueError: for a prompt that leaves no room to sample.
            SamplingFailed: if the server cannot serve this policy, or its context is too short.
        """
        left = longest_first(prompts, skip)
        rows = self.shard.of(left, [len(prompts[row]) for row in left])
        if not rows:
            return
        limits = {row: room(row, prompts[row], settings) for row in rows}
        self.check(max(len(prompts[row]) + limits[row] for row in rows))
        self.report["version"] = self._shown(self._ask("version", "GET", "/version"))
        fields = sampling_fields(settings) | {"return_token_ids": True}
        with self._loaded_adapter() as name, ThreadPoolExecutor(IN_FLIGHT) as pool:
            waiting = iter(rows)
            running: dict[Future[list[Candidate]], int] = {}
            chunk: Chunk = []
            until = monotonic() + _CHUNK_SECONDS
            try:
                while True:
                    for row in waiting:
                        request = fields | {
                            "model": name,
                            "prompt": prompts[row].tolist(),
                            "max_tokens": limits[row],
                            "seed": settings.stream(row),
                        }
                        running[pool.submit(self._complete, row, request, settings)] = row
                        if len(running) == IN_FLIGHT:
                            break
                    if chunk and (len(chunk) >= IN_FLIGHT or monotonic() > until or not running):
                        yield chunk
                        chunk, until = [], monotonic() + _CHUNK_SECONDS
                    if not running:
                        return
                    finished, _ = wait(running, return_when=FIRST_COMPLETED)
                    chunk += [(running.pop(future), future.result()) for future in finished]
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _complete(
        self, row: int, request: Mapping[str, Any], settings: SamplingSettings
    ) -> list[Candidate]:
        choices = self._ask("choices", "POST", "/v1/completions", request)
        try:
            return read_candidates(choices, settings, request["max_tokens"], self.vocabulary)
        except ValueError as error:
            raise self._wrong(
                f"answers the prompt of row {row} wrongly: {error}. Nothing of it is stored. Use a "
                "vLLM that docs/sampling.md lists"
            ) from None

    @contextmanager
    def _loaded_adapter(self) -> Generator[str, None, None]:
        """The adapter in the server under a name that it has never seen, and out again."""
        name = f"sera-{uuid4().hex}"
        path = str(self.adapter.resolve())
        answer = self._send("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})
        if not answer.ok:
            raise self._wrong(
                f"did not load {path}: {self._words(answer)}. It must see this directory under the "
                "same path, and its `--max-lora-rank` must be at least lora_r"
            )
        try:
            yield name
        finally:
            try:
                answer = self._send("POST", "/v1/unload_lora_adapter", {"lora_name": name})
                if not answer.ok:
                    LOG.warning("%s", self._wrong(f"kept {name}: {self._words(answer)}"))
            except SamplingFailed as failure:
                LOG.warning("the adapter %s was not unloaded: %s", name, failure)

    def _is_base(self, model: Mapping[str, Any]) -> bool:
        names = (model["id"], model.get("root"))
        paths = [Path(name).resolve() for name in names if name and Path(name).is_dir()]
        return self.base_model in names or Path(self.base_model).resolve() in paths

    def _send(self, method: str, path: str, body: Any = None) -> requests.Response:
        try:
            return self._session.request(method, self.url + path, json=body, timeout=(10, PATIENCE))
        except requests.RequestException as error:
            raise self._wrong(
                f"does not answer {path} after {RETRIES + 1} tries: {error}. Start it "
                f"(docs/sampling.md has the command), or set vllm.host and vllm.port to where it is"
            ) from None

    def _ask(self, key: str, method: str, path: str, body: Any = None) -> Any:
        """What stands under a key of the reply."""
        answer = self._send(method, path, body)
        if answer.status_code in (401, 403):
            raise self._wrong(f"refuses this run's key. Set {API_KEY} to the server's own")
        if not answer.ok:
            raise self._wrong(f"refused {path} ({answer.status_code}): {self._words(answer)}")
        try:
            return answer.json()[key]
        except (ValueError, KeyError, TypeError):
            raise self._wrong(
                f"answers {path} as no vLLM does: {self._words(answer) or 'with nothing'}. Set "
                "vllm.host and vllm.port to where `vllm serve` runs"
            ) from None

    def _wrong(self, problem: str) -> SamplingFailed:
        return SamplingFailed(self._shown(f"the vLLM server at {self.url} {problem}."))

    def _words(self, answer: requests.Response) -> str:
        """The server's own words, cut to a readable length."""
        try:
            error = answer.json()["error"]
            text = error["message"] if isinstance(error, dict) else error
        except (ValueError, KeyError, TypeError):
            text = answer.text
        return self._shown(text)[:400]

    def _shown(self, text: object) -> str:
        """In one line, without the key: a server may send back what it was sent."""
        line = printable(" ".join(str(text).split()))
        return without_secret(without_credentials(line), self._key)
