"""All figures of a plan, from its inputs. Arithmetic only.

Operations: a multiplication and its addition are two. Sources: Kaplan et al. 2020, "Scaling Laws
for Neural Language Models", section 2.1 (2 N operations per token forward, 4 N backward); Chowdhery
et al. 2022, "PaLM", appendix B (attention beside the weights); Korthikanti et al. 2022, "Reducing
Activation Recomputation in Large Transformer Models", section 4 (one more forward pass).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sera_plugin.algorithm.method import Pairs
from sera_plugin.model.budget import KEPT_LOGITS
from sera_plugin.tools.planning.advice import Case, Change, advise
from sera_plugin.tools.planning.counts import Iteration
from sera_plugin.tools.planning.disk import disk_parts
from sera_plugin.tools.planning.memory import Phase, host_parts
from sera_plugin.tools.planning.run import Run


def phase_flops(run: Run, iteration: Iteration, phase: str) -> float:
    """Operations of a phase.

    - Layers forward: each token times each weight, queries times keys, weights times values. Half
      of the pairs of tokens count, because attention is causal. Prompts that completions share are
      computed once.
    - Logits of the tokens that are scored or sampled; of others none are made.
    - Training: forward, backward for the activations, backward for the weights that are trained;
      layers again with checkpointing; logits again where a micro-batch has many.
    """
    model, work = run.model, iteration.phases[phase]
    attention = 2.0 * model.layers * model.queries * work.squares
    layers = 2.0 * model.matrices * work.forwarded + attention
    head = 2.0 * model.vocabulary * model.hidden * work.scored
    if phase != "train":
        return layers + head
    passes = 3 * (layers + head)
    if model.adapter:
        passes = 2 * (layers + head) + 2.0 * model.adapter * work.forwarded
    logits = run.micro_batch * run.counting.pairs.completions.mean() * model.vocabulary
    return passes + (layers if run.checkpointing else 0.0) + (head if logits > KEPT_LOGITS else 0.0)


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
    """Seconds of an iteration's phases, named as in summary.json, of their operations.

    The host's evaluations lie between training steps, so their time is part of `train`.
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


@dataclass(frozen=True)
class Plan:
    """What a run will do and need.

    Attributes:
        about: what the run is, for the reader: name, value.
        run, pairs: the run and its data as token ids.
        tokenizer: bytes of the tokenizer's files.
        device: what it is compared with.
        room: bytes of host memory and disk that are free, None where the run is elsewhere.
        notes: what the figures leave out.
        speed: of this machine, None where it is not known.
        speed_from: where the speed comes from.
    """

    about: Mapping[str, Any]
    run: Run
    pairs: Pairs
    tokenizer: int
    device: str
    room: tuple[int, int] | None
    notes: list[str]
    speed: Speed | None
    speed_from: str

    @cached_property
    def iterations(self) -> list[Iteration]:
        return list(self.run.counting.iterations())

    @cached_property
    def flops(self) -> list[dict[str, float]]:
        """By phase, an iteration each."""
        return [
            {phase: phase_flops(self.run, one, phase) for phase in one.phases}
            for one in self.iterations
        ]

    @cached_property
    def seconds(self) -> list[dict[str, float]] | None:
        if self.speed is None:
            return None
        each = zip(self.iterations, self.flops, strict=True)
        return [phase_seconds(self.speed, one, flops) for one, flops in each]

    @cached_property
    def case(self) -> Case:
        return Case(self.run)

    @property
    def phases(self) -> list[Phase]:
        """The device's memory."""
        return self.case.phases

    @property
    def fits(self) -> bool | None:
        """Whether every phase does, None where there is nothing to compare with."""
        return None if self.run.memory is None else self.case.fits

    @cached_property
    def changes(self) -> list[Change]:
        """What makes it fit, empty where it does or where there is nothing to compare with."""
        return [] if self.case.fits else advise(self.case)

    @cached_property
    def host(self) -> dict[str, int]:
        return host_parts(self.run, self.phases)

    @cached_property
    def disk(self) -> dict[str, int]:
        return disk_parts(self.run, self.pairs, self.tokenizer)
