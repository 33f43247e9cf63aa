"""Several processes: who does what, waiting, and a real run on two gloo ranks."""

import os
import shutil
import time
from datetime import timedelta
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from sera_plugin.algorithm.chunks import all_samples
from sera_plugin.model.budget import TokenBudget
from sera_plugin.model.policies import (
    PolicyHistory,
    is_finite,
    is_sharded,
    restore_snapshot,
    take_snapshot,
    whole_weights,
)
from sera_plugin.rundir import ranks as rank_module
from sera_plugin.rundir.format import read_json
from sera_plugin.rundir.ranks import NO_PART, WHOLE, RankLost, Ranks, Shard
from sera_plugin.rundir.store import RunStore, make_table
from tests.conftest import summary, table
from tests.two_ranks import (
    assert_alike,
    assert_fitted_alike,
    assert_theta_1_is_kept,
    assert_weights_are_close,
    free_port,
    join,
    launch,
    of_kind,
    of_two_ranks,
)


def test_shards_take_every_piece_once():
    pieces, sizes = list("abcdefg"), [9, 9, 8, 5, 4, 4, 3]
    assert WHOLE.of(pieces, sizes) == pieces
    assert NO_PART.of(pieces, sizes) == []
    # 9, 9, 8 first; 5 to the 8; 4 and 4 to the nines; 3 to one of three 13s, the first.
    parts = [["a", "e", "g"], ["b", "f"], ["c", "d"]]
    assert [Shard(index, 3).of(pieces, sizes) for index in range(3)] == parts
    assert Shard(1, 3).idle(pieces) == 0


def test_no_rank_has_more_than_one_piece_too_many():
    sizes = sorted(np.random.default_rng(3).pareto(1.5, 400).astype(int).tolist(), reverse=True)
    for count in (2, 3, 8):
        places = [Shard(index, count).of(range(400), sizes) for index in range(count)]
        assert sorted(place for part in places for place in part) == list(range(400))
        loads = [sum(sizes[place] for place in part) for part in places]
        # The part with most got its last piece when no other had less.
        assert max(loads) - min(loads) <= max(sizes[part[-1]] for part in places)


