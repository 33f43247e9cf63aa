"""The iterations of one run in order: what happens before, between and after the host's epochs.

Nothing here is private to the host; the trainer calls `open` once, and `begin` and `end` around
every epoch.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sera_plugin.iteration import (
    Method,
    Pairs,
    Phases,
    prepare_iteration,
    score_held_out,
)
from sera_plugin.offload import engine_needs, make_room
from sera_plugin.ranks import NO_PART, WHOLE
from sera_plugin.rewards import FloatArray
from sera_plugin.run import announce, describe_run, require_same_run
from sera_plugin.sampling import CandidateSampler, SamplingSettings
from sera_plugin.sampling.choose import SAMPLERS, Choice, choose_sampler
from sera_plugin.sampling.transformers import TransformersSampler
from sera_plugin.sampling.vllm import ServedPolicy, VllmSampler, adapter_problem
from sera_plugin.sampling.vllm_server import VllmServerSampler
from sera_plugin.schedule import Schedule
from sera_plugin.scoring import PolicyScorer, sampling_progress
from sera_plugin.store import RunStore, read_json
from sera_plugin.summary import describe_end, describe_start, metrics, summarize

#: Below the host's own logger: it shows its own messages and, of others, only warnings.
LOG = logging.getLogger("axolotl.sera")


@dataclass(frozen=True)
class Prepared:
    """What an iteration trains on and is evaluated against.

    Attributes:
        pairs: D_t, see `prepare_iteration`.
        held_out: log pi_{t-1} of the held-out pairs' chosen and rejected, None without any.
    """

    pairs: pa.Table
    held_out: dict[str, FloatArray] | None


@dataclass
class Loop:
    """One run.

    Attributes:
        cfg: the host's resolved configuration.
        method: the method's constants.
        schedule: how long each iteration is; updated as iterations turn out shorter.
        pairs, held_out: the data.
        end_ids: token ids that end a completion.
        seed: the host's.
        store: the run directory.
        scorer: scores under any policy; owns the model's policies.
        tokenizer: the host's.
        log: takes figures for the trackers.
    """

    cfg: Mapping[str, Any]
    method: Method
    schedule: Schedule
    pairs: Pairs
    held_out: Pairs | None
    end_ids: tuple[int, ...]
    seed: int
    store: RunStore
    scorer: PolicyScorer
    tokenizer: Any
    log: Callable[[dict[str, float]], None]
    _sampler: Choice | None = field(default=None, init=False)

    def open(
        self, loss: str, beta: float, columns: Mapping[str, Any], dataset: pa.Table, resuming: bool
    ) -> None:
        """Start the run's record, or continue it.

        Args:
            loss, beta: what is optimised.
            columns: the dataset's own columns to keep beside its token ids.
            dataset: the offline pairs.
            resuming: whether the configuration allows to continue an earlier run.

        Raises:
            ValueError: if the directory holds another run, or the sampler that the configuration
                names cannot run.
            SamplingFailed: if a server is named and cannot serve this run.
        """
        for iteration in range(2, len(self.schedule.pairs) + 1):
            done = self.store.summary(iteration).get("pairs", {}).get("trained")
            if done is not None:
                self.schedule = self.schedule.with_pairs(iteration, done)
        description = describe_run(
            self.cfg,
            loss,
            beta,
            self.method,
            self.pairs,
            len(self.held_out) if self.held_out else 0,
            self.end_ids,
            self.seed,
        )
        if self.store.run_file.exists():
            if not resuming:
                raise ValueError(
                    f"{self.store.root} holds an earlier run. Set another output_dir, remove that "
                    "directory, or continue it with `auto_resume_from_checkpoints: true`."
                )
            require_same_run(read_json(self.store.run_file), description)
        self._sampler = self._choose_sampler()
        if not self.store.run_file.exists():
            for name, values in columns.items():
                dataset = dataset.append_column(name, values)
            self.store.begin(description, dataset)
        LOG.info("%s", announce(description, self.method, self.schedule, self.store, self._sampler))

    def begin(self, iteration: int, resumed: bool, optimizer: Any) -> Prepared:
        """Everything before the first step of iteration t.

        Args:
            iteration: t, 1-based.
            resumed: whether training continues in the middle of it.
            optimizer: may wait in host memory while an engine samples.
        """
        self.store.discard_after(iteration)
        earlier = self.store.summary(iteration)
        phases = Phases(earlier.get("seconds", {}), earlier.get("forwarded", {}))
        self.scorer.phases = phases
        policies = self.scorer.policies
        if resumed:
            policies.current = None
        else:
            policies.keep_current(iteration - 1)
        config = self.method.config
        pairs = prepare_iteration(
            iteration,
            self.method,
            self.pairs,
            self.store,
            self.scorer,
            self._make_sampler(iteration, optimizer),
            SamplingSettings(
                candidates=config.candidates,
                temperature=config.temperature,
                top_p=config.top_p,
                max_new_tokens=config.max_new_tokens,
                max_length=self.cfg["sequence_len"],
                end_ids=self.end_ids,
                seed=self.seed * 1_000 + iteration,
            ),
            phases,
            sampling_progress(self.scorer.quiet),
        )
        held_out = None
        if self.held_out is not None:
            held_out = score_held_out(iteration, self.held_out, self.store, self.scorer, phases)
        if not earlier:
            summary = summarize(iteration, self.method, self.store, phases)
            self.store.write_summary(iteration, summary)
            LOG.info("%s", describe_start(summary))
            self.log(metrics(summary))
        # Iteration t + 1 compares theta_t with as many policies as its reward weighs.
        oldest = min(iteration - 1, iteration + 1 - len(self.method.weights(iteration + 1)))
        policies.forget_before(oldest, on_disk=not config.keep_policies)
        self.schedule = self.schedule.with_pairs(iteration, pairs.num_rows)
        return Prepared(pairs, held_out)

    def end(self, iteration: int, step_zero: Mapping[str, float] | None) -> None:
        """Complete the iteration's summary after its last step."""
        summary = self.store.summary(iteration)
        summary["seconds"] = dict(self.scorer.phases.seconds)
        if step_zero is not None:
            summary["step_zero"] = dict(step_zero)
        self.store.write_summary(iteration, summary)
        self.log({"sera/seconds/train": summary["seconds"]["train"]})
        LOG.info("%s", describe_end(summary))

    # ------------------------------------------------------------------ sampling

    @property
    def _python(self) -> str:
        return self.method.config.vllm_python or sys.executable

    @property
    def _vllm_options(self) -> dict[str, Any]:
        """The host's `vllm:` block as vLLM's engine takes it, unset keys left out."""
        block = self.cfg.get("vllm") or {}
        names = (
            "gpu_memory_utilization",
            "tensor_parallel_size",
            "dtype",
            "max_model_len",
            "enforce_eager",
            "enable_prefix_caching",
        )
        return {name: block[name] for name in names if block.get(name) not in (None, "auto")}

    def _choose_sampler(self) -> Choice | None:
        if not self.method.bootstrapped or len(self.schedule.pairs) == 1:
            return None
        ranks = self.store.ranks
        choice = Choice("transformers", "as rank 0 has chosen")
        if ranks.main:
            choice = choose_sampler(self.method.config.sampler, self._python, self._unserved())
            if choice.fell_back:
                LOG.warning(
                    "sera.sampler: %s is not used. Samples come from transformers, %s",
                    self.method.config.sampler,
                    choice.reason,
                )
            if choice.name == "vllm-server":
                self._server(self.store.policy(2)).check()
        # All ranks sample alike, whatever their own environments could do.
        mine = SAMPLERS.index(choice.name) if ranks.main else 0
        choice = replace(choice, name=SAMPLERS[int(ranks.sum(np.array([mine], float))[0])])
        if choice.name == "vllm":
            ranks.engine_shard(self._engine_size)
        return choice

    def _unserved(self) -> str | None:
        """Why vLLM would not serve this kind of policy, or None."""
        model = self.scorer.policies.model
        if not self.scorer.policies.is_adapter:
            return None
        base = type(model.config).from_pretrained(str(self.cfg["base_model"])).get_text_config()
        if model.get_input_embeddings().weight.shape[0] != base.vocab_size:
            return "the adapter stands on a model whose vocabulary was resized after loading"
        return adapter_problem(model.peft_config[model.active_adapter].to_dict())

    @property
    def _engine_size(self) -> int:
        return int(self._vllm_options.get("tensor_parallel_size") or 1)

    def _make_sampler(self, iteration: int, optimizer: Any) -> CandidateSampler:
        """The chosen sampler for theta_{t-1}."""
        name = self._sampler.name if self._sampler else "transformers"
        policies, ranks = self.scorer.policies, self.store.ranks
        if name == "vllm-server":
            return self._server(self.store.policy(iteration))
        if name == "transformers":
            return TransformersSampler(
                policies.model,
                self.scorer.pad_id,
                self.scorer.token_budget,
                self.scorer.autocast,
                ranks.shard,
            )
        served = self._served(iteration)
        options = self._vllm_options

        def room(length: int) -> Any:
            size = 4 if served.dtype == "float32" else 2
            needs = engine_needs(policies.model, length, size)
            return make_room(policies.model, optimizer, needs, options, ranks)

        name = f"vllm-{ranks.rank}.log" if ranks.world > 1 else "vllm.log"
        log = self.store.iteration(iteration) / name
        shard = ranks.engine_shard(self._engine_size)
        return VllmSampler(self._python, served, options, log, room, shard)

    def _served(self, iteration: int) -> ServedPolicy:
        directory = str(self.store.policy(iteration).resolve())
        cfg, policies = self.cfg, self.scorer.policies
        loading: dict[str, Any] = {}
        if cfg.get("trust_remote_code"):
            loading["trust_remote_code"] = True
        dtype = self._vllm_options.get("dtype") or str(cfg["torch_dtype"]).split(".")[-1]
        if not policies.is_adapter:
            return ServedPolicy(directory, None, 0, dtype, None, loading)
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
        model = policies.model
        return ServedPolicy(
            model=str(cfg["base_model"]),
            adapter=directory,
            rank=model.peft_config[model.active_adapter].r,
            dtype=dtype,
            quantized=quantized,
            options=loading,
        )

    def _server(self, adapter: Path) -> VllmServerSampler:
        block = self.cfg.get("vllm") or {}
        return VllmServerSampler(
            host=block.get("host") or "127.0.0.1",
            port=block.get("port") or 8000,
            base_model=str(self.cfg["base_model"]),
            adapter=adapter,
            tokenize=lambda text: self.tokenizer(text, add_special_tokens=False)["input_ids"],
            special_tokens=self.tokenizer.all_special_tokens,
            # One client keeps a server busy, and it then holds one adapter.
            shard=WHOLE if self.store.ranks.main else NO_PART,
        )
