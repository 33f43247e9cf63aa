"""One `train()` call: epochs of unequal length, each on its own dataset and reference.

The host plans one dataset of one length for all epochs. Its totals, its learning-rate schedule and
where a continued run goes on are counted anew here, and so is what it saves to continue from.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer
from datasets import Dataset
from datasets.table import InMemoryTable
from transformers import ProgressCallback, TrainerCallback, get_constant_schedule
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from transformers.trainer_utils import SaveStrategy, rotate_checkpoints

from sera_plugin.algorithm.rewards import FloatArray
from sera_plugin.config.sera import SeraConfig
from sera_plugin.host.loop import Loop
from sera_plugin.host.restart import Beginning
from sera_plugin.host.schedules import room_to_warm_up
from sera_plugin.model.parts import hold_engine
from sera_plugin.model.policies import is_finite
from sera_plugin.rundir.checksums import RECORD, checkpoint, seal
from sera_plugin.rundir.store import RunStore, make_table, write_json
from sera_plugin.rundir.writing import explained

DIVERGED = (
    "Checkpoints and finished iterations are as they were. Start fresh in another output_dir with "
    "a lower learning_rate or a smaller rl_beta, or in bf16 or float32 instead of fp16."
)
#: Where the host saves the optimizer's state: alone and under DDP, under FSDP whole and in parts,
#: under DeepSpeed.
_OPTIMIZER_FILES = ("optimizer.pt", "optimizer.bin", "optimizer_0", "global_step*")
ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


class EndOfIteration(TrainerCallback):
    """Completes an iteration's record before the host saves the epoch's end."""

    def __init__(self, trainer: UnequalEpochs) -> None:
        self.trainer = trainer

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save too, unless saving is off: hours of scoring and sampling follow, not to repeat."""
        self.trainer.require_finite_weights()
        self.trainer.loop.end()
        if args.save_strategy != SaveStrategy.NO and self.trainer.saved_step != state.global_step:
            control.should_save = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The host saves the model next, as it is then."""
        self.trainer.loop.finish()


class TrainingBar(ProgressCallback):
    """The host's bar, without SeRA's figures: they are for trackers, and the log has a summary."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Fewer pairs than asked for may exist, which an iteration knows when it begins."""
        if self.training_bar is not None:
            self.training_bar.total = state.max_steps
            self.training_bar.refresh()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Training may end before its last iteration."""
        self.on_epoch_begin(args, state, control)
        super().on_train_end(args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not any(name.startswith("sera/") for name in logs):
            super().on_log(args, state, control, logs=logs, **kwargs)


class UnequalEpochs(AxolotlDPOTrainer):
    """One iteration of the loop per epoch of the host; continues as if never interrupted."""

    config: SeraConfig
    loop: Loop
    store: RunStore
    #: Whether the next forward pass is an iteration's first.
    _gate_pending = False
    _iteration = 0
    #: The optimizer as it was, made by the host once.
    _beginning: Beginning | None = None
    saved_step: int | None = None

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """The run continues from its own newest whole checkpoint, not from the host's find."""
        step = self.loop.step
        if step is None:
            return super().train(resume_from_checkpoint=None, **kwargs)
        path = checkpoint(Path(self.args.output_dir), step)
        restarts, schedule = self.config.restart_optimizer, self.loop.schedule
        ended = step == schedule.total_steps or (restarts and schedule.locate(step)[1] == 0)
        if self.is_deepspeed_enabled:  # which reads weights from its own files as well
            ended = restarts = False
        if not ended and not any(any(path.glob(name)) for name in _OPTIMIZER_FILES):
            other = ", or name the checkpoint of an iteration's end with resume_from_checkpoint"
            raise ValueError(
                f"{path} was saved without the optimizer (save_only_model), so the run cannot "
                "continue from it as if it had not been interrupted. Start fresh in another "
                f"output_dir without save_only_model{other if restarts else ''}."
            )
        # It would compare the policy with itself, in the middle of the curve.
        self.args.eval_on_start = False
        return super().train(resume_from_checkpoint=str(path), **kwargs)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any
    ) -> Any:
        """Under DeepSpeed remember theta_0 between the making of its engine and a checkpoint.

        Only its engine casts and parts the weights, and only it loads them.
        """
        if not self.is_deepspeed_enabled:
            return super()._prepare_for_training(
                max_steps, train_dataloader, resume_from_checkpoint
            )
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        hold_engine(self.model, self.model_wrapped)
        self.loop.recall()
        # An adapter that the run began with may have come from disk.
        self.optimizer.optimizer.refresh_fp32_params()
        if resume_from_checkpoint is not None:
            deepspeed_load_checkpoint(
                self.model_wrapped,
                resume_from_checkpoint,
                load_module_strict=not is_peft_model(self.model),
            )
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def _prepare_input(self, data: Any) -> Any:
        """Log-probabilities stay float32: in DeepSpeed's own type they would be rounded to nats."""
        if isinstance(data, torch.Tensor) and data.is_floating_point():
            return data.to(self.args.device)
        return super()._prepare_input(data)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Remember theta_0 before a checkpoint is loaded over it.

        Under FSDP that waits until the weights are where they will be used: before, they are in
        the host's memory, and with `cpu_ram_efficient_loading` on the first rank alone.
        """
        self.loop.recall()
        if self.is_fsdp_enabled and is_peft_model(self.model):
            # accelerate 1.13 saves only rank 0's part of the adapter for this, and would load it on
            # rank 0 alone. The checkpoint's adapter, as PEFT has it, is whole.
            self.loop.scorer.policies.load(Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        """Totals over iterations of unequal length; see transformers 5.16 for the tuple."""
        schedule = self.loop.schedule
        values = list(super().set_initial_training_values(args, dataloader))
        values[0] = len(schedule.pairs)
        values[1] = schedule.steps(1)
        values[3] = sum(schedule.pairs)
        values[5] = schedule.batches(1)
        values[6] = schedule.total_steps
        return tuple(values)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Where a resumed run continues, counted in steps of unequal iterations."""
        begins: tuple[int, int] = super()._init_training_state(*args, **kwargs)
        schedule = self.loop.schedule
        if self.state.global_step:
            iteration, steps = schedule.locate(self.state.global_step)
            begins = iteration - 1, steps * schedule.accumulation
        return begins

    def _run_epoch(self, *, epoch: int, train_dataloader: Any, **kwargs: Any) -> None:
        """One iteration: prepare D_t, then the host's own epoch over it."""
        loop, iteration = self.loop, epoch + 1
        begun = kwargs.get("steps_trained_in_current_epoch")
        resumed = bool(begun) and kwargs.get("epochs_trained") == epoch
        loop.recall()
        planned = loop.schedule.steps(iteration)
        pairs, held_out = loop.begin(iteration, resumed, self.optimizer)
        if pairs is None:
            self.state.max_steps = loop.schedule.total_steps
            self.control.should_training_stop = True
            return
        steps = loop.schedule.steps(iteration)
        if held_out is not None:
            self.refer_held_out_to(held_out)
        self.state.max_steps = loop.schedule.total_steps
        # The host has made the first iteration's, for as many steps as were planned.
        if self.config.restart_optimizer and not resumed and (iteration > 1 or steps != planned):
            self._restart_optimizer()
        self.train_dataset: Any = Dataset(InMemoryTable(pairs))
        loader = self.get_train_dataloader()
        self.callback_handler.train_dataloader = loader
        self._gate_pending = not resumed
        self._iteration = iteration
        kwargs |= {"steps_in_epoch": len(loader), "num_update_steps_per_epoch": steps}
        super()._run_epoch(epoch=epoch, train_dataloader=loader, **kwargs)

    def refer_held_out_to(self, logps: Mapping[str, FloatArray]) -> None:
        """Evaluate against these log-probabilities of both sides, (N,) each."""
        columns = {name: getattr(self.loop.held_out, name) for name in ID_COLUMNS}
        columns |= {f"ref_{side}_logps": values for side, values in logps.items()}
        self.eval_dataset: Any = Dataset(InMemoryTable(make_table(columns)))
        # Persistent workers would go on serving the last iteration's reference values.
        self._eval_dataloaders: dict[str, Any] = {}

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """With `sera.restart_optimizer` a schedule spans one iteration, not the run."""
        if self._beginning is None:
            self._beginning = Beginning(optimizer or self.optimizer)
        # A run that is continued knows more of its length than when the schedule began.
        num_training_steps = self.loop.planned_steps
        if self.config.restart_optimizer:
            schedule = self.loop.schedule
            iteration, _ = schedule.locate(self.state.global_step)
            num_training_steps = schedule.steps(min(iteration, len(schedule.pairs)))
        if num_training_steps == 1 and self.lr_scheduler is None:
            # Most schedules begin or end at zero, and would train nothing.
            self.lr_scheduler: Any = get_constant_schedule(optimizer or self.optimizer)
        with room_to_warm_up(self.args, num_training_steps):
            return super().create_scheduler(num_training_steps, optimizer)

    def _restart_optimizer(self) -> None:
        """Fresh optimizer state and learning-rate schedule for a new arg-min."""
        assert self._beginning is not None
        self._beginning.restore(self.optimizer, self.model)
        self.lr_scheduler = None
        self.create_scheduler(self.state.max_steps)
        self.callback_handler.lr_scheduler = self.lr_scheduler

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The host's checkpoint, sealed before an older one is removed; a step is saved once."""
        step = self.state.global_step
        if step == self.saved_step:
            return  # asked for again at the same step: the whole one stays
        self.require_finite_weights()
        directory = Path(self._get_output_dir(trial=trial))
        path = checkpoint(directory, step)

        def complete() -> None:
            write_json(path / RECORD, {"pairs": list(self.loop.schedule.pairs)})
            seal(path)

        # What is there was cut off, or the loop would have set it aside.
        self.store.ranks.on_main(lambda: shutil.rmtree(path, ignore_errors=True))
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with explained(directory):
                super()._save_checkpoint(model, trial)
                self.store.ranks.on_main(complete)
        finally:
            self.args.save_total_limit = limit
        self.saved_step = step
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(
                output_dir=str(directory), save_total_limit=limit, best_model_checkpoint=best
            )

    def require_finite_weights(self) -> None:
        """Raises ValueError where the policy's weights are not finite."""
        if not is_finite(self.model, self.store.ranks):
            raise ValueError(
                f"the policy's weights are not finite after step {self.state.global_step} "
                f"(iteration {self._iteration}), so they are not saved. {DIVERGED}"
            )
