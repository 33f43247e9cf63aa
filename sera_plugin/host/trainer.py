"""The trainer: SeRA's iterations inside one `train()` call of the host.

The only owner of private host seams. tests/test_host_seams.py pins the signature of each, so that
a host upgrade fails there and not in the middle of somebody's run.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate.utils import is_peft_model
from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer
from axolotl.integrations.base import PluginManager
from axolotl.utils.dict import DictDefault
from datasets import Dataset
from datasets.table import InMemoryTable
from transformers import ProgressCallback, Trainer, TrainerCallback, set_seed
from transformers.trainer_utils import SaveStrategy, rotate_checkpoints

from sera_plugin.algorithm.annotations import annotate, swap, swapped_rows
from sera_plugin.algorithm.method import Method, Pairs
from sera_plugin.algorithm.offline import score_pairs
from sera_plugin.algorithm.rewards import FloatArray
from sera_plugin.algorithm.schedule import Schedule
from sera_plugin.config.kinds import LOSSES
from sera_plugin.config.sera import PER_TOKEN_HOST_LOSSES, SeraConfig
from sera_plugin.data.dataset import kept_columns, prepare_rows
from sera_plugin.data.encoding import model_end_ids
from sera_plugin.host.loop import RECORD, Loop
from sera_plugin.host.patches import NO_FSDP
from sera_plugin.labeling.labelers import Labelers
from sera_plugin.model.adapters import continue_adapter, tidy_adapters
from sera_plugin.model.gate import (
    FLOAT32_LIMIT,
    LOW_PRECISION_LIMIT,
    check_step_zero,
    low_precision,
)
from sera_plugin.model.logprobs import scoring_budget
from sera_plugin.model.losses import PreferenceLoss
from sera_plugin.model.objective import Objective
from sera_plugin.model.policies import PolicyHistory, is_finite
from sera_plugin.model.scoring import PolicyScorer
from sera_plugin.rundir import checkpoints
from sera_plugin.rundir.checksums import explained, seal
from sera_plugin.rundir.distributed import current_ranks
from sera_plugin.rundir.progress import told
from sera_plugin.rundir.store import RunStore, make_table, write_json
from sera_plugin.sampling.samplers import Samplers

LOG = logging.getLogger("axolotl.sera")

#: Where the host saves the optimizer's state: alone and under DDP, under FSDP whole and in parts.
_OPTIMIZER_FILES = ("optimizer.pt", "optimizer.bin", "optimizer_0")

_DIVERGED = (
    "Checkpoints and finished iterations are as they were. Start fresh in another output_dir with "
    "a lower learning_rate or a smaller rl_beta, or in bf16 or float32 instead of fp16."
)


class _Collator:
    """TRL's collator, and log pi_{t-1} for the gate, which TRL has no name for."""

    def __init__(self, collate: Any) -> None:
        self.collate = collate

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = self.collate(examples)
        for name in ("policy_chosen_logps", "policy_rejected_logps"):
            if name in examples[0]:
                batch[name] = torch.tensor([example[name] for example in examples])
        return batch


class _EndOfIteration(TrainerCallback):
    """Completes an iteration before the host saves the epoch's end."""

    def __init__(self, trainer: SeraTrainer) -> None:
        self.trainer = trainer

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.end_iteration(state, control)


