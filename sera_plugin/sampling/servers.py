"""Sampling with vLLM servers that run already: the adapter is loaded into them over HTTP."""

import logging
import os
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from sera_plugin.rundir.ranks import WHOLE, Shard
from sera_plugin.sampling.answers import ServedModel
from sera_plugin.sampling.child import PATIENCE, SamplingFailed
from sera_plugin.sampling.client import RETRIES, Client, ServerLost, broken
from sera_plugin.sampling.engine import EngineSampler, Serving, with_each
from sera_plugin.sampling.vllm import API_KEY

LOG = logging.getLogger("axolotl.sera")

_PROBE = "Hello, wörld!  1234567 你好 🙂\n\tdef f(x): return x"

#: What vLLM 0.30 says of an adapter that it has.
_LOADED = "has already been loaded"


class VllmServerSampler(EngineSampler):
    """Samples from running `vllm serve`, to which the run's adapter directories look the same.

    `urls` say where they are, and the configuration's keys in `named` say that. `adapter` is
    theta_{t-1}'s directory, `tokenizer` training's, and `longest` the servers' context as `check`
    has found it.
    """

    def __init__(
        self,
        urls: Sequence[str],
        named: str,
        base_model: str,
        adapter: Path,
        tokenizer: Any,
        vocabulary: int,
        shard: Shard = WHOLE,
        longest: int | None = None,
    ) -> None:
        super().__init__("vllm-server", vocabulary, shard, longest)
        self.urls, self.named = urls, named
        self.base_model, self.adapter, self.tokenizer = base_model, adapter, tokenizer

    def check(self, longest: int = 0) -> int:
        """The least context of the servers, in tokens.

        `longest` is the most tokens of a prompt and its candidate together.

        Raises:
            SamplingFailed: if one of them is not there, or cannot serve this run, and why.
        """
        probe = self._probe()
        # Together, so that of several that are gone each is waited for no longer than of one.
        with ThreadPoolExecutor(len(self.urls)) as pool:
            return min(pool.map(lambda one: self._check(one, longest, probe), self._clients()))

    def _clients(self) -> list[Client]:
        key = os.environ.get(API_KEY, "").strip()
        return [Client(url, key, RETRIES, PATIENCE, self.named) for url in self.urls]

    def _probe(self) -> tuple[str, list[int]]:
        """Text whose tokens tell tokenizers apart, and training's tokens of it."""
        text = _PROBE + "".join(self.tokenizer.all_special_tokens)
        return text, self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _check(self, client: Client, longest: int, probe: tuple[str, list[int]]) -> int:
        models = client.models()
        served = next((model for model in models if self._is_base(model)), None)
        if served is None or served.max_model_len is None:
            names = ", ".join(f"{model.id} ({model.root})" for model in models)
            raise client.wrong(
                f"serves {names}, but base_model is {self.base_model}. Start it with `vllm serve "
                f"{self.base_model}`; if it is the same model under another path, add "
                f"`--served-model-name {self.base_model}`"
            )
        text, mine = probe
        request = {"model": served.id, "prompt": text, "add_special_tokens": False}
        if client.ask("tokens", "/tokenize", request) != mine:
            raise client.wrong(
                "has another tokenizer than this run: a test text gives other token ids. Start it "
                "with `--tokenizer` set to the tokenizer that the YAML names"
            )
        # An empty request is refused where adapters can be loaded, and unknown where not.
        if client.send("/v1/load_lora_adapter", {}).status == 404:
            raise client.wrong(
                "does not load adapters at run time. Start it with "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment and with `--enable-lora "
                "--max-lora-rank` of at least lora_r"
            )
        context = served.max_model_len
        if longest > context:
            raise client.wrong(
                f"has a context of {context} tokens, but prompt and candidate need up to "
                f"{longest}. Start it with `--max-model-len {longest}` or more, or lower "
                "sera.max_new_tokens or sequence_len"
            )
        return context

    @contextmanager
    def _serving(self, length: int, memory: None) -> Generator[Serving, None, None]:
        """The adapter in all servers under a name that they have never seen, and out again."""
        name, path = f"sera-{uuid4().hex}", str(self.adapter.resolve())
        clients, probe = self._clients(), self._probe()
        loaded: list[Client] = []

        def load(client: Client) -> str:
            self._check(client, length, probe)
            found = client.version()
            answer = client.send("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})
            # The name is new: it has heard a first try whose answer was lost.
            if not answer.ok and _LOADED not in client.words(answer):
                raise client.wrong(
                    f"did not load {path}: {client.words(answer)}. It must see this "
                    "directory under the same path, and its `--max-lora-rank` must be at least "
                    "lora_r",
                    ServerLost if broken(answer) else SamplingFailed,
                )
            loaded.append(client)
            return found

        try:
            versions = with_each(clients, load)
            self.report["version"] = ", ".join(sorted(set(versions.values())))
            yield list(versions), name, lambda: None
        finally:
            self.report["servers"] = {one.shown: self.answered[one] for one in clients}
            for client in loaded:
                if not client.lost:
                    _unload(client, name)

    def _is_base(self, model: ServedModel) -> bool:
        names = (model.id, model.root)
        paths = [Path(name).resolve() for name in names if name and os.path.isdir(name)]
        return self.base_model in names or Path(self.base_model).resolve() in paths


def _unload(client: Client, name: str) -> None:
    try:
        answer = client.send("/v1/unload_lora_adapter", {"lora_name": name})
        if not answer.ok:
            raise client.wrong(f"kept {name}: {client.words(answer)}")
    except SamplingFailed as failure:
        LOG.warning("the adapter %s was not unloaded: %s", name, failure)
