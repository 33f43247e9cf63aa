"""Floating-point operations of each phase, and the seconds they take at a known speed.

A multiplication and its addition are two operations. Sources: Kaplan et al. 2020, "Scaling Laws for
Neural Language Models", section 2.1 (2 N operations per token forward, 4 N backward); Chowdhery et
al. 2022, "PaLM", appendix B (attention beside the weights); Korthikanti et al. 2022, "Reducing
Activation Recomputation in Large Transformer Models", section 4 (recomputation: one more forward
pass).
"""

from __future__ import annotations

from dataclasses import dataclass

from sera_plugin.model.memory import KEPT_LOGITS
from sera_plugin.tools.planning.counts import Iteration, Work
from sera_plugin.tools.planning.shape import Shape


def phase_flops(
    shape: Shape, phase: str, work: Work, checkpointing: bool, micro_batch: float
) -> float:
    """Operations of a phase.

    - Layers forward: each token times each weight, queries times keys, weights times values. Half
      of the pairs of tokens count, because attention is causal. Prompts that completions share are
      computed once.
    - Logits of the tokens that are scored or sampled; of others none are made.
    - Training: forward, backward for the activations, backward for the weights that are trained.

    Args:
        work: of the phase; in training its tokens with padding.
        checkpointing: whether layers are computed again in the backward pass.
        micro_batch: completion tokens in one; where their logits are many, these are made again.
    """
    weights = shape.matrix_elements + shape.adapter_parameters
    attention = 2.0 * shape.layers * shape.queries * work.squares
    layers = 2.0 * weights * work.forwarded + attention
    head = 2.0 * shape.vocabulary * shape.hidden * work.scored
    if phase != "train":
        return layers + head
    passes = 3 * (layers + head)
    if shape.adapter:
        passes = 2 * (layers + head) + 2.0 * shape.adapter_parameters * work.forwarded
    logits_again = head if micro_batch * shape.vocabulary > KEPT_LOGITS else 0.0
    return passes + (layers if checkpointing else 0.0) + logits_again


@dataclass(frozen=True)
class Speed:
    """How fast a machine is at each kind of work.

    Attributes:
        scoring, candidates, training: operations per second in scoring pairs, in scoring
            candidates (which share prompts otherwise) and in training.
        sampling: seconds per sampled token, all sequences of a batch together.
        selecting: seconds per pair of an iteration.
        engine: seconds to start and to stop an engine, 0 without one.
    """

    scoring: float
    candidates: float
    training: float
    sampling: float
    selecting: float = 0.0
    engine: float = 0.0


def phase_seconds(speed: Speed, iteration: Iteration, flops: dict[str, float]) -> dict[str, float]:
    """Seconds of an iteration's phases, named as in summary.json.

    The host's evaluations lie between training steps, so their time is part of `train`.

    Args:
        speed: of the machine.
        iteration: what is done.
        flops: operations by phase.
    """
    rates = {"score_candidates": speed.candidates, "train": speed.training}
    found = {phase: flops[phase] / rates.get(phase, speed.scoring) for phase in iteration.phases}
    if "sample" in found:
        found["sample"] = iteration.phases["sample"].tokens * speed.sampling + speed.engine
    if "evaluate" in found:
        found["train"] += found.pop("evaluate")
    if iteration.number > 1:
        found["select"] = speed.selecting * iteration.pairs
    return found
