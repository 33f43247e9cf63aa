"""Checkpoints: where a run continues, and what it saves for that."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer
from transformers.trainer_utils import rotate_checkpoints

from sera_plugin.config.sera import SeraConfig
from sera_plugin.host.loop import RECORD, Loop
from sera_plugin.host.step import DIVERGED
from sera_plugin.model.policies import is_finite
from sera_plugin.rundir import checkpoints
from sera_plugin.rundir.checksums import explained, seal
from sera_plugin.rundir.store import RunStore, write_json

#: Where the host saves the optimizer's state: alone and under DDP, under FSDP whole and in parts.
_OPTIMIZER_FILES = ("optimizer.pt", "optimizer.bin", "optimizer_0")


class ContinuedRun(AxolotlDPOTrainer):
    """A run continues from its own newest whole checkpoint, as if it had not been interrupted."""

    config: SeraConfig
    loop: Loop
    store: RunStore
    #: `resume_from_checkpoint` as the YAML has it, before the host puts its own find there.
    _asked_checkpoint: str | None
    _saved_step: int | None = None

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

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """See `transformers.Trainer.train`.

        Args:
            resume_from_checkpoint: the host's find; the run continues from its own (`Loop`).

        Raises:
            ValueError: if the checkpoint that the YAML asks for cannot be used.
        """
        self.open_run()
        step = self.loop.continue_from(self._asked_checkpoint)
        resume_from_checkpoint = None
        if step is not None:
            self._require_optimizer(step)
            resume_from_checkpoint = str(checkpoints.checkpoint(Path(self.args.output_dir), step))
            # It would compare the policy with itself, in the middle of the curve.
            self.args.eval_on_start = False
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _require_optimizer(self, step: int) -> None:
        path = checkpoints.checkpoint(Path(self.args.output_dir), step)
        _, steps = self.loop.schedule.locate(step)
        finished = step == self.loop.schedule.total_steps
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
        write_json(path / RECORD, self.loop.record())
        seal(path)

    def _require_finite_weights(self) -> None:
        if not is_finite(self.model, self.store.ranks):
            raise ValueError(
                f"the policy's weights are not finite after step {self.state.global_step} "
                f"(iteration {self._iteration}), so they are not saved. {DIVERGED}"
            )