@pytest.mark.parametrize("pieces", [0, 1, 2, 5, 6, 7])
def test_ranks_in_step_take_turns_together(pieces):
    work = list(range(pieces))
    shards = [Shard(index, 3, in_step=True) for index in range(3)]
    parts = [shard.of(work, [1] * pieces) for shard in shards]
    assert sorted(place for part in parts for place in part) == work
    turns = {len(part) + shard.idle(work) for shard, part in zip(shards, parts, strict=True)}
    assert turns == {-(-pieces // 3)}


@pytest.mark.parametrize(
    ("machines", "size", "expected"),
    [
        ((1,), 2, [WHOLE]),  # one process may have several devices of its own
        ((2,), 1, [Shard(0, 2), Shard(1, 2)]),
        ((2,), 2, [Shard(0, 1), NO_PART]),
        ((3, 3), 3, [Shard(0, 2), NO_PART, NO_PART, Shard(1, 2), NO_PART, NO_PART]),
        ((2, 4), 2, [Shard(0, 3), NO_PART, Shard(1, 3), NO_PART, Shard(2, 3), NO_PART]),
    ],
)
def test_ranks_share_engines(machines, size, expected):
    found = [Ranks(rank, machines).engine_shard(size) for rank in range(sum(machines))]
    assert found == expected
    rows = list(range(37))
    assert sorted(row for shard in found for row in shard.of(rows, rows)) == rows
    with pytest.raises(ValueError, match=r"tensor_parallel_size: 3 .* 4 processes.* 1, 2, 4\."):
        Ranks(0, (4,)).engine_shard(3)
    with pytest.raises(ValueError, match=r"4 does not divide the 4 and 6 processes .* 1, 2\."):
        Ranks(0, (4, 6)).engine_shard(4)


def test_a_machine_has_its_ranks():
    ranks = [Ranks(rank, (1, 3, 2)) for rank in range(6)]
    assert [(one.first, one.local_world) for one in ranks] == [(0, 1), *[(1, 3)] * 3, *[(4, 2)] * 2]


def _meet(rank: int, port: int, directory: str) -> None:
    # The host's collectives would give up after a second.
    ranks = join(rank, port, timeout=timedelta(seconds=1))
    assert (ranks.rank, ranks.world, ranks.local_world) == (rank, 2, 2)
    assert ranks.words(("first", "zweiter, ä")[rank]) == ["first", "zweiter, ä"]
    store = RunStore(directory, ranks)
    assert store.read(1, "offline") is None
    if rank == 1:
        time.sleep(3)  # rank 0 waits three times as long
    total = ranks.sum(np.array([1.0 + rank, np.nan if rank else 0.0, np.inf * (1 - rank)]))
    np.testing.assert_array_equal(total[:2], [3.0, np.nan])
    columns = {"row": [0], "chosen_length": [1 + rank], "rejected_length": [1]}
    columns |= {"prompt_length": [1]}
    store.write(1, "offline", make_table(columns | {"chosen_logp": [0.0], "rejected_logp": [0.0]}))
    assert store.read(1, "offline")["chosen_length"].to_pylist() == [1]  # only rank 0 has written
    reason = "stop" if rank else "length"
    chunk = {"row": [rank], "candidate": [0], "token_ids": [[7] * (2 + rank)]}
    store.append_samples(2, make_table(chunk | {"finish_reason": [reason]}))
    ranks.barrier()
    everything = all_samples(store, 2, np.array([[-2.0], [3.0]]))
    assert everything["row"].to_pylist() == [0, 1]
    assert everything["token_ids"].to_pylist() == [[7, 7], [7, 7, 7]]
    assert everything["finish_reason"].to_pylist() == ["length", "stop"]
    store.remove_samples(2)
    assert list(store.chunks(2)) == []
    dist.destroy_process_group()


def _meet_sharded(rank: int, ranks: Ranks) -> None:
    torch.manual_seed(1)
    # 3 rows cannot be halved, and of 1 row the second rank has none.
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 1))
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    assert not is_sharded(model)
    before = take_snapshot(model)
    for layer in model:
        fully_shard(layer, mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    assert is_sharded(model)
    parts = take_snapshot(model)
    assert [len(parts["0.weight"]), len(parts["1.weight"])] == ([2, 1], [1, 0])[rank]
    x = torch.ones(2, 4)
    with torch.no_grad():
        value = model(x)
        # The forward pass has left whole weights behind, which nothing may be written to.
        for weight in model.parameters():
            weight.zero_()
        restore_snapshot(model, {name: torch.zeros_like(part) for name, part in parts.items()})
        assert model(x).abs().sum() == 0
        for snapshot in (parts, before):
            restore_snapshot(model, {name: torch.zeros_like(part) for name, part in parts.items()})
            restore_snapshot(model, snapshot)
            assert torch.equal(model(x), value)
    whole = whole_weights(model, trainable_only=False)
    assert whole.keys() == (before.keys() if rank == 0 else set())
    assert all(torch.equal(weight, before[name]) for name, weight in whole.items())
    assert is_finite(model, ranks)
    if rank == 1:  # the last row of the first weight is its part
        part = take_snapshot(model)
        part["0.weight"][0, 0] = float("nan")
        restore_snapshot(model, part)
    assert is_finite(model, Ranks()) == (rank == 0)
    assert not is_finite(model, ranks)


#: A weight of a small model.
NAME = "model.embed_tokens.weight"


@torch.no_grad()
def _hold_policies_once(rank: int, ranks: Ranks, directory: str) -> None:
    torch.manual_seed(rank)  # the first rank's policy becomes everybody's
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 9}
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes)).to(torch.bfloat16)
    model.model.embed_tokens.float()  # of another type than the rest, as the host has it
    history = PolicyHistory(model, RunStore(directory, ranks), "base", Mock())
    history.keep_initial(recorded=False)
    first = take_snapshot(model)
    seen = ranks.sum(first[NAME].double().numpy().ravel())
    np.testing.assert_array_equal(seen, 2 * first[NAME].double().numpy().ravel())

    def train() -> dict[str, torch.Tensor]:
        for weight in model.parameters():
            weight.add_(1.0)
        return take_snapshot(model)

    def holds(snapshot: dict[str, torch.Tensor]) -> bool:
        return all(map(torch.equal, take_snapshot(model).values(), snapshot.values()))

    second = train()
    history.keep_current(1)
    with history.at(0):
        assert holds(first)
    assert holds(second)
    # Continued in the middle of iteration 2: only the first rank of a machine reads theta_1.
    third = train()
    history.current = None
    del history._snapshots[1]
    if rank == 1:
        history._read = Mock(side_effect=AssertionError)
    with history.at(1):
        assert holds(second)
    assert holds(third)
    everywhere = history._snapshots[1][NAME]
    ranks.barrier()  # both have read it
    if rank == 0:
        everywhere.fill_(7.0)
    ranks.barrier()
    assert (everywhere == 7).all()
    if rank == 1:  # whatever the reason may be
        rank_module.open = Mock(side_effect=PermissionError)
    apart = history._snapshot()[NAME]
    if rank == 0:
        apart.fill_(7.0)
    ranks.barrier()
    assert (apart == (7 if rank == 0 else third[NAME])).all()


