"""Sampling from a running OpenAI-compatible vLLM: the adapter is loaded into it over HTTP."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from sera_plugin.algorithm.protocols import Chunk, SamplingSettings, TokenIds
from sera_plugin.rundir.ranks import WHOLE, Shard
from sera_plugin.sampling.child import PATIENCE
from sera_plugin.sampling.client import RETRIES, Client
from sera_plugin.sampling.prompts import SamplingFailed, longest_first, room

LOG = logging.getLogger("axolotl.sera")

#: Where the server's key is looked for; the variable that `vllm serve` itself reads.
API_KEY = "VLLM_API_KEY"
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
        self.client = Client(
            f"http://{host}:{port}",
            os.environ.get(API_KEY, "").strip(),
            RETRIES,
            "Start it (docs/sampling.md has the command), or set vllm.host and vllm.port to where "
            "it is",
            PATIENCE,
        )
        self.base_model = base_model
        self.adapter = adapter
        self.tokenize = tokenize
        self.special_tokens = special_tokens
        self.vocabulary = vocabulary
        self.shard = shard
        self.report: dict[str, Any] = {"name": "vllm-server"}
        self.seconds: dict[str, float] = {}
        self.longest = longest

    def check(self, longest: int = 0) -> int:
        """Whether this server can serve the run's policies; returns its context in tokens.

        Args:
            longest: most tokens of a prompt and its candidate together.

        Raises:
            SamplingFailed: naming what is wrong with it and how to start it right.
        """
        models = self.client.ask("data", "GET", "/v1/models")
        served = next((model for model in models if self._is_base(model)), None)
        if served is None:
            names = ", ".join(f"{model['id']} ({model.get('root')})" for model in models)
            raise self.client.wrong(
                f"serves {names}, but base_model is {self.base_model}. Start it with `vllm serve "
                f"{self.base_model}`; if it is the same model under another path, add "
                f"`--served-model-name {self.base_model}`"
            )
        text = _PROBE + "".join(self.special_tokens)
        theirs = self.client.ask(
            "tokens",
            "POST",
            "/tokenize",
            {"model": served["id"], "prompt": text, "add_special_tokens": False},
        )
        if theirs != self.tokenize(text):
            raise self.client.wrong(
                "has another tokenizer than this run: a test text gives other token ids. Start it "
                "with `--tokenizer` set to the tokenizer that the YAML names"
            )
        # An empty request is refused where adapters can be loaded, and unknown where not.
        if self.client.send("POST", "/v1/load_lora_adapter", {}).status_code == 404:
            raise self.client.wrong(
                "does not load adapters at run time. Start it with "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment and with `--enable-lora "
                "--max-lora-rank` of at least lora_r"
            )
        context = int(served["max_model_len"])
        if longest > context:
            raise self.client.wrong(
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
        self.report["version"] = self.client.version()
        with self._loaded_adapter() as name:
            yield from self.client.sample(name, prompts, limits, settings, self.vocabulary)

    @contextmanager
    def _loaded_adapter(self) -> Generator[str, None, None]:
        """The adapter in the server under a name that it has never seen, and out again."""
        client, name = self.client, f"sera-{uuid4().hex}"
        path = str(self.adapter.resolve())
        wanted = {"lora_name": name, "lora_path": path}
        answer = client.send("POST", "/v1/load_lora_adapter", wanted)
        if not answer.ok:
            raise client.wrong(
                f"did not load {path}: {client.words(answer)}. It must see this directory under "
                "the same path, and its `--max-lora-rank` must be at least lora_r"
            )
        try:
            yield name
        finally:
            try:
                answer = client.send("POST", "/v1/unload_lora_adapter", {"lora_name": name})
                if not answer.ok:
                    LOG.warning("%s", client.wrong(f"kept {name}: {client.words(answer)}"))
            except SamplingFailed as failure:
                LOG.warning("the adapter %s was not unloaded: %s", name, failure)

    def _is_base(self, model: Mapping[str, Any]) -> bool:
        names = (model["id"], model.get("root"))
        paths = [Path(name).resolve() for name in names if name and Path(name).is_dir()]
        return self.base_model in names or Path(self.base_model).resolve() in paths
