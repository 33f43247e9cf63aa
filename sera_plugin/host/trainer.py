"""The trainer: SeRA's iterations inside one `train()` call of the host.

Here it is put together, from the host's DPO trainer and the data to the loop that tells it what to
train on. `epochs`, `continuing` and `step` override the host's private seams, one reason each.
tests/test_host_seams.py pins the signature of every one, so that a host upgrade fails there and not
in the middle of somebody's run.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import numpy as np
from accelerate.utils import is_peft_model
from axolotl.integrations.base import PluginManager
from axolotl.utils.dict import DictDefault
from datasets import Dataset
from datasets.table import InMemoryTable
from transformers import ProgressCallback, Trainer, set_seed

from sera_plugin.algorithm.annotations import annotate, swap, swapped_rows
from sera_plugin.algorithm.method import Method, Pairs
from sera_plugin.algorithm.offline import score_pairs
from sera_plugin.algorithm.rewards import FloatArray
from sera_plugin.algorithm.schedule import Schedule
from sera_plugin.config.kinds import LOSSES
from sera_plugin.config.sera import PER_TOKEN_HOST_LOSSES, SeraConfig
from sera_plugin.data.dataset import kept_columns, prepare_rows
from sera_plugin.data.encoding import model_end_ids
from sera_plugin.host.continuing import ContinuedRun
from sera_plugin.host.epochs import EndOfIteration, TrainingBar, UnequalEpochs
from sera_plugin.host.loop import Loop
from sera_plugin.host.patches import NO_FSDP
from sera_plugin.host.step import Collator, preference_loss
from sera_plugin.labeling.labelers import Labelers
from sera_plugin.model.adapters import continue_adapter, tidy_adapters
from sera_plugin.model.gate import (
    FLOAT32_LIMIT,
    LOW_PRECISION_LIMIT,
    low_precision,
)
from sera_plugin.model.logprobs import scoring_budget
from sera_plugin.model.objective import Objective
from sera_plugin.model.policies import PolicyHistory
from sera_plugin.model.scoring import PolicyScorer
from sera_plugin.rundir.distributed import current_ranks
from sera_plugin.rundir.progress import told
from sera_plugin.rundir.store import RunStore, make_table
from sera_plugin.sampling.samplers import Samplers

LOG = logging.getLogger("axolotl.sera")


class SeraTrainer(UnequalEpochs, ContinuedRun):
    """The host's DPO trainer with a dataset, a reference and a length of its own per epoch."""

    _opened = False
    tag_names: ClassVar[list[str]] = ["axolotl", "sera", "dpo"]
    train_dataset: Any
    eval_dataset: Any

    def __init__(self, model: Any, ref_model: Any = None, *, args: Any, **kwargs: Any) -> None:
        self.cfg: DictDefault = PluginManager.get_instance().cfg
        self.config = SeraConfig(**self.cfg.sera)
        # The host's own where `dpo_loss_type` asks for one.
        self.loss = None if self.cfg.dpo_loss_type else preference_loss(self.cfg, self.config)
        self.store = RunStore(args.output_dir, current_ranks())
        if not self.store.ranks.main:
            LOG.setLevel(logging.ERROR)  # rank 0 speaks for all
        self._quiet = bool(args.disable_tqdm) or not self.store.ranks.main
        self._asked_checkpoint = self.cfg.resume_from_checkpoint
        self._offline_columns: Mapping[str, Sequence[Any]] = {}
        self._swapped: np.ndarray[Any, Any] | None = None
        self._model_end_ids = model_end_ids(model, kwargs["processing_class"])

        # References are columns of the data: no reference model, no forward pass for one.
        args.precompute_ref_log_probs = True
        args.remove_unused_columns = False
        if self.loss is not None:
            args.loss_type = ["sigmoid"]
        if self.config.restart_optimizer and self.cfg.warmup_steps is None:
            # The host turned the ratio into steps of the whole run; an iteration has its own.
            ratio = self.cfg.warmup_ratio
            args.warmup_steps = 0.03 if ratio is None else float(ratio)
        # The host's padding collator expects the columns of an older TRL; TRL's own pads as well.
        kwargs.pop("data_collator", None)
        args.pad_to_multiple_of = self.cfg.pad_to_multiple_of
        # TRL initialises a new adapter before the host has seeded anything.
        set_seed(args.seed)
        model, continued = continue_adapter(model, self.cfg.lora_model_dir)
        if continued is not None:
            kwargs.pop("peft_config", None)

        super().__init__(model, None, args=args, **kwargs)

        self.data_collator: Any = Collator(self.data_collator)

        if self.is_deepspeed_enabled:
            raise ValueError(
                "the launcher has turned DeepSpeed on, which does not work with rl: sera yet. Take "
                "it out of the launcher's configuration (docs/many-gpus.md)."
            )
        if self.cfg.fsdp_config and not self.is_fsdp_enabled:
            raise ValueError(NO_FSDP)
        if self.accelerator.num_processes != self.store.ranks.world:
            raise ValueError(
                f"{self.store.ranks.world} processes were started, but the host trains in each of "
                "them alone. Use a launcher that sets up the devices: `axolotl train config.yaml "
                "--launcher accelerate`."
            )
        if is_peft_model(self.model):
            tidy_adapters(self.model, continued)
        self.add_callback(EndOfIteration(self))
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(TrainingBar)
        self._pairs = Pairs.from_table(self.train_dataset.data.table)
        held_out = self.eval_dataset
        self._eval_pairs = Pairs.from_table(held_out.data.table) if held_out else None
        self._score = PolicyScorer(
            PolicyHistory(self.model, self.store, str(self.cfg.base_model), self.processing_class),
            int(self._tokenizer.pad_token_id),
            scoring_budget(self.model, self.accelerator.device, int(self.cfg.sequence_len or 0)),
            self.accelerator.autocast,
            self.store.ranks,
            self._quiet,
        )
        if self.loss is not None:
            likelihood = LOSSES[self.loss.kind].likelihood
            self._objective = Objective(
                self.loss,
                nll_weight=1.0 if likelihood else float(self.cfg.cpo_alpha or 0.0),
                nll_of_prompts=likelihood,
                router_weight=self.router_aux_loss_coef if self.aux_loss_enabled else None,
                mean=lambda metrics: self.accelerator.reduce(metrics, reduction="mean"),
            )
        self.loop = self._make_loop()

    # ------------------------------------------------------------------ data

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, dataset_name: str
    ) -> Dataset:
        if "prompt_ids" in dataset.column_names:
            return dataset
        rows = told(dataset, f"tokenize {dataset_name} pairs", "pair", self._quiet)
        result = prepare_rows(
            rows, processing_class, self._model_end_ids, self.cfg, self.config, dataset_name
        )
        columns: dict[str, Any] = {
            "row": np.arange(len(result.rows)),
            "prompt_ids": result.prompt_ids,
            "chosen_ids": result.chosen_ids,
            "rejected_ids": result.rejected_ids,
        }
        if dataset_name == "train":
            self._offline_columns = kept_columns(dataset, result.rows, self.config.score_columns)
            self._end_ids = result.end_ids
            if self.config.label_noise:
                self._swapped = swapped_rows(len(result.rows), self.config.label_noise, args.seed)
                columns = swap(columns, self._swapped)
                self._offline_columns = swap(self._offline_columns, self._swapped)
        return Dataset(InMemoryTable(make_table(columns)))

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Dataset:
        """TRL's hook: during __init__ nothing is scored, later a set passed to evaluate() is."""
        if not hasattr(self, "_pairs"):
            return dataset
        context = self.model.disable_adapter() if is_peft_model(self.model) else nullcontext()
        with context:
            return self._with_reference(Pairs.from_table(dataset.data.table))

    def _with_reference(self, pairs: Pairs, logps: dict[str, FloatArray] | None = None) -> Dataset:
        """The pairs as rows for training, by default against the model as it was loaded."""
        if logps is None:
            logps = score_pairs(pairs, 0, self._score, "score_evaluation")
        columns = {
            "prompt_ids": pairs.prompt_ids,
            "chosen_ids": pairs.chosen_ids,
            "rejected_ids": pairs.rejected_ids,
            "ref_chosen_logps": logps["chosen"],
            "ref_rejected_logps": logps["rejected"],
        }
        return Dataset(InMemoryTable(make_table(columns)))

    # -------------------------------------------------------------- one train() call

    def open_run(self) -> None:
        """Start or continue the run's record, before the host writes into output_dir.

        Raises:
            ValueError, OSError: see `Loop.open`.
        """
        if self._opened:
            return
        self._opened = True
        self.loop.open(
            self.loss.name if self.loss else " + ".join(self.args.loss_type),
            float(self.args.beta),
            self._offline_columns,
            self.train_dataset.data.table,
            bool(self._asked_checkpoint or self.cfg.auto_resume_from_checkpoints),
            self._asked_checkpoint,
            sharded_later=bool(self.is_fsdp_enabled),
        )

    def _make_loop(self) -> Loop:
        method = Method(
            config=self.config,
            reference_free=self.loss is not None and self.loss.reference_free,
            per_token=self._per_token,
            total=len(self._pairs),
            iterations=int(self.args.num_train_epochs),
            seed=int(self.args.seed),
            annotations=annotate(
                self.config, self._pairs.prompt_ids, self._offline_columns, self._swapped
            ),
        )
        schedule = Schedule(
            method.sizes,
            self.args.train_batch_size * self.store.ranks.world,
            self.args.gradient_accumulation_steps,
            self.args.dataloader_drop_last,
        )
        samplers = Samplers(self.cfg, self.config, self.store, self._score, self.processing_class)
        return Loop(
            cfg=self.cfg,
            method=method,
            schedule=schedule,
            pairs=self._pairs,
            held_out=self._eval_pairs,
            end_ids=tuple(self._end_ids),
            store=self.store,
            scorer=self._score,
            samplers=samplers,
            labelers=Labelers(method, samplers, self.processing_class),
            nats=self._rounding,
            # Trainer.log, not TRL's: that would add the last steps' half-filled averages.
            log=lambda figures: Trainer.log(self, figures),
        )

    @property
    def _per_token(self) -> bool:
        if self.loss is not None:
            return self.loss.per_token
        return any(loss in PER_TOKEN_HOST_LOSSES for loss in self.args.loss_type)

    @property
    def _rounding(self) -> float:
        """How far the same policy may differ from itself, nats per square root of the tokens."""
        low = self.args.bf16 or self.args.fp16 or low_precision(self.model)
        return LOW_PRECISION_LIMIT if low else FLOAT32_LIMIT

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """See TRL. An evaluation before the first iteration refers to the policy as it is."""
        if eval_dataset is None and "ref_chosen_logps" not in self.eval_dataset.column_names:
            assert self._eval_pairs is not None
            self.eval_dataset = self._with_reference(self._eval_pairs)
        return super().evaluate(eval_dataset, *args, **kwargs)
