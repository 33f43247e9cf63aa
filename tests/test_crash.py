"""Killed runs, continued, against uninterrupted ones; `make test-crash` tries many more points."""

import re
import shutil

import pytest

from sera_plugin.rundir.store import RunStore, make_table
from tests.conftest import flip
from tests.crash.compare import Ledger, differences, left_behind, read_trace
from tests.crash.points import KINDS, PHASES, Point, choose_points, run


def sampled(iteration, *rows):
    """What a run tells of a chunk that it sampled and kept."""
    chunk = {"iteration": iteration, "rows": list(rows)}
    return [{"event": "sampled", **chunk}, {"event": "kept", **chunk}]


def step(iteration, number):
    return {"event": "step", "iteration": iteration, "step": [number, 0]}


def test_rows_sampled_again_are_counted_unless_their_policy_was_trained_anew(tmp_path):
    ledger = Ledger()
    ledger.add([step(1, 0), step(1, 1), *sampled(2, 0, 1), *sampled(2, 2)], tmp_path)
    # A chunk that was not kept, and one that was already there when the run was killed.
    ledger.add([{"event": "sampled", "iteration": 2, "rows": [3]}], tmp_path)
    ledger.add(sampled(2, 2, 3), tmp_path)
    assert ledger.sampled_twice == [(2, 2)]
    assert ledger.repeated_steps == 0
    # theta_1 is made again from its last checkpoint: what was sampled from it is void.
    ledger.add([step(1, 1), *sampled(2, 0, 1, 2, 3)], tmp_path)
    assert len(ledger.sampled_twice) == 1
    assert ledger.repeated_steps == 1


def test_rows_on_disk_count_as_sampled(tmp_path):
    store, ledger = RunStore(tmp_path), Ledger()
    columns = {"candidate": [0], "token_ids": [[1]], "finish_reason": ["stop"]}
    store.append_samples(2, make_table({"row": [4], **columns}))
    store.write(3, "candidates", make_table({"row": [5], **columns}))
    ledger.add([], tmp_path)
    ledger.add([*sampled(2, 4, 6), *sampled(3, 5)], tmp_path)
    assert ledger.sampled_twice == [(2, 4), (3, 5)]


@pytest.mark.slow
def test_two_uninterrupted_runs_are_equal_and_whatever_differs_is_found(bench, tmp_path):
    whole = bench.whole("full")
    files = ("dataset.parquet", "iteration-02/candidates.parquet", "iteration-03/policy")
    events = {"D_3", "evaluation after step 9", "log of step 9", "step 8 batch 1"}
    names = {*events, "model.safetensors", *(f"sera/{name}" for name in files)}
    assert names | {"sera/iteration-03/summary.json"} <= whole.left.keys()
    verdict = bench.try_point(Point("full"))
    assert verdict.good, verdict

    copy = tmp_path / "copy"

    def changed(change=lambda output: None):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(bench.directory / "whole/full", copy)
        change(copy / "out")
        return differences(whole.left, left_behind(copy))

    def another_rate(output):
        path = output / "checkpoint-9/trainer_state.json"
        state = re.sub(r'"learning_rate": [\d.e-]+', '"learning_rate": 1.5', path.read_text())
        path.write_text(state)

    def another_order(output):
        path = output.parent / "trace.jsonl"
        first, second = re.findall(r'"batch": "(\w+)"', path.read_text())[:2]
        swap = {first: second, second: first}
        text = re.sub(f"{first}|{second}", lambda found: swap[found[0]], path.read_text())
        path.write_text(text)

    assert changed() == []
    for name in ("model.safetensors", "sera/iteration-03/offline.parquet"):
        assert changed(lambda output, name=name: flip(output / name)) == [f"{name}: differs"]
    assert any(name.startswith("log of") for name in changed(another_rate))
    assert changed(another_order) == ["step 0 batch 0: differs", "step 0 batch 1: differs"]
    policy = "sera/iteration-03/policy"
    assert changed(lambda output: shutil.rmtree(output / policy)) == [f"{policy}: missing"]


@pytest.mark.slow
def test_the_kill_is_real_and_where_it_is_said_to_be(bench):
    directory = bench.prepare("full", bench.directory / "killed")
    assert run(directory, kill=("sample-chunk", 3)) == "killed"
    assert len(list((directory / "out/sera/iteration-02/samples").iterdir())) == 3
    (events,) = read_trace(directory)
    assert events[-1]["event"] == "kept"
    # Killed from outside, at once after set-up: nothing is scored yet.
    directory = bench.prepare("full", bench.directory / "killed")
    assert run(directory, after=0.0) == "killed"
    assert not (directory / "out/sera/iteration-01/summary.json").exists()


@pytest.mark.slow
def test_training_ends_early_with_the_best_policy(bench):
    left = bench.whole("lora-best").left
    ending = left["sera/last/summary.json"]
    assert (ending["policies"], ending["kept"]) == (3, 1)
    assert "sera/iteration-03/summary.json" in left
    assert not [name for name in left if name.startswith("sera/iteration-04")]
    assert left["adapter_model.safetensors"] in left["sera/iteration-02/policy"].values()


@pytest.mark.slow
@pytest.mark.parametrize(
    "point",
    [
        "checkpoint-half:55+sample-chunk:3:lora-keep-1",
        "before-final:2:lora-best",  # chosen and not yet saved
        *(
            pytest.param(point, marks=pytest.mark.nightly)
            for point in (
                "rename-before:22:full",
                "micro-batch:10:full-one-schedule",
                "sample-token:100:lora-keep-1",
                "policy-half:6:lora-keep-1",
                "checkpoint-half:42:lora-keep-1",
                "score-offline:2:full",
                "sample-chunk:3:full",
                "score-candidates:4:lora-keep-1",
                "checkpoint-file:35:full-one-schedule",
                "rotation:30:lora-keep-1",
                "boundary:7:full",
                "clean:3:full",
                "final-half:3:full",
                "policy-half:13:full-best",  # theta_3, which is not kept
                "random:1:full",
            )
        ),
    ],
)
def test_a_killed_run_continues_to_the_same_end(bench, point):
    verdict = bench.try_point(Point.parse(point))
    assert verdict.good, verdict
    # Where the run never came to the place, nothing was tested. Random instants have no place.
    assert not verdict.missed or "random" in point


@pytest.mark.slow
def test_points_are_chosen_the_same_for_a_seed_and_cover_every_phase(bench):
    kinds = ["full", "full-one-schedule", "lora-keep-1"]
    chosen = [list(choose_points(bench, kinds, 60, seed)) for seed in (3, 3, 4)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert {point.phase for point in chosen[0]} == {*PHASES, "random", "twice"}
    assert {point.kind for point in chosen[0]} == set(kinds) <= set(KINDS)
