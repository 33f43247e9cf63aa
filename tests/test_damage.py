"""Real runs that are killed, lose a file while they are down, and are continued."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from sera_plugin.rundir.store import read_json, write_json
from tests.crash import process
from tests.crash.compare import differences, left_behind
from tests.crash.points import last_words

pytestmark = pytest.mark.slow

#: In the middle of iteration 3 of a LoRA run with a checkpoint per step, the newest two kept.
KIND, KILL = "lora-continued", ("micro-batch", 15)


def kill(bench, kind: str, place: tuple[str, int]) -> Path:
    """A run that was killed; tests copy it, and never change it."""
    directory = bench.directory / "damage" / f"{kind}-{place[0]}-{place[1]}"
    if not directory.exists():
        bench.whole(kind)
        bench.prepare(kind, directory)
        assert process.run(directory, kill=place).how == "killed"
    return directory


@pytest.fixture
def carry_on(bench):
    """Damage a copy of a killed run and continue it; returns its directory and how it ended."""

    def run(change, kind=KIND, place=KILL, **keys):
        directory = bench.directory / "damage/copy"
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(kill(bench, kind, place), directory)
        config = yaml.safe_load((directory / "config.yaml").read_text())
        sera = config["sera"] | keys.pop("sera", {})
        (directory / "config.yaml").write_text(yaml.safe_dump(config | keys | {"sera": sera}))
        change(directory / "out")
        return directory, process.run(directory).how

    return run


@pytest.fixture
def ends_alike(bench, carry_on):
    """The same, for a run that must end as one that was neither killed nor damaged."""

    def run(change, kind=KIND, place=KILL, **keys):
        directory, how = carry_on(change, kind, place, **keys)
        assert how == "finished", last_words(directory)
        assert differences(bench.whole(kind).left, left_behind(directory)) == []
        return directory

    return run


@pytest.fixture
def refused(carry_on):
    """The log of a run that must not be continued."""

    def run(change=lambda output: None, **keys):
        directory, how = carry_on(change, **keys)
        assert how == "failed"
        return log(directory)

    return run


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[Random(1).randrange(len(content))] ^= 4
    path.write_bytes(content)


def log(directory: Path) -> str:
    return (directory / "log.txt").read_text()


@pytest.mark.parametrize("damage", [pytest.param(cut, marks=pytest.mark.nightly), flip])
@pytest.mark.parametrize(
    "names",
    [
        # What the iteration that was under way is made of.
        ["sera/iteration-03/offline.parquet", "sera/iteration-03/bootstrapped.parquet"],
        ["sera/iteration-03/candidates.parquet", "sera/iteration-03/summary.json"],
        # What it was computed from.
        [
            "sera/iteration-02/offline.parquet",
            "sera/iteration-02/evaluation.parquet",
            "sera/iteration-03/offline.parquet",
            "sera/iteration-03/evaluation.parquet",
            "sera/iteration-03/summary.json",
        ],
        ["sera/dataset.parquet", "sera/iteration-03/SHA256SUMS"],
        ["checkpoint-7/adapter_model.safetensors"],
        ["checkpoint-7/optimizer.pt", "checkpoint-6/trainer_state.json"],
    ],
    ids=lambda names: names[0].replace("sera/iteration-", "") if isinstance(names, list) else None,
)
def test_damage_is_found_and_the_run_ends_as_if_there_had_been_none(ends_alike, damage, names):
    directory = ends_alike(lambda output: [damage(output / name) for name in names])
    if "SHA256SUMS" not in "".join(names):
        for name in names:
            told = name if name.startswith("sera") else name.split("/")[0]
            assert f"{told} is damaged" in log(directory).replace("\n", "")


def test_tables_of_iterations_before_are_made_again_while_this_one_samples(bench, ends_alike):
    """Iteration 3 has its own scores already; its summary still compares with iteration 2's."""
    chunks = bench.whole(KIND).counts["sample-chunk"]

    def change(output: Path) -> None:
        assert (output / "sera/iteration-03/samples").exists()
        for name in ("iteration-01/offline", "iteration-02/offline", "iteration-02/evaluation"):
            flip(output / f"sera/{name}.parquet")

    ends_alike(change, place=("sample-chunk", chunks))


@pytest.mark.parametrize(
    "kind", [pytest.param("full-short", marks=pytest.mark.nightly), "full-short-one-schedule"]
)
def test_where_a_run_is_does_not_hang_on_a_file_that_can_be_damaged(bench, ends_alike, kind):
    """Iteration 2 was shorter than planned; the checkpoint knows, whatever became of its files."""
    planned = 17 + 48
    last = bench.whole(kind).counts["micro-batch"]
    summary = bench.directory / f"whole/{kind}/out/sera/iteration-02/summary.json"
    assert json.loads(summary.read_text())["pairs"]["trained"] < planned - 8
    sums = "sera/iteration-02/SHA256SUMS"
    ends_alike(lambda output: cut(output / sums), kind, ("micro-batch", last - 1))


