"""The samplers of one run, made from the host's configuration."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sera_plugin.algorithm.protocols import CandidateSampler
from sera_plugin.config.sera import SeraConfig
from sera_plugin.model.budget import plan_tokens
from sera_plugin.model.memory import SAMPLED_ON_CPU
from sera_plugin.model.scoring import PolicyScorer
from sera_plugin.rundir.checksums import damage
from sera_plugin.rundir.ranks import NO_PART, WHOLE
from sera_plugin.rundir.store import RunStore
from sera_plugin.sampling.choose import SAMPLERS, Choice, adapter_problem, choose_sampler
from sera_plugin.sampling.offload import cache_bytes_per_token, engine_needs, make_room
from sera_plugin.sampling.transformers import TransformersSampler
from sera_plugin.sampling.vllm import ServedPolicy, VllmSampler, VllmServerSampler

LOG = logging.getLogger("axolotl.sera")


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

        Raises:
            ValueError: if the sampler that the configuration names cannot run, or has no room for
                that prompt.
            SamplingFailed: if a server is named and cannot serve this run.
        """
        ranks = self.store.ranks
        choice = Choice("transformers", "as rank 0 has chosen")
        if ranks.main:
            choice = choose_sampler(self.config.sampler, self._python, self._unserved())
            if choice.fell_back:
                LOG.warning(
                    "sera.sampler: %s is not used. Samples come from transformers, %s",
                    self.config.sampler,
                    choice.reason,
                )
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
        # All ranks sample alike, whatever their own environments could do.
        mine = SAMPLERS.index(choice.name) if ranks.main else 0
        name = SAMPLERS[int(ranks.sum(np.array([mine], float))[0])]
        if name == "vllm":
            ranks.engine_shard(self._vllm_options.get("tensor_parallel_size") or 1)
        self.choice = replace(choice, name=name)
        return self.choice

    def make(self, iteration: int, optimizer: Any) -> CandidateSampler:
        """The chosen sampler for theta_{t-1}, t being the 1-based iteration.

        The optimizer's state may wait in host memory while an engine samples.
        """
        policies, ranks = self.scorer.policies, self.store.ranks
        if self.choice.name == "vllm-server":
            return self._server(self.store.policy(iteration))
        if self.choice.name == "transformers":
            return TransformersSampler(
                policies.model,
                self.scorer.pad_id,
                plan_tokens(
                    next(policies.model.parameters()).device,
                    bytes_per_token=cache_bytes_per_token(policies.model, element_size=4),
                    longest=int(self.cfg["sequence_len"] or 0),
                    on_cpu=SAMPLED_ON_CPU,
                ),
                self.scorer.autocast,
                self.scorer.shard,
                partial(policies.at, iteration - 1),
            )
        served, options = self._served(iteration), self._vllm_options

        def room(length: int) -> Any:
            size = 4 if served.dtype == "float32" else 2
            needs = engine_needs(policies.model, length, size)
            return make_room(policies.model, optimizer, needs, options, ranks)

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
        names = ["gpu_memory_utilization", "tensor_parallel_size", "dtype", "max_model_len"]
        names += ["enforce_eager", "enable_prefix_caching"]
        return {name: block[name] for name in names if block.get(name) not in (None, "auto")}

    @property
    def _vocabulary(self) -> int:
        return int(self.scorer.policies.model.get_input_embeddings().weight.shape[0])

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
        loading: dict[str, Any] = {}
        if cfg.get("trust_remote_code"):
            loading["trust_remote_code"] = True
        dtype = self._vllm_options.get("dtype") or str(cfg["torch_dtype"]).split(".")[-1]
        if not policies.is_adapter and iteration > 1:
            return ServedPolicy(directory, None, 0, dtype, None, loading, self._vocabulary)
        # Of a base model that is fully fine-tuned theta_0 is the base model itself.
        if cfg.get("revision_of_model"):
            loading["revision"] = cfg["revision_of_model"]
        if cfg.get("overrides_of_model_config"):
            loading["hf_overrides"] = dict(cfg["overrides_of_model_config"])
        quantized = None
        if cfg.get("load_in_4bit"):
            kwargs = cfg.get("bnb_config_kwargs") or {}
            quantized = kwargs.get("bnb_4bit_quant_type", "nf4")
        elif cfg.get("load_in_8bit"):
            quantized = "8-bit"
        adapter, rank = None, 0
        if policies.is_adapter:
            adapter, rank = directory, policies.model.peft_config[policies.model.active_adapter].r
        base = str(cfg["base_model"])
        return ServedPolicy(base, adapter, rank, dtype, quantized, loading, self._vocabulary)

    def _server(self, adapter: Path) -> VllmServerSampler:
        block = self.cfg.get("vllm") or {}
        return VllmServerSampler(
            host=block.get("host") or "127.0.0.1",
            port=block.get("port") or 8000,
            base_model=str(self.cfg["base_model"]),
            adapter=adapter,
            tokenize=lambda text: self.tokenizer(text, add_special_tokens=False)["input_ids"],
            special_tokens=self.tokenizer.all_special_tokens,
            vocabulary=self._vocabulary,
            # One client keeps a server busy, and it then holds one adapter.
            shard=WHOLE if self.store.ranks.main else NO_PART,
            longest=self._context,
        )
