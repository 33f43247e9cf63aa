"""Sampling with a vLLM server that runs already: the adapter is loaded into it over HTTP."""

import logging
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from sera_plugin.rundir.ranks import WHOLE, Shard
from sera_plugin.sampling.answers import ServedModel
from sera_plugin.sampling.child import PATIENCE, SamplingFailed
from sera_plugin.sampling.client import RETRIES, Client
from sera_plugin.sampling.engine import EngineSampler, Serving
from sera_plugin.sampling.vllm import API_KEY

LOG = logging.getLogger("axolotl.sera")

#: Text whose tokens tell tokenizers apart.
_PROBE = "Hello, wörld!  1234567 你好 🙂\n\tdef f(x): return x"


class VllmServerSampler(EngineSampler):
    """Samples from a running `vllm serve`, to which the run's adapter directories look the same.

    `adapter` is theta_{t-1}'s directory, `tokenizer` training's, and `longest` the server's context
    as `check` has found it.
    """

    def __init__(
        self,
        host: str,
        port: int,
        base_model: str,
        adapter: Path,
        tokenizer: Any,
        vocabulary: int,
        shard: Shard = WHOLE,
        longest: int | None = None,
    ) -> None:
        super().__init__("vllm-server", vocabulary, shard, longest)
        # Nothing binds here: a server on all interfaces is asked through loopback.
        host = "127.0.0.1" if host == "0.0.0.0" else host
        self.client = Client(
            f"http://{host}:{port}",
            os.environ.get(API_KEY, "").strip(),
            RETRIES,
            PATIENCE,
            "Start it (docs/sampling.md has the command), or set vllm.host and vllm.port to where "
            "it is",
        )
        self.base_model, self.adapter, self.tokenizer = base_model, adapter, tokenizer

    def check(self, longest: int = 0) -> int:
        """The server's context in tokens; SamplingFailed says why it cannot serve this run.

        `longest` is the most tokens of a prompt and its candidate together.
        """
        client = self.client
        models = client.models()
        served = next((model for model in models if self._is_base(model)), None)
        if served is None or served.max_model_len is None:
            names = ", ".join(f"{model.id} ({model.root})" for model in models)
            raise client.wrong(
                f"serves {names}, but base_model is {self.base_model}. Start it with `vllm serve "
                f"{self.base_model}`; if it is the same model under another path, add "
                f"`--served-model-name {self.base_model}`"
            )
        text = _PROBE + "".join(self.tokenizer.all_special_tokens)
        request = {"model": served.id, "prompt": text, "add_special_tokens": False}
        mine = self.tokenizer(text, add_special_tokens=False)["input_ids"]
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
        """The adapter in the server under a name that it has never seen, and out again."""
        self.check(length)
        client, name = self.client, f"sera-{uuid4().hex}"
        self.report["version"] = client.version()
        path = str(self.adapter.resolve())
        answer = client.send("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})
        if not answer.ok:
            raise client.wrong(
                f"did not load {path}: {client.words(answer)}. It must see this "
                "directory under the same path, and its `--max-lora-rank` must be at least lora_r"
            )
        try:
            yield client, name, lambda: None
        finally:
            try:
                answer = client.send("/v1/unload_lora_adapter", {"lora_name": name})
                if not answer.ok:
                    raise client.wrong(f"kept {name}: {client.words(answer)}")
            except SamplingFailed as failure:
                LOG.warning("the adapter %s was not unloaded: %s", name, failure)

    def _is_base(self, model: ServedModel) -> bool:
        names = (model.id, model.root)
        paths = [Path(name).resolve() for name in names if name and os.path.isdir(name)]
        return self.base_model in names or Path(self.base_model).resolve() in paths
