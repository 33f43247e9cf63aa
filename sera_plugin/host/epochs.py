"""Epochs of unequal length: each trains on its own dataset, against its own reference.

The host plans one dataset of one length for all epochs. Its totals, its learning-rate schedule and
where a continued run goes on are counted anew here.
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from datasets.table import InMemoryTable
from transformers import ProgressCallback, TrainerCallback
from transformers.trainer_utils import SaveStrategy

from sera_plugin.host.step import PreferenceStep


class EndOfIteration(TrainerCallback):
    """Completes an iteration before the host saves the epoch's end."""

    def __init__(self, trainer: UnequalEpochs) -> None:
        self.trainer = trainer

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.end_iteration(state, control)


class TrainingBar(ProgressCallback):
    """The host's bar, without SeRA's figures: they are for trackers, and the log has a summary."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not any(name.startswith("sera/") for name in logs):
            super().on_log(args, state, control, logs=logs, **kwargs)


class UnequalEpochs(PreferenceStep):
    """One iteration of the loop per epoch of the host."""

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
        schedule = self.loop.schedule
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
        loop = self.loop
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
        self._require_finite_weights()
        self.loop.end()
        if self.args.save_strategy != SaveStrategy.NO and self._saved_step != state.global_step:
            control.should_save = True

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """With `sera.restart_optimizer` a schedule spans one iteration, not the run."""
        # A run that is continued knows more of its length than when the schedule began.
        num_training_steps = self.loop.planned_steps
        if self.config.restart_optimizer:
            schedule = self.loop.schedule
            iteration, _ = schedule.locate(self.state.global_step)
            num_training_steps = schedule.steps(min(iteration, len(schedule.pairs)))
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
