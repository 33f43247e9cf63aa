"""Pairs, steps, tokens, operations and seconds of each iteration before it happens, and its files.

Scoring the offline and the held-out pairs is known exactly. What is sampled is not there yet: it is
counted at an expected length, with the most that there can be beside it.

Operations: a multiplication and its addition are two. Sources: Kaplan et al. 2020, "Scaling Laws
for Neural Language Models", section 2.1 (2 N operations per token forward, 4 N backward); Chowdhery
et al. 2022, "PaLM", appendix B (attention beside the weights); Korthikanti et al. 2022, "Reducing
Activation Recomputation in Large Transformer Models", section 4 (one more forward pass).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from sera_plugin.algorithm.pairs import Pairs
from sera_plugin.model.forward import KEPT_LOGITS
from sera_plugin.rundir.store import layout, make_table
from sera_plugin.tools.planning.run import Run

#: Pairs that are compressed to see how well this dataset does.
_TRIED = 5_000
#: Model card, configuration and checksums beside each model; a checkpoint's scheduler, random
#: states, arguments and trainer_state.json; an iteration's summary; the report.
_BESIDE, _STATE, _SUMMARY, _REPORT = 2**13, 2**17, 2**14, 2**18
#: Checkpoints that the host keeps unless configured otherwise.
_LIMIT = 4


def lengths(*tokens: npt.NDArray[np.int64]) -> Any:
    """(N,) records of the tokens of pairs, from those of prompts, chosen and rejected answers.

    `completions` are both answers together, `both` has the prompt with each of them, `longer` is
    the longer of the two sequences.
    """
    prompt, chosen, rejected = tokens
    completions = chosen + rejected
    derived = completions, 2 * prompt + completions, prompt + np.maximum(chosen, rejected)
    names = ("prompt", "chosen", "rejected", "completions", "both", "longer")
    return np.rec.fromarrays([*tokens, *derived], dtype=[(name, np.int64) for name in names])


class Work(NamedTuple):
    """What one phase puts through the model. `tokens` is counted as in summary.json."""

    sequences: int  # prompts with a completion, or samples
    tokens: int  # expected: in sampling the sampled ones, else a prompt with each completion
    most: int  # the most that there can be; equal to `tokens` where these are exact
    forwarded: float  # expected, with prompts that several completions share counted once
    scored: float  # expected tokens of completions, for which there are logits
    squares: float  # expected sum of squared sequence lengths, for attention

    def plus(self, other: Work) -> Work:
        both: Any = zip(self, other, strict=True)
        return Work(*map(sum, both))

    def times(self, factor: float) -> Work:
        return Work(*(round(factor * n) for n in self[:3]), *(factor * n for n in self[3:]))


class Iteration(NamedTuple):
    """Iteration t (1-based): |D_t| in its two parts, optimizer steps, and work by phase.

    Phases are named as in summary.json; `evaluate` is the host's evaluations.
    """

    t: int
    kept: int
    bootstrapped: int
    steps: int
    phases: dict[str, Work]

    @property
    def pairs(self) -> int:
        return self.kept + self.bootstrapped


def iterations(run: Run) -> list[Iteration]:
    """All iterations of a run; the last one's work has that of the end of training with it."""
    method, known, found = run.method, {"score_offline": _scoring(run.pairs)}, []
    if len(run.held_out):
        known["score_evaluation"] = _scoring(run.held_out)
    for t in range(1, method.iterations + 1):
        kept, bootstrapped, phases = method.kept(t), method.sampled(t), dict(known)
        if bootstrapped:
            phases["sample"] = sampled = _sampling(run)
            # Each under every policy that its reward needs, its prompt with it.
            prompts = int(method.config.candidates * run.prompts.sum())
            scored = sampled._replace(tokens=prompts + sampled.tokens, most=prompts + sampled.most)
            phases["score_candidates"] = scored.times(len(method.candidates_under(t)))
        phases["train"] = _training(run, kept, bootstrapped)
        if "score_evaluation" in known and (often := evaluations(run)):
            # Trainer.evaluate computes the prompt with each of its completions.
            once = known["score_evaluation"].times(often)
            phases["evaluate"] = once._replace(forwarded=float(once.tokens))
        if t == method.iterations and run.judges:  # theta_T, which no iteration's reward needs
            phases["score_evaluation"] = known["score_evaluation"].times(2)
        found.append(Iteration(t, kept, bootstrapped, run.schedule.steps(t), phases))
    return found


