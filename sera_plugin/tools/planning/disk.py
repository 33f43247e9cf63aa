"""Bytes that a run leaves in output_dir, and the most that are there at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sera_plugin.algorithm.method import Pairs
from sera_plugin.rundir.store import make_table
from sera_plugin.tools.planning.counts import iterations
from sera_plugin.tools.planning.run import Run

#: Pairs that are compressed to see how well this dataset does.
_TRIED = 5_000
#: Model card, configuration and checksums beside each model; a checkpoint's scheduler, random
#: states, arguments and trainer_state.json; an iteration's summary; the report.
_BESIDE, _STATE, _SUMMARY, _REPORT = 2**13, 2**17, 2**14, 2**18
#: Checkpoints that the host keeps unless configured otherwise.
_LIMIT = 4


def existing(place: Path) -> Path:
    """The nearest directory that is there."""
    place = place.expanduser().absolute()
    return next(each for each in (place, *place.parents) if each.exists())


def disk_parts(run: Run, pairs: Pairs, tokenizer: int) -> dict[str, int]:
    """Bytes by what they are for, when the most is there.

    `pairs` is the data as token ids; `tokenizer` bytes of the tokenizer's files go beside every
    model.
    """
    cfg, model = run.cfg, run.model
    one = model.trained_bytes + tokenizer + _BESIDE
    saves, limit = _saves(run), int(cfg.get("save_total_limit") or _LIMIT)
    optimizer = 0 if cfg.get("save_only_model") else run.states
    return {
        "policies": _policies(run, saves, limit) * one,
        # One more is there while a new one is written.
        "checkpoints": min(saves, limit + 1) * (one + optimizer + _STATE),
        # axolotl 0.19 writes the base model beside an adapter.
        "trained model": one + (model.weights if model.adapter else 0),
        "tables": _tables(run, pairs),
    }


def _saves(run: Run) -> int:
    """Checkpoints in the whole run: one at every iteration's end, whatever else is asked for."""
    if str(run.cfg.get("save_strategy") or "").removeprefix("SaveStrategy.").lower() == "no":
        return 0
    every, iterations = run.cfg.get("save_steps"), run.method.iterations
    if not every:
        return iterations
    within = round(1 / every) if every < 1 else run.schedule.total_steps // int(every)
    return max(iterations, within)


def _policies(run: Run, saves: int, limit: int) -> int:
    """How many `policy` directories with weights there are at once; see `Loop._oldest_needed`."""
    method, iterations = run.method, run.method.iterations
    if run.model.adapter:
        return iterations
    oldest = 1  # a base model's theta_0 is a pointer
    if not method.config.keep_policies:
        needed = [iterations - 1, method.oldest_policy(iterations + 1)]
        if saves:  # those that are kept begin the next ones
            begun = range(max(2, iterations - limit + 1), iterations + 1)
            needed += [method.oldest_policy(t) for t in begun]
        oldest = max(1, min(needed))
    return max(0, iterations - oldest)


def _tables(run: Run, pairs: Pairs) -> int:
    """Parquet files: tokens as well as this dataset's compress, and figures, which hardly do."""
    tried = np.arange(min(len(pairs), _TRIED))
    columns = {name: getattr(pairs, name) for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    sample = {name: column.take(tried) for name, column in columns.items()}
    buffer = pa.BufferOutputStream()
    pq.write_table(make_table(sample), buffer, compression="zstd")
    tokens = sum(int(column.lengths.sum()) for column in sample.values())
    per_token = buffer.getvalue().size / tokens
    total = sum(int(each.lengths.sum(dtype=np.int64)) for each in columns.values()) * per_token
    for one in iterations(run):
        # offline.parquet: two log-probabilities, three lengths; then rewards, margin, selected.
        total += len(pairs) * (2 * 8 + 3 * 2 if one.t == 1 else 5 * 8 + 3 * 2)
        if held_out := one.phases.get("score_evaluation"):
            total += held_out.sequences // 2 * (2 * 8 + 2 * 2)
        if sampled := one.phases.get("sample"):
            logps = len(run.method.candidates_under(one.t))
            total += sampled.tokens * per_token + sampled.sequences * 8 * (logps + 1)
            total += len(pairs) * 8
    return round(total) + run.method.iterations * _SUMMARY + _REPORT
