"""Real runs that are killed, lose a file while they are down, and are continued."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random

import pytest
import yaml

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
def killed(bench) -> Path:
    directory = kill(bench, KIND, KILL)
    saved = sorted(path.name for path in (directory / "out").glob("checkpoint-*"))
    assert saved == ["checkpoint-6", "checkpoint-7"]
    return directory


@pytest.fixture
def carry_on(bench, killed):
    """Damage a copy of a killed run and continue it; returns its directory and how it ended."""

    def run(change, killed=killed, **keys):
        directory = bench.directory / "damage/copy"
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(killed, directory)
        config = yaml.safe_load((directory / "config.yaml").read_text())
        sera = config["sera"] | keys.pop("sera", {})
        (directory / "config.yaml").write_text(yaml.safe_dump(config | keys | {"sera": sera}))
        change(directory / "out")
        return directory, process.run(directory).how

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
def test_damage_is_found_and_the_run_ends_as_if_there_had_been_none(
    bench, carry_on, damage, names
) -> None:
    directory, how = carry_on(lambda output: [damage(output / name) for name in names])
    assert how == "finished", last_words(directory)
    assert differences(bench.whole(KIND).left, left_behind(directory)) == []
    if "SHA256SUMS" not in "".join(names):
        for name in names:
            told = name if name.startswith("sera") else name.split("/")[0]
            assert f"{told} is damaged" in log(directory).replace("\n", "")


def test_a_table_of_the_iteration_before_is_made_again_while_this_one_samples(
    bench, carry_on
) -> None:
    """Iteration 3 has its own scores already; its summary still compares with iteration 2's."""
    counts = bench.whole(KIND).counts
    stopped = kill(bench, KIND, ("sample-chunk", counts["sample-chunk"]))
    assert (stopped / "out/sera/iteration-03/samples").exists()
    for name in ("iteration-01/offline", "iteration-02/offline", "iteration-02/evaluation"):
        path = f"sera/{name}.parquet"
        directory, how = carry_on(lambda output, path=path: flip(output / path), stopped)
        assert how == "finished", last_words(directory)
        assert differences(bench.whole(KIND).left, left_behind(directory)) == []


@pytest.mark.parametrize(
    "kind", [pytest.param("full-short", marks=pytest.mark.nightly), "full-short-one-schedule"]
)
def test_where_a_run_is_does_not_hang_on_a_file_that_can_be_damaged(bench, carry_on, kind) -> None:
    """Iteration 2 was shorter than planned; the checkpoint knows, whatever became of its files."""
    planned = 17 + 48
    last = bench.whole(kind).counts["micro-batch"]
    summary = bench.directory / f"whole/{kind}/out/sera/iteration-02/summary.json"
    assert json.loads(summary.read_text())["pairs"]["trained"] < planned - 8
    directory, how = carry_on(
        lambda output: cut(output / "sera/iteration-02/SHA256SUMS"),
        kill(bench, kind, ("micro-batch", last - 1)),
    )
    assert how == "finished", last_words(directory)
    assert differences(bench.whole(kind).left, left_behind(directory)) == []


def test_remains_of_a_run_without_its_record_are_not_taken_for_a_fresh_one(carry_on) -> None:
    def change(output: Path) -> None:
        (output / "sera/run.json").unlink()
        for path in output.glob("checkpoint-*"):
            shutil.rmtree(path)

    directory, how = carry_on(change, seed=99)
    assert how == "failed"
    assert "holds remains of another training (iteration-01, iteration-02" in log(directory)


def test_an_earlier_checkpoint_that_is_asked_for_is_continued_from(bench, carry_on) -> None:
    directory, how = carry_on(lambda output: None, resume_from_checkpoint="out/checkpoint-6")
    assert how == "finished", last_words(directory)
    assert differences(bench.whole(KIND).left, left_behind(directory)) == []
    assert (directory / "out/set-aside-checkpoint-7").exists()


