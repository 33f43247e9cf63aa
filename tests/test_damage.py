"""Real runs that are killed, lose a file while they are down, and are continued."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from sera_plugin.rundir.format import read_json
from sera_plugin.rundir.store import write_json
from tests.conftest import flip
from tests.crash.compare import differences, left_behind
from tests.crash.points import last_words, run

pytestmark = pytest.mark.slow

#: In the middle of iteration 3 of a LoRA run with a checkpoint per step, the newest two kept.
KIND, KILL = "lora-continued", ("micro-batch", 15)


def kill(bench, kind: str, place: tuple[str, int]) -> Path:
    """A run that was killed; tests copy it, and never change it."""
    directory = bench.directory / "damage" / f"{kind}-{place[0]}-{place[1]}"
    if not directory.exists():
        bench.whole(kind)
        bench.prepare(kind, directory)
        assert run(directory, kill=place) == "killed"
    return directory


@pytest.fixture
def carry_on(bench):
    """Damage a copy of a killed run and continue it, to a certain end; returns its directory."""

    def continued(
        change=lambda output: None, kind=KIND, place=KILL, ends="finished", **keys
    ) -> Path:
        directory = bench.directory / "damage/copy"
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(kill(bench, kind, place), directory)
        config = yaml.safe_load((directory / "config.yaml").read_text())
        sera = config["sera"] | keys.pop("sera", {})
        (directory / "config.yaml").write_text(yaml.safe_dump(config | keys | {"sera": sera}))
        change(directory / "out")
        assert run(directory) == ends, last_words(directory)
        return directory

    return continued


@pytest.fixture
def ends_alike(bench, carry_on):
    """The same, for a run that must end as one that was neither killed nor damaged."""

    def alike(*how, kind=KIND, **keys):
        directory = carry_on(*how, kind=kind, **keys)
        assert differences(bench.whole(kind).left, left_behind(directory)) == []
        return directory

    return alike


@pytest.fixture
def refused(carry_on):
    """The log of a run that must not be continued."""
    return lambda *change, **keys: log(carry_on(*change, ends="failed", **keys))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def log(directory: Path) -> str:
    return (directory / "log.txt").read_text()


def changed_files(bench) -> set[str]:
    """Files of the killed run that are others where it was to be continued."""
    killed, copy = kill(bench, KIND, KILL) / "out", bench.directory / "damage/copy/out"
    files = {path.relative_to(killed) for path in killed.rglob("*") if path.is_file()}
    return {one.name for one in files if (copy / one).read_bytes() != (killed / one).read_bytes()}


@pytest.mark.parametrize("damage", [pytest.param(cut, marks=pytest.mark.nightly), flip])
@pytest.mark.parametrize(
    "names",
    [
        # What the iteration that was under way is made of.
        ["sera/iteration-03/offline.parquet", "sera/iteration-03/bootstrapped.parquet"],
        pytest.param(
            ["sera/iteration-03/candidates.parquet", "sera/iteration-03/summary.json"],
            marks=pytest.mark.nightly,
        ),
        # What it was computed from.
        pytest.param(
            [
                "sera/iteration-02/offline.parquet",
                "sera/iteration-02/evaluation.parquet",
                "sera/iteration-03/offline.parquet",
                "sera/iteration-03/evaluation.parquet",
                "sera/iteration-03/summary.json",
            ],
            marks=pytest.mark.nightly,
        ),
        ["sera/dataset.parquet", "sera/iteration-03/SHA256SUMS"],
        pytest.param(["checkpoint-7/adapter_model.safetensors"], marks=pytest.mark.nightly),
        pytest.param(
            ["checkpoint-7/optimizer.pt", "checkpoint-6/trainer_state.json"],
            marks=pytest.mark.nightly,
        ),
    ],
    ids=lambda names: names[0].replace("sera/iteration-", "") if isinstance(names, list) else None,
)
def test_damage_is_found_and_the_run_ends_as_if_there_had_been_none(ends_alike, damage, names):
    directory = ends_alike(lambda output: [damage(output / name) for name in names])
    if "SHA256SUMS" not in "".join(names):
        for name in names:
            told = name if name.startswith("sera") else name.split("/")[0]
            assert f"{told} is damaged" in log(directory).replace("\n", "")


def test_the_policy_of_the_iteration_under_way_is_named_when_it_is_damaged(carry_on):
    """No phase that is left needs it, and nobody would find out before somebody loads it."""
    policy = "sera/iteration-03/policy"
    directory = carry_on(lambda output: flip(output / policy / "adapter_model.safetensors"))
    said = f"{policy} is damaged (the checksum of adapter_model.safetensors differs)"
    assert said in log(directory).replace("\n", "")


@pytest.mark.nightly
def test_tables_of_iterations_before_are_made_again_while_this_one_samples(bench, ends_alike):
    """Iteration 3 has its own scores already; its summary still compares with iteration 2's."""
    chunks = bench.whole(KIND).counts["sample-chunk"]

    def change(output: Path) -> None:
        assert (output / "sera/iteration-03/samples").exists()
        for name in ("iteration-01/offline", "iteration-02/offline", "iteration-02/evaluation"):
            flip(output / f"sera/{name}.parquet")

    ends_alike(change, place=("sample-chunk", chunks))


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["full-short", "full-short-one-schedule"])
def test_where_a_run_is_does_not_hang_on_a_file_that_can_be_damaged(bench, ends_alike, kind):
    """Iteration 2 was shorter than planned; the checkpoint knows, whatever became of its files."""
    planned = 17 + 48
    last = bench.whole(kind).counts["micro-batch"]
    summary = bench.directory / f"whole/{kind}/out/sera/iteration-02/summary.json"
    assert json.loads(summary.read_text())["pairs"]["trained"] < planned - 8
    sums = "sera/iteration-02/SHA256SUMS"
    place = ("micro-batch", last - 1)
    ends_alike(lambda output: cut(output / sums), kind=kind, place=place)


