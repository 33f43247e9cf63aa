"""The step: what one micro-batch optimises, and the checks on it that stop a run."""

from __future__ import annotations

import math
from typing import Any

import torch
from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer
from axolotl.utils.dict import DictDefault

from sera_plugin.config.sera import SeraConfig
from sera_plugin.host.loop import Loop
from sera_plugin.model.gate import check_step_zero
from sera_plugin.model.losses import PreferenceLoss
from sera_plugin.model.objective import Objective
from sera_plugin.rundir.store import RunStore

DIVERGED = (
    "Checkpoints and finished iterations are as they were. Start fresh in another output_dir with "
    "a lower learning_rate or a smaller rl_beta, or in bf16 or float32 instead of fp16."
)


class Collator:
    """TRL's collator, and log pi_{t-1} for the gate, which TRL has no name for."""

    def __init__(self, collate: Any) -> None:
        self.collate = collate

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = self.collate(examples)
        for name in ("policy_chosen_logps", "policy_rejected_logps"):
            if name in examples[0]:
                batch[name] = torch.tensor([example[name] for example in examples])
        return batch


class PreferenceStep(AxolotlDPOTrainer):
    """SeRA's losses in place of TRL's, or the host's own where `dpo_loss_type` names one."""

    config: SeraConfig
    loss: PreferenceLoss | None
    loop: Loop
    store: RunStore
    _objective: Objective
    #: Whether the next forward pass is an iteration's first.
    _gate_pending = False
    _iteration = 0

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
        mode = "train" if self.model.training else "eval"
        if self.loss is None:
            result = super()._compute_loss(model, inputs, return_outputs)
            recorded = self._metrics[mode]
            if self._gate_pending and mode == "train":
                # What the host records are means over all processes.
                references = {
                    name: self.accelerator.gather(values)
                    for name, values in inputs.items()
                    if name.endswith("_logps")
                }
                logps = [torch.tensor(recorded[f"logps/{s}"][-1]) for s in ("chosen", "rejected")]
                self._pass_gate(inputs | references, *logps)
            if mode == "train":
                self._require_finite((result[0] if return_outputs else result).item())
            return result
        result = self._objective(model, inputs)
        if mode == "train":
            if self._gate_pending:
                self._pass_gate(
                    inputs, result.chosen_logps, result.rejected_logps, result.preference_loss
                )
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
            inputs, chosen_logps, rejected_logps, self.loop.nats, loss, self.loss
        )
        self.loop.passed_gate(figures)

    def _require_finite(self, loss: float) -> None:
        """The host would go on, and log the mean of earlier losses instead."""
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss is {loss} in step {self.state.global_step + 1} (iteration "
                f"{self._iteration}), so training stops here. {DIVERGED}"
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