def test_an_earlier_checkpoint_that_is_asked_for_is_continued_from(ends_alike):
    directory = ends_alike(lambda output: None, resume_from_checkpoint="out/checkpoint-6")
    assert (directory / "out/set-aside-checkpoint-7").exists()


def test_remains_of_a_run_without_its_record_are_not_taken_for_a_fresh_one(refused):
    said = refused(lambda output: (output / "sera/run.json").unlink(), seed=99)
    assert "holds remains of another training (checkpoint-6, checkpoint-7, iteration-01)" in said


def test_an_older_policy_that_is_needed_and_damaged_stops_the_run(refused):
    def change(output: Path) -> None:
        flip(output / "sera/iteration-02/policy/adapter_model.safetensors")
        flip(output / "sera/iteration-03/candidates.parquet")

    said = refused(change)
    assert "theta_1 is needed from" in said
    assert "the checksum of adapter_model.safetensors differs. Restore it" in said


def test_a_damaged_description_stops_the_run(refused):
    said = refused(lambda output: flip(output / "sera/run.json"))
    assert "run.json is damaged" in said
    assert "set another output_dir" in said


def test_what_makes_a_run_another_one_is_refused_by_name(bench, refused):
    said = refused(
        sera={"gamma": 0.5, "selection_ratio": 0.5, "loss": "ipo"},
        seed=12,
        sequence_len=64,
        learning_rate=2e-3,
        lora_r=8,
        micro_batch_size=8,
        rl_beta=0.1,
        optimizer="adamw_torch_fused",
    )
    assert "cannot be continued, because these changed since it began" in said
    for change in (
        "sera.gamma: 0.3 -> 0.5",
        "sera.selection_ratio: 0.7 -> 0.5",
        "the loss: 'dpo' -> 'ipo'",
        "seed: 11 -> 12",
        "sequence_len: 48 -> 64",
        "learning_rate: 0.001 -> 0.002",
        "lora_r: 4 -> 8",
        "pairs per micro-batch, all processes together: 4 -> 8",
        "beta of the loss (rl_beta, trl.beta): 0.2 -> 0.1",
        "optimizer: 'adamw_torch' -> 'adamw_torch_fused'",
    ):
        assert change in said
    assert "To start fresh, set another output_dir" in said
    killed = kill(bench, KIND, KILL) / "out"
    for path in killed.rglob("*.safetensors"):
        copy = bench.directory / "damage/copy/out" / path.relative_to(killed)
        assert copy.read_bytes() == path.read_bytes()


def test_another_dataset_and_another_model_are_refused(bench, refused, tmp_path):
    lines = (bench.world / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(lines[1:]))
    config = yaml.safe_load((kill(bench, KIND, KILL) / "config.yaml").read_text())
    data = {**config["datasets"][0], "path": str(tmp_path / "train.jsonl")}
    assert "N, the number of usable pairs: 24 -> 23" in refused(datasets=[data])

    # Under the same path, with the same configuration: only its log-probabilities tell.
    other = tmp_path / "base"
    shutil.copytree(bench.world / "base", other)
    weights = load_file(other / "model.safetensors")
    scaled = {name: weight * np.float32(1.05) for name, weight in weights.items()}
    save_file(scaled, other / "model.safetensors", metadata={"format": "pt"})

    def change(output: Path) -> None:
        run = read_json(output / "sera/run.json")
        run["config"] |= {"base_model": str(other), "base_model_config": str(other)}
        write_json(output / "sera/run.json", run)

    assert "is not the model that the run in" in refused(change, base_model=str(other))


def test_what_does_no_harm_may_change(bench, carry_on):
    directory, how = carry_on(
        lambda output: None,
        logging_steps=2,
        save_total_limit=5,
        evals_per_epoch=None,
        eval_strategy="no",
        use_tensorboard=True,
        sera={"sampler": "transformers", "keep_policies": True},
    )
    assert how == "finished", last_words(directory)
    left = left_behind(directory)
    weights = [key for key in bench.whole(KIND).left if key.endswith(".safetensors")]
    assert weights
    assert all(left[key] == bench.whole(KIND).left[key] for key in weights)


def test_a_fresh_run_touches_nothing_of_an_earlier_one(refused):
    before: dict[Path, bytes] = {}

    def look(output: Path) -> None:
        before.update({path: path.read_bytes() for path in output.rglob("*") if path.is_file()})

    said = refused(look, auto_resume_from_checkpoints=False)
    assert "holds an earlier run. Set another output_dir" in said
    changed = {path.name for path, content in before.items() if path.read_bytes() != content}
    assert changed <= {"debug.log", "lock"}
