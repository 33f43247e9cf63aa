"""What one micro-batch optimises inside the host's trainer, and what stops a run there."""

import logging
import math
from typing import Any

import numpy as np
import torch
from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer

from sera_plugin.algorithm.trust import SIDES
from sera_plugin.host.epochs import DIVERGED, UnequalEpochs
from sera_plugin.model.losses import Again, Objective, PreferenceLoss, check_step_zero, pass_again

LOG = logging.getLogger("axolotl.sera")

RANDOM_PASSES = (
    "SeRA: base_model draws at random in training: of the same answer, passes of the same weights "
    "have log-probabilities that differ by {scatter} nats per square root of its tokens. The "
    "reference is right without that, and training goes on. For margins without that noise find "
    "what is above 0 in the model's config.json (router_jitter_noise, attention_dropout, ...), and "
    "set it to 0 there or in the YAML's overrides_of_model_config."
)


class GatedSteps(UnequalEpochs):
    """Steps of SeRA's losses, or the host's own; the first of each iteration passes the gate."""

    #: The host's own where `dpo_loss_type` asks for one.
    loss: PreferenceLoss | None
    _objective: Objective

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
        """SeRA's losses in place of TRL's, or the host's own where `dpo_loss_type` names one."""
        training = self.model.training
        recorded = self._metrics["train" if training else "eval"]
        if self.loss is None:
            result = super()._compute_loss(model, inputs, return_outputs)
            if training and self._gate_pending:
                # What the host records are means over all processes.
                inputs = inputs | {
                    name: self.accelerator.gather(values)
                    for name, values in inputs.items()
                    if name.endswith("_logps")
                }
                logps = [torch.tensor(recorded[f"logps/{side}"][-1]) for side in SIDES]
                self._pass_gate(inputs, *logps)
            if training:
                self._require_finite((result[0] if return_outputs else result).item())
            return result
        found = self._objective(model, inputs)
        loss = found.metrics.pop("loss")  # the host logs it itself
        tokens = round(found.metrics.pop("num_tokens") * self.store.ranks.world)
        if training:
            if self._gate_pending:
                sides = found.chosen_logps, found.rejected_logps
                self._pass_gate(inputs, *sides, found.preference_loss)
            self._require_finite(loss)
            self._total_train_tokens += tokens
        for name, value in found.metrics.items():
            recorded[name].append(value)
        recorded["num_tokens"] = [self._total_train_tokens]
        return (found.loss, found.outputs) if return_outputs else found.loss

    def _pass_gate(self, inputs: Any, chosen: Any, rejected: Any, loss: Any = None) -> None:
        self._gate_pending = False

        def repeat(over: bool) -> Again | None:
            # All ranks or none: over sharded weights a pass is a collective call.
            if not self.store.ranks.sum(np.array([float(over)])).any():
                return None
            with self.accelerator.autocast():
                return pass_again(self.model, inputs)

        figures = check_step_zero(inputs, chosen, rejected, self.loop.nats, loss, self.loss, repeat)
        self.loop.record(step_zero=figures)
        if "scatter" in figures:
            LOG.warning(RANDOM_PASSES.format(**figures))

    def _require_finite(self, loss: float) -> None:
        """The host would go on, and log the mean of earlier losses instead."""
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss is {loss} in step {self.state.global_step + 1} (iteration "
                f"{self._iteration}), so training stops here. {DIVERGED}"
            )