def _passes(prompt: npt.NDArray[Any], completion: npt.NDArray[Any]) -> Work:
    """A completion after each prompt."""
    both = prompt + completion
    tokens, scored = float(both.sum()), float(completion.sum())
    squares = float((both**2).sum())
    return Work(len(both), round(tokens), round(tokens), tokens, scored, squares)


def _scoring(pairs: Any) -> Work:
    """Both completions of every pair."""
    work = _passes(pairs.prompt, pairs.chosen).plus(_passes(pairs.prompt, pairs.rejected))
    return work._replace(forwarded=work.forwarded - float(pairs.prompt.sum()))


def _sampling(run: Run) -> Work:
    candidates, prompt = run.method.config.candidates, run.prompts
    work = _passes(prompt, run.expected).times(candidates)
    return work._replace(
        tokens=round(work.scored),
        most=int(candidates * run.limits.sum()),
        forwarded=float(prompt.sum()) + work.scored,
    )


def _training(run: Run, kept: int, bootstrapped: int) -> Work:
    """One epoch over D_t: kept pairs are as long as all are on average."""
    offline, prompt = _scoring(run.pairs), run.prompts
    sampled = _passes(prompt, run.expected).times(2 * bootstrapped / len(prompt))
    work, padded = offline.times(kept / len(run.pairs)).plus(sampled), padding(run)
    # At most: the longest pairs are kept, and prompts with the longest samples trained.
    of_prompt = np.repeat(2 * (prompt + run.limits), run.method.pairs_per_prompt)
    each = (run.pairs.both, kept), (of_prompt, bootstrapped)
    return work._replace(
        sequences=2 * (kept + bootstrapped),
        most=sum(int(np.sort(values)[::-1][:count].sum()) for values, count in each),
        forwarded=padded * work.tokens,
        squares=padded * work.squares,
    )


