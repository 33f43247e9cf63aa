"""`axolotl sera plan` as a user types it, and against runs that then really happen."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from sera_plugin.cli import sera
from sera_plugin.config.sera import AS_PUBLISHED
from sera_plugin.rundir.format import read_json
from tests.conftest import adapter, summary, write_rows

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow

SHORT = AS_PUBLISHED | {"max_new_tokens": 12, "temperature": 1.0}
#: No reward ranks anything, so that trust, which is on here, changes nothing.
SPIN = SHORT | {"labeler": "spin", "candidates": 1, "selection_ratio": 0.0, "bootstrap_ratio": 1.0,
                "trust": "act"}  # fmt: skip
MIXED = SHORT | {"labeler": ["implicit", "function"], "function": "a.py:f", "reward": "fitted"}


def release(values):
    return pytest.param(values, marks=pytest.mark.nightly)


@pytest.fixture
def plan(tmp_path):
    """Call the command in this process; returns its exit code, stdout and stderr."""
    from axolotl.integrations.base import PluginManager

    def run(config: dict | str, *arguments):
        PluginManager._instance = PluginManager._cfg = None
        path = tmp_path / "plan.yaml"
        path.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
        result = CliRunner().invoke(sera, ["plan", str(path), *arguments])
        return result.exit_code, result.stdout, result.stderr

    return run


@pytest.fixture
def planned(plan):
    """The plan of a configuration as JSON has it."""
    return lambda config, *arguments: json.loads(plan(config, "--json", *arguments)[1])


def test_keys_that_do_nothing_are_named(base_config, plan):
    keys = {"beta": 0.3, "group_by_length": True, "warmup_steps": 99, "num_epochs": 1}
    code, printed, said = plan(base_config | keys, "--gpu", "24")
    assert code == 0
    printed = " ".join(printed.split())
    assert re.search(r"warmup_steps: 99 leaves nothing of a schedule of \d+ steps", printed)
    assert "num_epochs: 1 ends before iteration 2" in printed
    assert "Did you mean `rl_beta`?" in said
    assert "group_by_length has no effect" in said


@pytest.mark.parametrize(
    "changes",
    # `test_plan_arithmetic.py` counts the same by hand; a run of each kind is for a release.
    [
        adapter(),
        release({"num_epochs": 4,
                 "sera": SHORT | {"max_new_tokens": 6, "gamma": 0.0, "keep": "best"}}),
        release({"num_epochs": 1, "micro_batch_size": 5, "gradient_accumulation_steps": 3}),
        release({"num_epochs": 2, "sera": AS_PUBLISHED | {"bootstrap_ratio": 0.0},
                 "test_datasets": None, "val_set_size": 0.2}),
        release({"num_epochs": 2, "sera": SPIN}),
    ],
    ids=["lora", "four", "one-uneven", "selection-split", "spin"],
)  # fmt: skip
def test_the_run_counts_what_was_planned(changes, base_config, planned, train):
    config = base_config | changes
    found, result = planned(config), train(config)
    assert len(found["iterations"]) == config["num_epochs"]
    for one in found["iterations"]:
        made, phases = summary(result.run, one["iteration"]), one["phases"]
        if one["iteration"] == config["num_epochs"] and (end := result.run / "last").is_dir():
            ending = read_json(end / "summary.json")["forwarded"]
            for count in ("sequences", "tokens"):
                of_last = ending["score_evaluation"][count]
                made["forwarded"]["score_evaluation"][count] += of_last
        assert made["forwarded"].keys() == phases.keys() - {"train", "evaluate"}
        for name, real in made["forwarded"].items():
            assert phases[name]["sequences"] == real["sequences"]
            assert real["tokens"] <= phases[name]["most_tokens"]
            if name in ("score_offline", "score_evaluation"):
                assert phases[name]["tokens"] == phases[name]["most_tokens"] == real["tokens"]
        pairs = made["pairs"]["kept"], made["pairs"]["bootstrapped_wanted"]
        assert (one["kept"], one["bootstrapped"]) == pairs
        trained = result.training_pairs[one["iteration"]]
        tokens = sum(
            count * sum(map(len, trained[f"{name}_ids"].to_pylist()))
            for name, count in (("prompt", 2), ("chosen", 1), ("rejected", 1))
        )
        assert tokens <= phases["train"]["most_tokens"]
        if one["iteration"] == 1 and not one["bootstrapped"]:
            assert tokens == phases["train"]["tokens"]
        assert phases["train"]["sequences"] == 2 * one["pairs"]
    steps = sum(one["steps"] for one in found["iterations"])
    assert steps == result.trainer.state.global_step
    if "adapter" in changes:
        sizes = {path: path.stat().st_size for path in result.run.rglob("*") if path.is_file()}
        policies = [size for path, size in sizes.items() if path.parent.name == "policy"]
        assert sum(policies) == pytest.approx(found["disk"]["policies"], rel=0.2)
        tables = sum(size for path, size in sizes.items() if path.suffix == ".parquet")
        assert tables < found["disk"]["tables"]


@pytest.mark.parametrize(
    "changes",
    [
        # The labels of held-out pairs weigh scores, and the short run has no such pairs.
        pytest.param({"sera": MIXED}, marks=pytest.mark.nightly),
        release({"num_epochs": 1}),
        release({"sera": {"bootstrap_ratio": 0.0}, **adapter(adapter="qlora", load_in_4bit=True)}),
        release({"two rows": True}),
    ],
    ids=["whole", "one", "qlora", "two-rows"],
)
def test_a_short_run_gives_times_and_leaves_nothing(changes, base_config, planned, world, tmp_path):
    if few := changes.get("two rows"):
        write_rows(world.directory / "two.jsonl", world.rows[:2])
        base_config["datasets"][0]["path"] = str(world.directory / "two.jsonl")
    found = planned(base_config | ({} if few else changes), "--measure")
    assert "Measured here in " in found["speed_from"]
    assert found["speed"]["training"] > 0
    assert not few or [one["steps"] for one in found["iterations"]] == [1, 1, 1]
    last = found["iterations"][-1]
    assert last["seconds"]["train"] > 0
    if changes == {"sera": MIXED}:
        parts = {"score_offline", "score_evaluation", "sample", "score_candidates", "select"}
        assert set(last["seconds"]) == {*parts, "train"}
        # Samples are now as long as they were, and no longer than they may be.
        assert 0 < last["phases"]["sample"]["tokens"] <= last["phases"]["sample"]["most_tokens"]
    assert {path.name for path in tmp_path.iterdir()} == {"plan.yaml", "prepared"}


def test_a_short_run_is_refused_where_it_needs_all_processes(base_config, plan):
    keys = {"fsdp_version": 2, "fsdp_config": {"reshard_after_forward": True}}
    code, printed, said = plan(base_config | keys, "--measure")
    assert (code, printed) == (2, "")
    assert "--measure makes a short run in one process, and FSDP2 needs them all." in said
    printed = plan(base_config | keys, "--gpu", "24", "--gpus", "2")[1]
    assert "--measure" not in printed


def test_exit_codes_and_that_a_run_which_is_there_stays(base_config, plan, tmp_path):
    files = [tmp_path / "out" / name for name in ("debug.log", "sera/dataset.parquet")]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("of the run")
    code, printed, _ = plan(base_config)
    assert code == 0
    assert "Memory is not estimated for a CPU" in printed or "Fits: " in printed
    code, printed, _ = plan(base_config, "--gpu", "0.5")
    assert code == 1
    assert "Does not fit: " in printed
    assert [path.read_text() for path in files] == ["of the run"] * 2
    assert {path for path in (tmp_path / "out").rglob("*") if path.is_file()} == set(files)
    for nonsense in ("0", "-1", "inf", "nan", "much"):
        assert plan(base_config, "--gpu", nonsense)[0] == 2


def test_a_sampler_of_another_machine_is_believed_unless_it_cannot_serve(base_config, planned):
    named = base_config | adapter() | {"sera": {"sampler": "vllm", "max_new_tokens": 12}}
    found = planned(named, "--gpu", "24")
    assert found["about"]["sampler"].startswith("vllm (as sera.sampler says")
    assert "engine" in found["memory"]["phases"][1]["bytes"]
    found = planned(named | {"peft_use_dora": True}, "--gpu", "24")
    assert found["about"]["sampler"].startswith("transformers (in the training process: vLLM adds")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        *((lambda _, text=text: text, "plan.yaml") for text in ("a: [", "- 1", "\x00")),
        (lambda c: c.update(base_model="no/such"), "its config.json is not in the local hub cache. "
         "A plan needs config.json and the tokenizer's files, no weights. Put them into a directory"
         " and name it, or where there is a network run `hf download no/such"),
        (lambda c: c.update(base_model="./none"), "there is no such directory"),
        (lambda c: c.update(sequence_len=3), "none of the"),
        (lambda c: c.update(plugins=[], rl="dpo", sera=None), "has no `rl: sera`"),
        (lambda c: c["sera"].update(sampler="vllm"), "sera.sampler: vllm, but"),
        (lambda c: c.update(test_datasets=None, sera=MIXED | {"held_out": 0.001}),
         "and none are held out. Set sera.held_out"),
    ],
)  # fmt: skip
def test_a_configuration_that_cannot_be_trained(change, said, base_config, plan):
    code, printed, errors = plan(change(base_config) or base_config)
    assert (code, printed) == (2, "")
    assert said in errors


def test_json_alone_goes_to_stdout(base_config, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(base_config))
    command = [sys.executable, "-m", "sera_plugin", "plan", path, "--gpu", "0.5", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1, done.stderr
    assert json.loads(done.stdout)["memory"]["fits"] is False


#: config.json of what the shipped QLoRA configurations name.
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("name", "kind", "heads", "shape"),
    [
        ("mistral-7b-qlora-24gb", "mistral", 8, (4096, 14_336, 32, 32)),
        ("llama3.1-8b-qlora-24gb", "llama", 8, (4096, 14_336, 32, 32)),
        ("qwen2.5-3b-qlora-16gb", "qwen2", 2, (2048, 11_008, 36, 16)),
    ],
)
def test_shipped_yamls_fit(name, kind, heads, shape, planned, base_config, world, tmp_path):
    """By their shape alone: there is a config.json, and no weights."""
    import transformers

    model = tmp_path / "model"
    transformers.AutoTokenizer.from_pretrained(world.base).save_pretrained(model)
    sizes = dict(zip(SIZES, shape, strict=True)) | {"num_key_value_heads": heads}
    transformers.AutoConfig.for_model(kind, **sizes, vocab_size=128_256).save_pretrained(model)
    written = yaml.safe_load((ROOT / f"example_yamls/{name}.yaml").read_text())
    local = {key: base_config[key] for key in ("datasets", "output_dir", "dataset_prepared_path")}
    written |= local | {"base_model": str(model), "val_set_size": 0.0}
    found = planned(written, "--gpu", "24" if "24gb" in name else "16")
    assert found["memory"]["fits"] is True
    assert found["speed"] is None
