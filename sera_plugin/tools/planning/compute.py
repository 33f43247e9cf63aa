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


def layers_flops(shape: Shape, tokens: float, squares: float) -> float:
    """Forward through the layers: each token times each weight, queries times keys, weights times
    values. Half of the pairs of tokens count, because attention is causal."""
    weights = shape.matrix_elements + shape.adapter_parameters
    return 2.0 * weights * tokens + 2.0 * shape.layers * shape.queries * squares


def head_flops(shape: Shape, scored: float) -> float:
    """Logits of the tokens that are scored; of others none are made."""
    return 2.0 * shape.vocabulary * shape.hidden * scored


def forward_flops(shape: Shape, work: Work) -> float:
    """A phase without gradients, with prompts that completions share computed once."""
    return layers_flops(shape, work.forwarded, work.squares) + head_flops(shape, work.scored)


def training_flops(shape: Shape, work: Work, checkpointing: bool, micro_batch: float) -> float:
    """Forward, backward for the activations, backward for the weights that are trained.

    Args:
        work: of the phase, tokens with padding.
        checkpointing: whether layers are computed again in the backward pass.
        micro_batch: completion tokens in one; where their logits are many, these are made again.
    """
    layers = layers_flops(shape, work.forwarded, work.squares)
    head = head_flops(shape, work.scored)
    if shape.adapter:
        trained = 2.0 * shape.adapter_parameters * work.forwarded
        passes = 2 * layers + trained + 2 * head
    else:
        passes = 3 * layers + 3 * head
    again = layers if checkpointing else 0.0
    return passes + again + (head if micro_batch * shape.vocabulary > KEPT_LOGITS else 0.0)


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


def phase_flops(
    shape: Shape, phase: str, work: Work, checkpointing: bool, micro_batch: float
) -> float:
    """See `training_flops` and `forward_flops`; sampling makes as many logits as tokens."""
    if phase == "train":
        return training_flops(shape, work, checkpointing, micro_batch)
    return forward_flops(shape, work)


def phase_seconds(speed: Speed, iteration: Iteration, flops: dict[str, float]) -> dict[str, float]:
    """Seconds of an iteration's phases, named as in summary.json.

    The host's evaluations lie between training steps, so their time is part of `train`.

    Args:
        speed: of the machine.
        iteration: what is done.
        flops: operations by phase.
    """
    found = {}
    for phase, work in iteration.phases.items():
        if phase == "sample":
            found[phase] = work.tokens * speed.sampling + speed.engine
        elif phase == "score_candidates":
            found[phase] = flops[phase] / speed.candidates
        elif phase == "train":
            found[phase] = flops[phase] / speed.training
        elif phase == "evaluate":
            found["train"] += flops[phase] / speed.scoring
        else:
            found[phase] = flops[phase] / speed.scoring
    if iteration.number > 1:
        found["select"] = speed.selecting * iteration.pairs
    return found