def _everything(rank: int, ports: list[int], directory: str) -> None:
    _meet(rank, ports[0], directory)
    ranks = join(rank, ports[1])
    _hold_policies_once(rank, ranks, directory)
    _meet_sharded(rank, ranks)
    if rank == 1:
        os._exit(3)
    with pytest.raises(
        RankLost, match=r"ended; it says why\. .*auto_resume_from_checkpoints: true"
    ):
        ranks.barrier()


def test_ranks_wait_for_each_other_share_weights_out_and_end_with_one_that_dies(tmp_path):
    """Only the first one writes. One pair of processes for all of it: they take long to start."""
    ports = [free_port() for _ in range(2)]
    context = mp.spawn(_everything, (ports, str(tmp_path)), nprocs=2, join=False, daemon=True)
    for process in context.processes:
        process.join(240)
    codes = [process.exitcode for process in context.processes]
    if codes != [0, 3]:
        context.join(timeout=1)  # raises what was raised there
    assert codes == [0, 3]
    assert (tmp_path / "sera/iteration-01/offline.parquet").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    ["lora", *(pytest.param(o, marks=pytest.mark.nightly) for o in ("full", "qlora", "fitted"))],
)
def test_two_ranks_give_what_one_process_gives(base_config, train, tmp_path, kind):
    config = of_kind(base_config | {"num_epochs": 2}, kind)
    two = config | {"output_dir": str(tmp_path / "two"), "gradient_accumulation_steps": 1}
    result = launch(two, tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert (result.stdout + result.stderr).count("SeRA iteration 2 is trained") == 1
    one, other = train(config).run, tmp_path / "two/sera"
    # The same batches on either side.
    assert_alike(one, other, 2)
    weights = "adapter_model.safetensors" if "lora" in kind else "model.safetensors"
    assert_weights_are_close(one.parent / weights, other.parent / weights)
    first, second = summary(one, 2), summary(other, 2)
    if kind == "fitted":
        assert_fitted_alike(first, second)
    else:
        assert_theta_1_is_kept(other, weights)
    assert first["forwarded"] == second["forwarded"]
    assert first["pairs"] == second["pairs"]
    states = [read_json(run.parent / "checkpoint-6/trainer_state.json") for run in (one, other)]
    assert states[0]["global_step"] == states[1]["global_step"] == states[1]["max_steps"]


def test_no_rank_goes_on_in_smaller_batches_alone():
    work = Mock(side_effect=RuntimeError("CUDA out of memory."))
    with pytest.raises(ValueError, match=r"scoring 2 sequences of 5 .* all processes together"):
        list(TokenBudget(10).run([[0, 1]], [5, 5], work, in_step=True))
    work.assert_called_once_with([0, 1])


@pytest.mark.slow
@pytest.mark.nightly
def test_a_run_goes_on_with_fewer_processes(base_config, train, tmp_path):
    two = of_two_ranks(base_config) | {"saves_per_epoch": 3, "output_dir": str(tmp_path / "two")}
    result = launch(two, tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    run, final = tmp_path / "two/sera", tmp_path / "two/adapter_model.safetensors"
    whole = shutil.copy(final, tmp_path / "whole.safetensors")
    before = table(run, 2, "candidates")
    # Cut off after one step of iteration 2, with theta_1 scored and sampled anew.
    for step in (5, 6):
        shutil.rmtree(tmp_path / f"two/checkpoint-{step}")
    for name in ("offline", "candidates"):
        (run / f"iteration-02/{name}.parquet").unlink()
    with pytest.raises(ValueError, match=r"pairs per optimizer step .*: 8 -> 4"):
        train(two)
    train(two | {"gradient_accumulation_steps": 2})
    assert table(run, 2, "candidates")["token_ids"] == before["token_ids"]
    assert_weights_are_close(Path(whole), final)
