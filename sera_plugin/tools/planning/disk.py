"""Bytes that a run leaves in output_dir, and the most that are there at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sera_plugin.algorithm.method import Method, Pairs
from sera_plugin.rundir.store import make_table
from sera_plugin.tools.planning.counts import Iteration

#: Pairs that are compressed to see how well this dataset does.
_TRIED = 5_000
#: Model card, configuration and checksums beside each model.
_BESIDE = 2**13
#: A checkpoint's scheduler, random states, arguments and trainer_state.json.
_STATE = 2**17
#: An iteration's summary; the report.
_SUMMARY, _REPORT = 2**14, 2**18


@dataclass(frozen=True)
class Saving:
    """What is saved, and how often.

    Attributes:
        model: bytes of what is trained: an adapter, or all weights.
        base: bytes of the base model, which axolotl 0.19 writes beside an adapter; else 0.
        optimizer: bytes of its state, 0 with `save_only_model`.
        tokenizer: bytes of the tokenizer's files, which go beside every model.
        saves: checkpoints in the whole run.
        limit: `save_total_limit`; one more is there while a new one is written.
        adapter: whether policies are adapters, which are all kept.
    """

    model: int
    base: int
    optimizer: int
    tokenizer: int
    saves: int
    limit: int
    adapter: bool


def disk_parts(
    method: Method, pairs: Pairs, iterations: list[Iteration], saving: Saving
) -> dict[str, int]:
    """Bytes by what they are for, when the most is there.

    Args:
        method, pairs: the run's.
        iterations: as planned.
        saving: what is saved.
    """
    one = saving.model + saving.tokenizer + _BESIDE
    kept = min(saving.saves, saving.limit + 1)
    return {
        "policies": _policies(method, len(iterations), saving) * one,
        "checkpoints": kept * (one + saving.optimizer + _STATE),
        "trained model": one + saving.base,
        "tables": _tables(method, pairs, iterations),
    }


def _policies(method: Method, iterations: int, saving: Saving) -> int:
    """How many `policy` directories with weights there are at once; see `Loop._oldest_needed`."""
    if saving.adapter:
        return iterations
    oldest = 1  # a base model's theta_0 is a pointer
    if not method.config.keep_policies:
        # Checkpoints at the ends of iterations: those that are kept begin the next ones.
        begun = range(max(2, iterations - saving.limit + 1), iterations + 1)
        needed = [iterations - 1, method.oldest_policy(iterations + 1)]
        if saving.saves:
            needed += [method.oldest_policy(t) for t in begun]
        oldest = max(1, min(needed))
    return max(0, iterations - oldest)


def _tables(method: Method, pairs: Pairs, iterations: list[Iteration]) -> int:
    """Parquet files: tokens as well as this dataset's compress, and figures, which hardly do."""
    tried = np.arange(min(len(pairs), _TRIED))
    columns = (pairs.prompt_ids, pairs.chosen_ids, pairs.rejected_ids)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    sample = {name: column.take(tried) for name, column in zip(names, columns, strict=True)}
    tokens = sum(int(column.lengths.sum()) for column in sample.values())
    per_token = _compressed(make_table(sample)) / tokens
    total = sum(int(column.lengths.sum(dtype=np.int64)) for column in columns) * per_token
    for iteration in iterations:
        first = iteration.number == 1
        # offline.parquet: two log-probabilities, three lengths; then rewards, margin, selected.
        total += len(pairs) * (2 * 8 + 3 * 2 if first else 5 * 8 + 3 * 2)
        held_out = iteration.phases.get("score_evaluation")
        if held_out is not None:
            total += held_out.sequences / 2 * (2 * 8 + 2 * 2)
        sampled = iteration.phases.get("sample")
        if sampled is not None:
            logps = len(method.candidates_under(iteration.number))
            total += sampled.tokens * per_token + sampled.sequences * 8 * (logps + 1)
            total += len(pairs) * 8
    return round(total) + len(iterations) * _SUMMARY + _REPORT


def _compressed(table: pa.Table) -> int:
    """Bytes of a table as the run directory would have it."""
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd")
    return int(buffer.getvalue().size)
