"""Which sampler a run takes and why; the samplers of one run, from the host's configuration."""

import logging
import math
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np

from sera_plugin.algorithm.method import CandidateSampler, Chunk
from sera_plugin.algorithm.pairs import Pairs
from sera_plugin.config.sera import SeraConfig
from sera_plugin.model.losses import LOW_PRECISION_LIMIT
from sera_plugin.model.memory import element_size, optimizer_name, sampled_batches
from sera_plugin.model.parts import whole_shape
from sera_plugin.model.scoring import PolicyScorer
from sera_plugin.rundir.checksums import damage
from sera_plugin.rundir.progress import progress
from sera_plugin.rundir.ranks import NO_PART, WHOLE
from sera_plugin.rundir.store import RunStore
from sera_plugin.sampling.answers import known_pairs
from sera_plugin.sampling.child import find_vllm
from sera_plugin.sampling.engine import EngineSampler
from sera_plugin.sampling.offload import make_room
from sera_plugin.sampling.servers import VllmServerSampler
from sera_plugin.sampling.transformers import TransformersSampler
from sera_plugin.sampling.vllm import (
    ServedPolicy,
    VllmSampler,
    adapter_problem,
)

LOG = logging.getLogger("axolotl.sera")

_SAMPLERS = ("transformers", "vllm", "vllm-server")
#: What the host's `vllm:` block has for an engine.
_OPTIONS = (
    "gpu_memory_utilization", "tensor_parallel_size", "dtype", "max_model_len", "enforce_eager",
    "enable_prefix_caching",
)  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """A sampler as in `sera.sampler`, and why."""

    name: str
    reason: str


def choose_sampler(asked: str, python: str, problem: str | None) -> Choice:
    """Decide between `sera.sampler` as `asked`, an interpreter's vLLM, and what vLLM cannot serve.

    ValueError if vLLM is asked for by name and its interpreter does not import it.
    """
    if asked == "transformers":
        return Choice(asked, "in the training process, as sera.sampler says")
    if problem:
        return Choice("transformers", f"in the training process: {problem}")
    if asked == "vllm-server":
        return Choice(asked, "`vllm serve` that runs already, as sera.sampler says")
    try:
        version = find_vllm(python)
    except RuntimeError as error:
        if asked == "vllm":
            raise ValueError(
                f"sera.sampler: vllm, but {error}. Set sera.vllm_python to the Python of an "
                "environment that has vLLM (docs/sampling.md says how to make one), or set "
                "sera.sampler to auto or transformers."
            ) from None
        return Choice("transformers", f"in the training process: {error}")
    return Choice("vllm", f"{version}, found in {python}; starts for each sampling phase")


def require_vllm(config: SeraConfig) -> None:
    """ValueError where `sera.sampler: vllm` will be needed and its interpreter does not import it.

    Asks nothing of a model, so it can be called before one is loaded.
    """
    if config.sampler == "vllm" and config.bootstrap_ratio > 0:
        choose_sampler("vllm", config.vllm_python or sys.executable, None)