@pytest.mark.nightly
def test_an_earlier_checkpoint_that_is_asked_for_is_continued_from(ends_alike):
    directory = ends_alike(resume_from_checkpoint="out/checkpoint-6")
    assert (directory / "out/set-aside-checkpoint-7").exists()


STOPS = {
    "a description": (["sera/run.json"], "run.json is damaged.*set another output_dir"),
    "an older policy that is needed": (
        ["sera/iteration-02/policy/adapter_model.safetensors",
         "sera/iteration-03/candidates.parquet"],
        "theta_1 is needed from.*the checksum of adapter_model.safetensors differs. Restore it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", STOPS)
def test_damage_that_cannot_be_made_good_stops_the_run(refused, what):
    names, said = STOPS[what]
    log = refused(lambda output: [flip(output / name) for name in names])
    assert re.search(said, log, re.DOTALL)


def test_remains_of_a_run_without_its_record_are_not_taken_for_a_fresh_one(refused):
    said = refused(lambda output: (output / "sera/run.json").unlink(), seed=99)
    assert "holds remains of another training (checkpoint-6, checkpoint-7, iteration-01)" in said


def test_what_makes_a_run_another_one_is_refused_by_name(bench, refused, tmp_path):
    lines = (bench.world / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(lines[1:]))
    config = yaml.safe_load((kill(bench, KIND, KILL) / "config.yaml").read_text())
    keys = {"lora_r": 8, "micro_batch_size": 8, "rl_beta": 0.1, "optimizer": "adamw_torch_fused"}
    keys["datasets"] = [{**config["datasets"][0], "path": str(tmp_path / "train.jsonl")}]
    said = refused(sera={"gamma": 0.5, "loss": "ipo"}, seed=12, **keys)
    assert "cannot be continued, because these changed since it began" in said
    for change in (
        "sera.gamma: 0.3 -> 0.5",
        "the loss: 'dpo' -> 'ipo'",
        "seed: 11 -> 12",
        "N, the number of usable pairs: 24 -> 23",
        "lora_r: 4 -> 8",
        "gradient_accumulation_steps x processes): 8 -> 16",
        "beta of the loss (rl_beta, trl.beta): 0.2 -> 0.1",
        "optimizer: 'adamw_torch' -> 'adamw_torch_fused'",
    ):
        assert change in said
    assert "To start fresh, set another output_dir" in said
    assert changed_files(bench) <= {"debug.log", "lock"}


def test_another_model_with_the_same_configuration_is_refused(bench, refused, tmp_path):
    """Only its log-probabilities tell."""
    other = tmp_path / "base"
    shutil.copytree(bench.world / "base", other)
    weights = load_file(other / "model.safetensors")
    scaled = {name: weight * np.float32(1.05) for name, weight in weights.items()}
    save_file(scaled, other / "model.safetensors", metadata={"format": "pt"})

    def change(output: Path) -> None:
        run = read_json(output / "sera/run.json")
        run["config"] |= {"base_model": str(other), "base_model_config": str(other)}
        del run["base_weights"]  # which earlier versions have not kept
        write_json(output / "sera/run.json", run)

    assert "is not the model that the run in" in refused(change, base_model=str(other))


def test_what_does_no_harm_may_change(bench, carry_on):
    keys = {"logging_steps": 2, "save_total_limit": 5, "evals_per_epoch": None}
    keys |= {"eval_strategy": "no", "use_tensorboard": True}
    left = left_behind(carry_on(**keys, sera={"sampler": "transformers", "keep_policies": True}))
    expected = {k: v for k, v in bench.whole(KIND).left.items() if k.endswith(".safetensors")}
    assert expected
    assert left.items() >= expected.items()


def test_a_fresh_run_touches_nothing_of_an_earlier_one(bench, refused):
    said = refused(auto_resume_from_checkpoints=False)
    assert "holds an earlier run. Set another output_dir" in said
    assert changed_files(bench) <= {"debug.log", "lock"}