class _TrainingBar(ProgressCallback):
    """The host's bar, without SeRA's figures: they are for trackers, and the log has a summary."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not any(name.startswith("sera/") for name in logs):
            super().on_log(args, state, control, logs=logs, **kwargs)


class SeraTrainer(AxolotlDPOTrainer):
    """The host's DPO trainer with a dataset, a reference and a length of its own per epoch."""

    tag_names: ClassVar[list[str]] = ["axolotl", "sera", "dpo"]
    train_dataset: Any

    def __init__(self, model: Any, ref_model: Any = None, *, args: Any, **kwargs: Any) -> None:
        self.cfg: DictDefault = PluginManager.get_instance().cfg
        self.config = SeraConfig(**self.cfg.sera)
        # The host's own where `dpo_loss_type` asks for one.
        self.loss = None if self.cfg.dpo_loss_type else preference_loss(self.cfg, self.config)
        self.store = RunStore(args.output_dir, current_ranks())
        if not self.store.ranks.main:
            LOG.setLevel(logging.ERROR)  # rank 0 speaks for all
        self._quiet = bool(args.disable_tqdm) or not self.store.ranks.main
        self._loop: Loop | None = None
        self._gate_pending = False
        self._iteration = 0
        self._saved_step: int | None = None
        # Before the host puts its own find in place of what the YAML says.
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

        self.data_collator: Any = _Collator(self.data_collator)

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
        self.add_callback(_EndOfIteration(self))
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(_TrainingBar)
        self._pairs = Pairs.from_table(self.train_dataset.data.table)
        self._eval_pairs = self._held_out_pairs()
        self._policies = PolicyHistory(
            self.model, self.store, str(self.cfg.base_model), self.processing_class
        )
        self._score = PolicyScorer(
            self._policies,
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

    def _held_out_pairs(self) -> Pairs | None:
        held_out: Dataset | None = self.eval_dataset
        return Pairs.from_table(held_out.data.table) if held_out else None

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
        self._loop = self._make_loop()
        self._loop.open(
            self.loss.name if self.loss else " + ".join(self.args.loss_type),
            float(self.args.beta),
            self._offline_columns,
            self.train_dataset.data.table,
            bool(self._asked_checkpoint or self.cfg.auto_resume_from_checkpoints),
            self._asked_checkpoint,
            sharded_later=bool(self.is_fsdp_enabled),
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Remember theta_0 before a checkpoint is loaded over it.

        Under FSDP that waits until the weights are where they will be used: before, they are in
        the host's memory, and with `cpu_ram_efficient_loading` on the first rank alone.
        """
        if self._loop is not None:
            self._loop.recall()
        if self.is_fsdp_enabled and is_peft_model(self.model):
            # accelerate 1.13 saves only rank 0's part of the adapter for this, and would load it on
            # rank 0 alone. The checkpoint's adapter, as PEFT has it, is whole.
            self._policies.load(Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """See `transformers.Trainer.train`.

        Args:
            resume_from_checkpoint: the host's find; the run continues from its own (`Loop`).

        Raises:
            ValueError: if the checkpoint that the YAML asks for cannot be used.
        """
        if self._loop is None:
            self.open_run()
        assert self._loop is not None
        step = self._loop.continue_from(self._asked_checkpoint)
        if step is not None:
            self._require_optimizer(step)
            resume_from_checkpoint = str(checkpoints.checkpoint(Path(self.args.output_dir), step))
            # It would compare the policy with itself, in the middle of the curve.
            self.args.eval_on_start = False
        else:
            resume_from_checkpoint = None
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _require_optimizer(self, step: int) -> None:
        assert self._loop is not None
        path = checkpoints.checkpoint(Path(self.args.output_dir), step)
        _, steps = self._loop.schedule.locate(step)
        finished = step == self._loop.schedule.total_steps
        unneeded = finished or (self.config.restart_optimizer and steps == 0)
        if not unneeded and not any((path / name).exists() for name in _OPTIMIZER_FILES):
            raise ValueError(
                f"{path} was saved without the optimizer (save_only_model), so the run cannot "
                "continue from it as if it had not been interrupted. Start fresh in another "
                "output_dir without save_only_model"
                + (
                    ", or name the checkpoint of an iteration's end with resume_from_checkpoint."
                    if self.config.restart_optimizer
                    else "."
                )
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

    # ---------------------------------------------------- seams: epochs of unequal length

    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        """Totals over iterations of unequal length; see transformers 5.16 for the tuple."""
        assert self._loop is not None
        schedule = self._loop.schedule
        values = list(super().set_initial_training_values(args, dataloader))
        values[0] = len(schedule.pairs)
        values[1] = schedule.steps(1)
        values[3] = sum(schedule.pairs)
        values[5] = schedule.batches(1)
        values[6] = schedule.total_steps
        return tuple(values)

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: Any,
        trial: Any,
    ) -> tuple[int, int]:
        """Where a resumed run continues, counted in steps of unequal iterations."""
        epochs, batches = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        assert self._loop is not None
        schedule = self._loop.schedule
        if self.state.global_step:
            iteration, steps = schedule.locate(self.state.global_step)
            epochs = iteration - 1
            batches = steps * schedule.accumulation
        return epochs, batches

    def _run_epoch(
        self,
        model: Any,
        epoch: int,
        train_dataloader: Any,
        steps_in_epoch: int,
        num_update_steps_per_epoch: int,
        **kwargs: Any,
    ) -> None:
        """One iteration: prepare D_t, then the host's own epoch over it."""
        loop = self._loop
        assert loop is not None
        iteration = epoch + 1
        resumed = kwargs.get("epochs_trained") == epoch and bool(
            kwargs.get("steps_trained_in_current_epoch")
        )
        loop.recall()
        planned = loop.schedule.steps(iteration)
        prepared = loop.begin(iteration, resumed, self.optimizer)
        steps = loop.schedule.steps(iteration)
        if prepared.held_out is not None:
            assert self._eval_pairs is not None
            self.eval_dataset = self._with_reference(self._eval_pairs, prepared.held_out)
            # Persistent workers would go on serving the last iteration's reference values.
            self._eval_dataloaders: dict[str, Any] = {}
        self._announce_total(loop.schedule.total_steps)
        # The host has made the first iteration's, for as many steps as were planned.
        if self.config.restart_optimizer and not resumed and (iteration > 1 or steps != planned):
            self._restart_optimizer(steps)
        self.train_dataset = Dataset(InMemoryTable(prepared.pairs))
        loader = self.get_train_dataloader()
        self.callback_handler.train_dataloader = loader
        self._gate_pending = not resumed
        self._iteration = iteration
        super()._run_epoch(
            model=model,
            epoch=epoch,
            train_dataloader=loader,
            steps_in_epoch=len(loader),
            num_update_steps_per_epoch=steps,
            **kwargs,
        )

    def end_iteration(self, state: Any, control: Any) -> None:
        """Complete the iteration's record, and save unless saving is off.

        Between two iterations lie hours of scoring and sampling, which a run that is cut off
        there must not repeat.
        """
        assert self._loop is not None
        self._require_finite_weights()
        self._loop.end()
        if self.args.save_strategy != SaveStrategy.NO and self._saved_step != state.global_step:
            control.should_save = True

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The host's checkpoint, sealed before an older one is removed; a step is saved once.

        Raises:
            ValueError: if the policy's weights are not finite.
            OSError: if the disk is full, with what to do about it.
        """
        step = self.state.global_step
        if step == self._saved_step:
            return  # asked for again at the same step: the whole one stays
        self._require_finite_weights()
        directory = Path(self._get_output_dir(trial=trial))
        path = checkpoints.checkpoint(directory, step)
        # What is there was cut off, or `continue_from` would have set it aside.
        self.store.ranks.on_main(lambda: shutil.rmtree(path, ignore_errors=True))
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with explained(directory):
                super()._save_checkpoint(model, trial)
                self.store.ranks.on_main(lambda: self._seal(path))
        finally:
            self.args.save_total_limit = limit
        self._saved_step = step
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(directory),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )

    def _seal(self, path: Path) -> None:
        assert self._loop is not None
        write_json(path / RECORD, self._loop.record())
        seal(path)

    def _require_finite_weights(self) -> None:
        if not is_finite(self.model, self.store.ranks):
            raise ValueError(
                f"the policy's weights are not finite after step {self.state.global_step} "
                f"(iteration {self._iteration}), so they are not saved. {_DIVERGED}"
            )

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """With `sera.restart_optimizer` a schedule spans one iteration, not the run."""
        if self._loop is not None and self.config.restart_optimizer:
            schedule = self._loop.schedule
            iteration, _ = schedule.locate(self.state.global_step)
            num_training_steps = schedule.steps(min(iteration, len(schedule.pairs)))
        elif self._loop is not None:
            # A run that is continued knows more of its length than when the schedule began.
            num_training_steps = self._loop.planned_steps
        return super().create_scheduler(num_training_steps, optimizer)

    def _restart_optimizer(self, steps: int) -> None:
        """Fresh optimizer state and learning-rate schedule for a new arg-min."""
        # Accelerate keeps every optimizer it has prepared and would unscale the old ones too.
        self.accelerator._optimizers.clear()
        self.optimizer = self.lr_scheduler = None
        # Not `prepare`: under FSDP2 that wants the model too, which is sharded already.
        self.optimizer = self.accelerator.prepare_optimizer(self.create_optimizer())
        self.create_scheduler(num_training_steps=steps)
        self.callback_handler.optimizer = self.optimizer
        self.callback_handler.lr_scheduler = self.lr_scheduler

    def _announce_total(self, total_steps: int) -> None:
        """Fewer pairs than asked for may exist: keep the host's total and its bar true."""
        if total_steps == self.state.max_steps:
            return
        self.state.max_steps = total_steps
        for callback in self.callback_handler.callbacks:
            bar = getattr(callback, "training_bar", None)
            if isinstance(callback, ProgressCallback) and bar is not None:
                bar.total = total_steps
                bar.refresh()

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """See TRL. An evaluation before the first iteration refers to the policy as it is."""
        if eval_dataset is None and "ref_chosen_logps" not in self.eval_dataset.column_names:
            assert self._eval_pairs is not None
            self.eval_dataset = self._with_reference(self._eval_pairs)
        return super().evaluate(eval_dataset, *args, **kwargs)

    # ------------------------------------------------------------------ the step

    def compute_loss_context_manager(self) -> Any:
        """The context of every forward pass, the scorer's too.

        That of transformers 5.16 is empty: autocast comes with accelerate's wrapping of the model,
        which an evaluation or a continued run's first scores do not wait for.
        """
        return self.accelerator.autocast()

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """TRL's step. The host's own collects garbage and empties the cache in each one."""
        loss: torch.Tensor = super(AxolotlDPOTrainer, self).training_step(*args, **kwargs)
        return loss

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        if self.loss is None:
            result = super()._compute_loss(model, inputs, return_outputs)
            if self._gate_pending and self.model.training:
                recorded = self._metrics["train"]
                # What the host records are means over all processes.
                references = {
                    name: self.accelerator.gather(values)
                    for name, values in inputs.items()
                    if name.endswith("_logps")
                }
                self._pass_gate(
                    inputs | references,
                    torch.tensor(recorded["logps/chosen"][-1]),
                    torch.tensor(recorded["logps/rejected"][-1]),
                )
            if self.model.training:
                loss = result[0] if return_outputs else result
                self._require_finite(loss.item())
            return result
        mode = "train" if self.model.training else "eval"
        result = self._objective(model, inputs)
        if self._gate_pending and mode == "train":
            self._pass_gate(
                inputs, result.chosen_logps, result.rejected_logps, result.preference_loss
            )
        if mode == "train":
            self._require_finite(result.metrics["loss"])
        del result.metrics["loss"]  # the host logs it itself
        tokens = round(result.metrics.pop("num_tokens") * self.store.ranks.world)
        for name, value in result.metrics.items():
            self._metrics[mode][name].append(value)
        if mode == "train":
            self._total_train_tokens += tokens
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        return (result.loss, result.outputs) if return_outputs else result.loss

    def _pass_gate(
        self,
        inputs: Any,
        chosen_logps: torch.Tensor,
        rejected_logps: torch.Tensor,
        loss: torch.Tensor | None = None,
    ) -> None:
        self._gate_pending = False
        figures = check_step_zero(
            inputs, chosen_logps, rejected_logps, self._rounding, loss, self.loss
        )
        assert self._loop is not None
        self._loop.passed_gate(figures)

    @property
    def _rounding(self) -> float:
        """How far the same policy may differ from itself, nats per square root of the tokens."""
        low = self.args.bf16 or self.args.fp16 or low_precision(self.model)
        return LOW_PRECISION_LIMIT if low else FLOAT32_LIMIT

    def _require_finite(self, loss: float) -> None:
        """The host would go on, and log the mean of earlier losses instead."""
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss is {loss} in step {self.state.global_step + 1} (iteration "
                f"{self._iteration}), so training stops here. {_DIVERGED}"
            )


def preference_loss(cfg: DictDefault, config: SeraConfig) -> PreferenceLoss:
    """The loss that the configuration names, with its constants."""
    beta = cfg.trl.beta if cfg.trl and cfg.trl.beta is not None else cfg.rl_beta
    return PreferenceLoss(
        kind=config.loss,
        beta=float(beta),
        label_smoothing=float(cfg.dpo_label_smoothing or 0.0),
        simpo_gamma=float(cfg.simpo_gamma or 0.0),
        per_token=config.per_token,
    )