@dataclass
class Samplers:
    """Chooses a sampler once, and makes one for each iteration.

    `cfg` and `tokenizer` are the host's, `config` is the `sera:` block, `scorer` has the policies.
    """

    cfg: Mapping[str, Any]
    config: SeraConfig
    store: RunStore
    scorer: PolicyScorer
    tokenizer: Any
    choice: Choice = field(default=Choice("transformers", "nothing is sampled"), init=False)
    #: Of a server, as rank 0 has found it when the sampler was chosen.
    _context: int | None = field(default=None, init=False)

    def choose(self, longest: int) -> Choice:
        """Which sampler the run takes; the same on every rank. `longest`: of a prompt, in tokens.

        ValueError if the sampler that the configuration names cannot run, or has no room for that
        prompt; SamplingFailed if a server is named that cannot serve this run.
        """
        ranks = self.store.ranks
        choice = Choice("transformers", "as rank 0 has chosen")
        if ranks.main:
            asked = self.config.sampler
            choice = choose_sampler(asked, self._python, self._unserved())
            if asked not in ("auto", choice.name):
                said = "sera.sampler: %s is not used. Samples come from transformers, %s"
                LOG.warning(said, asked, choice.reason)
            if choice.name == "vllm-server":
                whole = longest + self.config.max_new_tokens
                most = self.cfg["sequence_len"] or whole
                self._context = self._server(self.store.policy(2)).check(min(whole, most))
            context = self._vllm_options.get("max_model_len")
            if choice.name == "vllm" and context is not None and longest >= context:
                raise ValueError(
                    f"vllm.max_model_len: {context} leaves no room to sample after the longest "
                    f"prompt, which has {longest} tokens. Raise it, or leave it out."
                )
        # All ranks sample alike, whatever their own environments could do: theirs is number 0.
        name = _SAMPLERS[int(ranks.sum(np.array([_SAMPLERS.index(choice.name)], float))[0])]
        if name == "vllm":
            self._require_everywhere()
            ranks.engine_shard(self._vllm_options.get("tensor_parallel_size") or 1)
        self.choice = replace(choice, name=name)
        return self.choice

    def _require_everywhere(self) -> None:
        """Each machine has a vLLM, where rank 0 has found one; a ValueError on all ranks if not."""
        ranks, problem = self.store.ranks, ""
        if len(ranks.machines) == 1:
            return
        if ranks.rank == ranks.first and not ranks.main:
            try:
                find_vllm(self._python)
            except RuntimeError as error:
                problem = f"on {socket.gethostname()} {error}"
        problems = [one for one in ranks.words(problem) if one]
        if problems:
            raise ValueError(
                f"vLLM samples on rank 0's machine, but {problems[0]}. Have it there too "
                "(sera.vllm_python), or set sera.sampler: transformers."
            )

    def make(self, iteration: int, optimizer: Any, pairs: Pairs, nats: float) -> CandidateSampler:
        """The chosen sampler for theta_{t-1}, t being the 1-based iteration.

        The optimizer's state may wait in host memory while an engine samples. An engine is asked
        for log-probabilities of some offline `pairs` first. They may differ from iteration t's by
        `nats` per square root of an answer's tokens, or by what another precision makes of them.
        """
        sampler = self._sampler(iteration, optimizer)
        if isinstance(sampler, EngineSampler):
            exact = isinstance(sampler, VllmSampler) and sampler.policy.dtype == "float32"
            sampler.tolerance = nats if exact else max(nats, LOW_PRECISION_LIMIT)
            if self.cfg.get("load_in_8bit") or self.cfg.get("load_in_4bit"):
                sampler.tolerance = math.inf  # until the engine has the same 4 bits
            sampler.known = lambda longest: known_pairs(
                pairs, self.store.read(iteration, "offline"), longest
            )
        return sampler

    def _sampler(self, iteration: int, optimizer: Any) -> CandidateSampler:
        policies, ranks = self.scorer.policies, self.store.ranks
        model, device = policies.model, self.scorer.budget.device
        if self.choice.name == "vllm-server":
            return self._server(self.store.policy(iteration))
        if self.choice.name == "transformers":
            policy, scorer = partial(policies.at, iteration - 1), self.scorer
            name = optimizer_name(self.cfg)
            longest = int(self.cfg["sequence_len"] or 0)
            with scorer.autocast():
                width = element_size(model, device)
            batches = sampled_batches(model, device, width, longest, name)
            return TransformersSampler(
                model,
                scorer.pad_id,
                batches.tokens,
                scorer.autocast,
                scorer.shard,
                policy,
                device,
                batches.size,
            )
        served, options = self._served(iteration), self._vllm_options
        size = 4 if served.dtype == "float32" else 2
        room = partial(make_room, model, device, optimizer, size, options, ranks)
        name = f"vllm-{ranks.rank}.log" if ranks.world > 1 else "vllm.log"
        log = self.store.iteration(iteration) / name
        shard = ranks.engine_shard(options.get("tensor_parallel_size") or 1)
        return VllmSampler(self._python, served, options, log, room, shard)

    @property
    def _python(self) -> str:
        return self.config.vllm_python or sys.executable

    @property
    def _vllm_options(self) -> dict[str, Any]:
        """The host's `vllm:` block as vLLM's engine takes it, unset keys left out."""
        block = self.cfg.get("vllm") or {}
        return {name: block[name] for name in _OPTIONS if block.get(name) not in (None, "auto")}

    @property
    def _vocabulary(self) -> int:
        return whole_shape(self.scorer.policies.model.get_input_embeddings().weight)[0]

    def _unserved(self) -> str | None:
        """Why vLLM would not serve this kind of policy, or None."""
        model = self.scorer.policies.model
        adapter, config = self.scorer.policies.is_adapter, self.config
        if not adapter and config.first_iteration > 1:
            return None  # whole weights of its own
        base = type(model.config).from_pretrained(
            str(self.cfg["base_model"]), revision=self.cfg.get("revision_of_model") or "main"
        )
        if self._vocabulary != base.get_text_config().vocab_size:
            return "the policy stands on a model whose vocabulary was resized after loading"
        if not adapter:
            return None
        return adapter_problem(model.peft_config[model.active_adapter].to_dict())

    def _served(self, iteration: int) -> ServedPolicy:
        path = self.store.policy(iteration)
        if (problem := damage(path)) is not None:
            raise ValueError(
                f"{path} would be served, but {problem}. Restore it from a "
                "copy, or continue from an earlier checkpoint (resume_from_checkpoint)."
            )
        cfg, policies, directory = self.cfg, self.scorer.policies, str(path.resolve())
        dtype = self._vllm_options.get("dtype") or str(cfg["torch_dtype"]).split(".")[-1]
        keys = {"trust_remote_code": "trust_remote_code"}
        if not policies.is_adapter and iteration > 1:
            model, quantized = directory, None
        else:  # of a base model that is fully fine-tuned theta_0 is the base model itself
            model, quantized = str(cfg["base_model"]), "8-bit" if cfg.get("load_in_8bit") else None
            if cfg.get("load_in_4bit"):
                kwargs = cfg.get("bnb_config_kwargs") or {}
                quantized = kwargs.get("bnb_4bit_quant_type", "nf4")
            keys |= {"revision": "revision_of_model", "hf_overrides": "overrides_of_model_config"}
        loading = {name: cfg[key] for name, key in keys.items() if cfg.get(key)}
        adapter, rank = None, 0
        if policies.is_adapter:
            adapter, rank = directory, policies.model.peft_config[policies.model.active_adapter].r
        return ServedPolicy(model, adapter, rank, dtype, quantized, loading, self._vocabulary)

    def _server(self, adapter: Path) -> VllmServerSampler:
        urls, named = self.config.servers, "sera.servers"
        if not urls:
            block, named = self.cfg.get("vllm") or {}, "vllm.host and vllm.port"
            host = block.get("host") or "127.0.0.1"
            # Nothing binds here: a server on all interfaces is asked through loopback.
            host = "127.0.0.1" if host == "0.0.0.0" else host
            urls = (f"http://{host}:{block.get('port') or 8000}",)
        return VllmServerSampler(
            urls,
            named,
            base_model=str(self.cfg["base_model"]),
            adapter=adapter,
            tokenizer=self.tokenizer,
            vocabulary=self._vocabulary,
            # One queue keeps every server busy, and each then holds one adapter.
            shard=WHOLE if self.store.ranks.main else NO_PART,
            longest=self._context,
        )


@contextmanager
def sampling_progress(total: int, phase: str, quiet: bool) -> Iterator[Callable[[Chunk], None]]:
    """Progress over prompts with samples and tokens per second: see `Progress`."""
    samples = tokens = 0
    began = monotonic()

    def take(chunk: Chunk) -> None:
        nonlocal samples, tokens
        samples += sum(len(found) for _, found in chunk)
        tokens += sum(len(one.token_ids) for _, found in chunk for one in found)
        spent = max(monotonic() - began, 1e-9)
        advance(len(chunk), f"{samples / spent:,.1f} samples/s, {tokens / spent:,.0f} tok/s")

    with progress(phase, total, "prompt", quiet) as advance:
        yield take
