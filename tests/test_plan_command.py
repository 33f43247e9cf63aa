"""`axolotl sera plan` as a user types it, and against runs that then really happen."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner

from sera_plugin.cli import sera
from tests.conftest import adapter, write_rows

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow

SPIN = {
    "labeler": "spin", "selection_ratio": 0.0, "bootstrap_ratio": 1.0, "candidates": 1,
    "max_new_tokens": 12, "temperature": 1.0,
}  # fmt: skip

SPLIT = {"test_datasets": None, "val_set_size": 0.2}


@pytest.fixture
def plan(load, tmp_path):
    """Call the command in this process; returns its exit code, stdout and stderr."""

    def run(config: dict | str, *arguments):
        path = tmp_path / "plan.yaml"
        path.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
        result = CliRunner().invoke(sera, ["plan", str(path), *arguments])
        return result.exit_code, result.stdout, result.stderr

    return run


@pytest.fixture
def planned(plan):
    """The plan of a configuration as JSON has it."""

    def run(config: dict, *arguments):
        code, printed, errors = plan(config, "--json", *arguments)
        assert code in (0, 1), errors
        return json.loads(printed)

    return run


def test_help_has_examples():
    printed = CliRunner().invoke(sera, ["plan", "--help"]).stdout
    assert "  axolotl sera plan config.yaml --gpu 24" in printed


@pytest.mark.parametrize(
    "changes",
    [
        adapter(),
        {"num_epochs": 4, "sera": {"max_new_tokens": 6, "gamma": 0.0, "temperature": 1.0}},
        {"num_epochs": 1, "micro_batch_size": 5, "gradient_accumulation_steps": 3},
        {"num_epochs": 2, "sera": {"bootstrap_ratio": 0.0}, **SPLIT},
        {"sera": {"loss": "simpo", "max_new_tokens": 12, "temperature": 1.0}, "rl_beta": 2.0},
        {"num_epochs": 2, "sera": SPIN},
    ],
    ids=["lora", "four", "one-uneven", "selection-split", "simpo", "spin"],
)
def test_what_is_known_beforehand_is_exactly_what_the_run_counts(
    changes, base_config, planned, train
):
    config = base_config | changes
    found = planned(config)
    result = train(config)
    assert len(found["iterations"]) == config["num_epochs"]
    steps = 0
    for one in found["iterations"]:
        path = result.run / f"iteration-{one['iteration']:02d}/summary.json"
        summary = json.loads(path.read_text())
        forwarded, pairs = summary["forwarded"], summary["pairs"]
        for phase, counted in one["phases"].items():
            if phase in ("train", "evaluate"):
                continue
            assert counted["sequences"] == forwarded[phase]["sequences"]
            assert forwarded[phase]["tokens"] <= counted["most_tokens"]
            if phase.startswith("score_") and phase != "score_candidates":
                assert counted["tokens"] == counted["most_tokens"] == forwarded[phase]["tokens"]
        assert forwarded.keys() == one["phases"].keys() - {"train", "evaluate"}
        assert one["kept"] == pairs["kept"]
        assert one["bootstrapped"] == pairs["bootstrapped_wanted"]
        if pairs["bootstrapped_kept"] == pairs["bootstrapped_wanted"]:
            assert one["pairs"] == pairs["trained"]
        trained = result.training_pairs[one["iteration"]]
        prompt, chosen, rejected = (
            sum(map(len, trained[f"{name}_ids"].to_pylist()))
            for name in ("prompt", "chosen", "rejected")
        )
        tokens = 2 * prompt + chosen + rejected
        assert tokens <= one["phases"]["train"]["most_tokens"]
        if one["iteration"] == 1 and not one["bootstrapped"]:
            assert tokens == one["phases"]["train"]["tokens"]
        assert one["phases"]["train"]["sequences"] == 2 * one["pairs"]
        steps += one["steps"]
    assert steps == result.trainer.state.global_step


def test_nothing_is_written_where_a_run_is(base_config, planned, train, tmp_path):
    result = train(base_config | {"num_epochs": 1})
    (result.output / "debug.log").write_text("of the run")
    before = {path: path.stat().st_mtime_ns for path in result.output.rglob("*")}
    planned(base_config)
    assert {path: path.stat().st_mtime_ns for path in result.output.rglob("*")} == before
    assert (result.output / "debug.log").read_text() == "of the run"


def test_a_short_run_gives_times_and_leaves_nothing(base_config, planned, tmp_path):
    before = sorted(path.name for path in tmp_path.iterdir())
    found = planned(base_config, "--measure")
    assert "Measured here in " in found["speed_from"]
    assert found["speed"]["training"] > 0
    second = found["iterations"][1]
    assert set(second["seconds"]) == {
        *("score_offline", "score_evaluation", "sample", "score_candidates", "select", "train")
    }
    # Samples are now as long as they were, and no longer than they may be.
    assert 0 < second["phases"]["sample"]["tokens"] <= second["phases"]["sample"]["most_tokens"]
    after = sorted(path.name for path in tmp_path.iterdir())
    assert [name for name in after if name not in before] == ["plan.yaml", "prepared"]


@pytest.mark.parametrize(
    "changes",
    [
        {"num_epochs": 1},
        {"sera": {"bootstrap_ratio": 0.0}, **adapter(adapter="qlora", load_in_4bit=True)},
    ],
)
def test_a_short_run_of_other_kinds(changes, base_config, planned):
    found = planned(base_config | changes, "--measure")
    assert found["iterations"][-1]["seconds"]["train"] > 0


def test_a_short_run_with_hardly_any_data(base_config, planned, world, tmp_path):
    write_rows(tmp_path / "two.jsonl", world.rows[:2])
    base_config["datasets"][0]["path"] = str(tmp_path / "two.jsonl")
    found = planned(base_config, "--measure")
    assert [one["steps"] for one in found["iterations"]] == [1, 1, 1]


def test_exit_codes_and_what_is_printed(base_config, plan):
    code, printed, _ = plan(base_config)
    assert code == 0
    assert "There is no GPU here to compare with" in printed or "Fits: " in printed
    assert plan(base_config, "--gpu", "24")[0] == 0
    code, printed, _ = plan(base_config, "--gpu", "0.5")
    assert code == 1
    assert "Does not fit: " in printed
    for nonsense in ("0", "-1", "inf", "nan", "much"):
        assert plan(base_config, "--gpu", nonsense)[0] == 2


def test_a_sampler_of_another_machine_is_believed_but_not_what_it_cannot_serve(
    base_config, planned
):
    named = base_config | adapter() | {"sera": {"sampler": "vllm", "max_new_tokens": 12}}
    found = planned(named, "--gpu", "24")
    assert found["about"]["sampler"].startswith("vllm (as sera.sampler says")
    assert "engine" in found["memory"]["phases"][1]["bytes"]
    found = planned(named | {"peft_use_dora": True}, "--gpu", "24")
    assert found["about"]["sampler"].startswith("transformers (in the training process: vLLM does")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["sera"].update(selecton_ratio=0.5), "Did you mean `selection_ratio`?"),
        (lambda c: c.update(sera_gamma=0.5), "Did you mean `sera: {gamma: ...}`?"),
        (lambda c: c.update(base_model="no/such"), "its config.json is not in the local hub cache"),
        (lambda c: c.update(base_model="./none"), "there is no such directory"),
        (lambda c: c.update(sequence_len=3), "none of the"),
        (lambda c: c["datasets"][0].update(path="nowhere.jsonl"), "no such file or directory"),
        (lambda c: c.update(rl="dpo"), "Set `rl: sera`"),
        (lambda c: c.update(plugins=[], rl="dpo", sera=None), "has no `rl: sera`"),
        (lambda c: c["sera"].update(sampler="vllm"), "sera.sampler: vllm, but"),
    ],
)
def test_a_configuration_that_cannot_be_trained(change, said, base_config, plan):
    change(base_config)
    code, printed, errors = plan(base_config)
    assert (code, printed) == (2, "")
    assert said in errors


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n", "", "\x00", None])
def test_a_file_that_is_no_configuration(text, tmp_path):
    path = tmp_path / "plan.yaml"
    if text is not None:
        path.write_text(text)
    result = CliRunner().invoke(sera, ["plan", str(path)])
    assert result.exit_code == 2
    assert "plan.yaml" in result.stderr


def test_json_alone_goes_to_stdout(base_config, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(base_config))
    command = [sys.executable, "-m", "sera_plugin", "plan", path, "--gpu", "0.5", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1, done.stderr
    assert json.loads(done.stdout)["memory"]["fits"] is False


#: config.json of what the shipped QLoRA configurations name.
SHAPES = {
    "mistral-7b-qlora-24gb": ("mistral", 4096, 14_336, 32, 32, 8),
    "llama3.1-8b-qlora-24gb": ("llama", 4096, 14_336, 32, 32, 8),
    "qwen2.5-3b-qlora-16gb": ("qwen2", 2048, 11_008, 36, 16, 2),
}
SIZES = (
    *("model_type", "hidden_size", "intermediate_size"),
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
)


def test_shipped_configurations_without_their_model(plan):
    config = (ROOT / "example_yamls/mistral-7b-qlora-24gb.yaml").read_text()
    code, _, errors = plan(config, "--gpu", "24")
    assert code == 2
    assert "its config.json is not in the local hub cache" in errors
    assert "hf download" in errors


@pytest.mark.parametrize("name", SHAPES)
def test_shipped_configurations_fit_where_they_say(name, planned, base_config, world, tmp_path):
    """By their shape alone: there is a config.json, and no weights."""
    import transformers

    model = tmp_path / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(world.base)
    tokenizer.save_pretrained(model)
    config = transformers.AutoConfig.for_model(
        **dict(zip(SIZES, SHAPES[name], strict=True)), vocab_size=128_256
    )
    config.save_pretrained(model)
    written = yaml.safe_load((ROOT / f"example_yamls/{name}.yaml").read_text())
    local = {key: base_config[key] for key in ("datasets", "output_dir", "dataset_prepared_path")}
    written |= local | {"base_model": str(model), "val_set_size": 0.0}
    found = planned(written, "--gpu", "24" if "24gb" in name else "16")
    assert found["memory"]["fits"] is True
    assert found["speed"] is None
    assert not planned(written, "--gpu", "2")["memory"]["fits"]


def test_tables_on_disk_are_close(base_config, planned, train):
    found = planned(base_config | adapter())
    result = train(base_config | adapter())
    tables = sum(file.stat().st_size for file in result.run.rglob("*.parquet"))
    policies = [result.run / f"iteration-{t:02d}/policy" for t in (1, 2, 3)]
    sizes = [sum(f.stat().st_size for f in each.iterdir()) for each in policies]
    assert sum(sizes) == pytest.approx(found["disk"]["policies"], rel=0.2)
    assert tables < found["disk"]["tables"]
    assert pq.ParquetFile(result.run / "dataset.parquet").metadata.num_rows == 24
