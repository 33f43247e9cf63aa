"""Scoring and selection with two gloo ranks against one process, a thread each."""

import multiprocessing
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.harness import Setup, figure, interleave, markdown, times
from benchmarks.workload import load_model, longest_of, make_model, read_rows, vocabulary_of
from sera_plugin.algorithm.selection import select_largest
from sera_plugin.model.budget import scoring_budget
from sera_plugin.model.scoring import score_sequences
from sera_plugin.rundir.ranks import current_ranks

TITLE = "Two ranks"
KEPT = 0.7


def measure(setup: Setup) -> dict[str, Any]:
    """Seconds to score the pairs under two policies, by number of ranks and round.

    Raises:
        ValueError: on a GPU, or if two ranks select other pairs than one.
    """
    if setup.device != "cpu":
        raise ValueError("one GPU has one rank: this part is measured on a CPU")
    directory = make_model(setup)
    longest = longest_of(setup, directory)
    rows = read_rows(setup, 12, vocabulary_of(directory), longest)
    selections: dict[int, set[tuple[int, ...]]] = {1: set(), 2: set()}

    def run(world: int) -> float:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["benchmarks.preload"])
        answers, port = context.SimpleQueue(), free_port()
        processes = [
            context.Process(
                target=score_as_rank,
                args=(rank, world, port, setup, directory, rows, longest, answers),
            )
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise RuntimeError(f"{world} ranks ended with {[p.exitcode for p in processes]}")
        seconds, selected = answers.get()
        selections[world].add(tuple(selected))
        return float(seconds)

    sides = {str(world): lambda world=world: run(world) for world in (1, 2)}
    seconds = interleave(sides, setup.rounds, warm_up=False)
    if len(selections[1] | selections[2]) != 1:
        raise ValueError(f"the selections differ: {selections}")
    return {"pairs": len(rows), "kept": len(selections[1].pop()), "seconds": seconds}


def score_as_rank(
    rank: int,
    world: int,
    port: int,
    setup: Setup,
    directory: Path,
    rows: list[dict[str, str]],
    longest: int,
    answers: Any,
) -> None:
    """Score the pairs under two policies as one of `world` ranks; rank 0 answers."""
    torch.set_num_threads(1)
    if world > 1:
        address = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    ranks = current_ranks()
    model, tokenizer = load_model(setup, directory)

    def tokens(text: str) -> np.ndarray:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][: longest // 2 - 1]
        return np.array([*ids, tokenizer.eos_token_id], dtype=np.int32)

    prompts = [tokens(row["prompt"]) for row in rows] * 2
    completions = [tokens(row[side]) for side in ("chosen", "rejected") for row in rows]
    budget = scoring_budget(model, model.device, longest)

    def score() -> np.ndarray:
        found = score_sequences(
            model,
            prompts,
            completions,
            pad_id=int(tokenizer.pad_token_id),
            budget=budget,
            shard=ranks.shard,
        )
        return ranks.sum(found)

    ranks.barrier()
    start = time.perf_counter()
    before = score()
    seconds = time.perf_counter() - start
    # A policy that has moved, the same on every rank.
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=1e-3)
    ranks.barrier()
    start = time.perf_counter()
    reward = score() - before
    seconds += time.perf_counter() - start
    margins = np.subtract(*np.split(reward, 2))
    selected = select_largest(margins, round(KEPT * len(rows)))
    if ranks.main:
        answers.put((seconds, np.flatnonzero(selected).tolist()))
    if world > 1:
        dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def table(result: dict[str, Any]) -> str:
    seconds = result["seconds"]
    rows = [
        [ranks, figure(seconds[ranks], 1), times(seconds["1"], seconds[ranks])]
        for ranks in ("1", "2")
    ]
    return (
        f"{result['pairs']} pairs scored under two policies; the {result['kept']} pairs that are "
        "kept are the same.\n\n" + markdown(("ranks", "scoring, s", "faster by"), rows)
    )