def test_an_older_policy_that_is_needed_and_damaged_stops_the_run(carry_on) -> None:
    def change(output: Path) -> None:
        flip(output / "sera/iteration-02/policy/adapter_model.safetensors")
        flip(output / "sera/iteration-03/candidates.parquet")

    directory, how = carry_on(change)
    assert how == "failed"
    assert "theta_1 is needed from" in log(directory)
    assert "the checksum of adapter_model.safetensors differs. Restore it" in log(directory)


def test_a_damaged_description_stops_the_run(carry_on) -> None:
    directory, how = carry_on(lambda output: flip(output / "sera/run.json"))
    assert how == "failed"
    assert "run.json is damaged" in log(directory)
    assert "set another output_dir" in log(directory)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"sera": {"gamma": 0.5}}, "sera.gamma: 0.3 -> 0.5"),
        ({"sera": {"selection_ratio": 0.5}}, "sera.selection_ratio: 0.7 -> 0.5"),
        ({"sera": {"loss": "ipo"}}, "the loss: 'dpo' -> 'ipo'"),
        ({"seed": 12}, "seed: 11 -> 12"),
        ({"sequence_len": 64}, "sequence_len: 48 -> 64"),
        ({"learning_rate": 2e-3}, "learning_rate: 0.001 -> 0.002"),
        ({"lora_r": 8}, "lora_r: 4 -> 8"),
        ({"micro_batch_size": 8}, "pairs per micro-batch, all processes together: 4 -> 8"),
        ({"rl_beta": 0.1}, "beta of the loss (rl_beta, trl.beta): 0.2 -> 0.1"),
        ({"optimizer": "adamw_torch_fused"}, "optimizer: 'adamw_torch' -> 'adamw_torch_fused'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_makes_a_run_another_one_is_refused_by_name(killed, carry_on, keys, said) -> None:
    directory, how = carry_on(lambda output: None, **keys)
    assert how == "failed"
    text = log(directory)
    assert "cannot be continued, because these changed since it began" in text
    assert said in text
    assert "To start fresh, set another output_dir" in text
    for path in (killed / "out").rglob("*.safetensors"):
        copy = directory / "out" / path.relative_to(killed / "out")
        assert copy.read_bytes() == path.read_bytes()


def test_another_dataset_and_another_model_are_refused(bench, carry_on, tmp_path) -> None:
    lines = (bench.world / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(lines[1:]))
    config = yaml.safe_load((kill(bench, KIND, KILL) / "config.yaml").read_text())
    data = {**config["datasets"][0], "path": str(tmp_path / "train.jsonl")}
    directory, how = carry_on(lambda output: None, datasets=[data])
    assert how == "failed"
    assert "N, the number of usable pairs: 24 -> 23" in log(directory)

    # Under the same path, with the same configuration: only its log-probabilities tell.
    from safetensors.torch import load_file, save_file

    other = tmp_path / "base"
    shutil.copytree(bench.world / "base", other)
    weights = load_file(other / "model.safetensors")
    save_file(
        {name: weight * 1.05 for name, weight in weights.items()},
        other / "model.safetensors",
        metadata={"format": "pt"},
    )

    def change(output: Path) -> None:
        path = output / "sera/run.json"
        run = json.loads(path.read_text())
        run["config"] |= {"base_model": str(other), "base_model_config": str(other)}
        from sera_plugin.rundir.store import write_json

        write_json(path, run)

    directory, how = carry_on(change, base_model=str(other))
    assert how == "failed"
    assert "is not the model that the run in" in log(directory)


def test_what_does_no_harm_may_change(bench, carry_on) -> None:
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


def test_a_fresh_run_touches_nothing_of_an_earlier_one(carry_on) -> None:
    before: dict[Path, bytes] = {}

    def look(output: Path) -> None:
        before.update({path: path.read_bytes() for path in output.rglob("*") if path.is_file()})

    directory, how = carry_on(look, auto_resume_from_checkpoints=False)
    assert how == "failed"
    assert "holds an earlier run. Set another output_dir" in log(directory)
    changed = {path.name for path, content in before.items() if path.read_bytes() != content}
    assert changed <= {"debug.log", "lock"}