def padding(run: Run) -> float:
    """Tokens of training batches with padding, for each without.

    Both completions of a batch's pairs are padded to its longest sequence. One shuffle stands for
    all.
    """
    step = run.cfg.pad_to_multiple_of or 1
    longer = np.random.default_rng(run.cfg.seed or 0).permutation(run.pairs.longer)
    starts = np.arange(0, len(longer), run.cfg.micro_batch_size)
    sizes = np.diff(starts, append=len(longer))
    padded = -(-np.maximum.reduceat(longer, starts) // step) * step
    return float(2 * (sizes * padded).sum() / run.pairs.both.sum())


def evaluations(run: Run) -> float:
    """How often the host evaluates in an iteration; `eval_steps` below 1 are a share of all."""
    every, steps = run.cfg.eval_steps, run.schedule.total_steps
    if not every:
        return float(run.cfg.eval_strategy == "epoch")
    between = max(1.0, every * steps if every < 1 else every)
    return float(steps / between / run.method.iterations)


def flops(run: Run, phase: str, work: Work) -> float:
    """Operations of a phase.

    - Layers forward: each token times each weight, queries times keys, weights times values. Half
      of the pairs of tokens count, because attention is causal. Prompts that completions share are
      computed once.
    - Logits of the tokens that are scored or sampled; of others none are made.
    - Training: forward, backward for the activations, backward for the weights that are trained;
      layers again with checkpointing; logits again where a micro-batch has many.
    """
    model, again = run.model, run.cfg.gradient_checkpointing
    attention = 2.0 * model.layers * model.queries * work.squares
    layers = 2.0 * model.matrices * work.forwarded + attention
    head = 2.0 * model.vocabulary * model.hidden * work.scored
    if phase != "train":
        return layers + head
    passes = 3 * (layers + head)
    if model.adapter:
        passes = 2 * (layers + head) + 2.0 * model.adapter * work.forwarded
    logits = run.cfg.micro_batch_size * run.pairs.completions.mean() * model.vocabulary
    return passes + (layers if again else 0.0) + (head if logits > KEPT_LOGITS else 0.0)


@dataclass(frozen=True)
class Speed:
    """How fast a machine is at each kind of work."""

    scoring: float  # operations per second
    candidates: float  # the same in scoring candidates, which share prompts otherwise
    training: float
    sampling: float  # seconds per sampled token, all sequences of a batch together
    selecting: float = 0.0  # seconds per pair of an iteration
    engine: float = 0.0  # seconds to start and to stop an engine

    def seconds(self, iteration: Iteration, flops: dict[str, float], run: Run) -> dict[str, float]:
        """Of an iteration's phases, of their operations, which processes share without a loss.

        The host's evaluations lie between training steps, so their time is part of `train`.
        """
        count = run.processes
        rates = {"score_candidates": self.candidates, "train": self.training}
        found = {
            name: amount / rates.get(name, self.scoring) / count for name, amount in flops.items()
        }
        if "sample" in found:
            alone = 1 if run.sampler == "vllm-server" else count
            tokens = iteration.phases["sample"].tokens
            found["sample"] = tokens * self.sampling / alone + self.engine
        if "evaluate" in found:
            found["train"] += found.pop("evaluate")
        if iteration.t > 1:
            found["select"] = self.selecting * iteration.pairs
        return found


def disk_parts(run: Run, pairs: Pairs, tokenizer: int) -> dict[str, int]:
    """Bytes by what they are for, when the most is there.

    `pairs` is the data as token ids; `tokenizer` bytes of the tokenizer's files go beside every
    model.
    """
    one = run.model.trained_bytes + tokenizer + _BESIDE
    saves, limit = _saves(run), run.cfg.save_total_limit or _LIMIT
    optimizer = 0 if run.cfg.save_only_model else run.states
    return {
        "policies": _policies(run, saves, limit) * one,
        # One more is there while a new one is written.
        "checkpoints": min(saves, limit + 1) * (one + optimizer + _STATE),
        "trained model": one,
        "tables": _tables(run, pairs),
    }


def _saves(run: Run) -> int:
    """Checkpoints in the whole run: one at every iteration's end, whatever else is asked for."""
    every, within = run.cfg.save_steps, 0
    if run.cfg.save_strategy == "no":
        return 0
    if every:
        within = round(1 / every) if every < 1 else run.schedule.total_steps // int(every)
    return max(run.method.iterations, within)


def _policies(run: Run, saves: int, limit: int) -> int:
    """How many `policy` directories with weights there are at once; see `Loop._oldest_needed`."""
    method, iterations = run.method, run.method.iterations
    if run.model.adapter:
        return iterations + run.judges  # the last one, where another is kept
    needed = [iterations - 1, method.oldest_policy(iterations + 1)]
    if saves:  # those that are kept begin the next ones
        begun = range(max(2, iterations - limit + 1), iterations + 1)
        needed += [method.oldest_policy(t) for t in begun]
    # A base model's theta_0 is a pointer.
    oldest = 1 if method.config.keep_policies else max(1, min(needed))
    # An older one that is the best so far, and the last one.
    return max(0, iterations - oldest) + 2 * run.judges


def _tables(run: Run, pairs: Pairs) -> int:
    """Parquet files: tokens as well as this dataset's compress, and figures, which hardly do."""
    columns = {name: getattr(pairs, name) for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    tried = np.arange(min(len(pairs), _TRIED))
    sample = {name: column.take(tried) for name, column in columns.items()}
    table = make_table(sample)
    pq.write_table(table, buffer := pa.BufferOutputStream(), **layout(table.schema))
    tokens = sum(int(column.lengths.sum()) for column in sample.values())
    per_token = buffer.getvalue().size / tokens
    total = sum(int(each.lengths.sum(dtype=np.int64)) for each in columns.values()) * per_token
    total += int(run.more_prompts.sum()) * per_token
    for one in iterations(run):
        # offline.parquet: two log-probabilities, three lengths; then rewards, margin, selected.
        total += len(pairs) * (2 * 8 + 3 * 2 if one.t == 1 else 5 * 8 + 3 * 2)
        if held_out := one.phases.get("score_evaluation"):
            total += held_out.sequences // 2 * (2 * 8 + 2 * 2)
        if sampled := one.phases.get("sample"):
            logps = len(run.method.candidates_under(one.t))
            total += sampled.tokens * per_token + sampled.sequences * 8 * (logps + 1)
            total += len(run.prompts) * 8
    return round(total) + run.method.iterations * _SUMMARY + _REPORT
