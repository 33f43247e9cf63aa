"""Whole runs: every kind of model trains, samples, continues and is evaluated; new tokens too."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from sera_plugin.cli import sera
from sera_plugin.tools.demo.base_model import build_tokenizer
from tests.conftest import adapter, make_config, summary, train_config, write_rows
from tests.test_runs import files
from tests.tiny_models import MODELS, build

pytestmark = pytest.mark.slow
EVERY_STEP = {"save_steps": 1, "saves_per_epoch": None, "save_total_limit": 9, "num_epochs": 2}


def train_cut_off_and_evaluate(config: dict, directory: Path, prompts: Path) -> list[str]:
    """A run that samples, the same from its fourth step on, and what `sera eval` says of it."""
    whole = train_config(config, directory)
    assert summary(whole.run, 2)["pairs"]["bootstrapped_kept"] > 0
    cut = Path(shutil.copytree(whole.output, directory / "cut"))
    for checkpoint in cut.glob("checkpoint-*"):
        if int(checkpoint.name.split("-")[1]) > 4:
            shutil.rmtree(checkpoint)
    resume = {"output_dir": str(cut), "auto_resume_from_checkpoints": True}
    again = train_config(config | resume, directory)
    assert again.trainer.state.global_step == whole.trainer.state.global_step > 4
    assert files(again.run) == files(whole.run)
    arguments = [whole.output, "--iterations", "--prompts", prompts, "--max-new-tokens", 8]
    arguments += ["--output", directory / "eval", "--json"]
    arguments += ["--judge", "sera_plugin.tools.demo.world:true_reward"]
    result = CliRunner().invoke(sera, ["eval", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return [one["name"] for one in json.loads(result.stdout)["models"]]


@pytest.fixture
def prompts(world, tmp_path) -> Path:
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": row["prompt"]} for row in world.rows[:4]])
    return tmp_path / "prompts.jsonl"


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_new_tokens_are_trained_continued_and_evaluated(kind, world, tmp_path, prompts):
    """The rows of new tokens are drawn where the model is loaded."""
    rows = [row | {"chosen": "<think> a b </think> " + row["chosen"]} for row in world.rows[:24]]
    write_rows(tmp_path / "rows.jsonl", rows)
    config = make_config(world.directory, tmp_path) | EVERY_STEP
    config |= {"tokens": ["<think>", "</think>", "<more>"]}
    if kind == "lora":
        config |= adapter(lora_modules_to_save=["embed_tokens", "lm_head"])
    config["datasets"][0]["path"] = str(tmp_path / "rows.jsonl")
    assert train_cut_off_and_evaluate(config, tmp_path, prompts) == ["out@0", "out@1", "out"]


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_is_trained_continued_and_evaluated(
    name, kind, world, tmp_path, prompts
):
    tokenizer = build_tokenizer()
    for part in (build(MODELS[name][0]), tokenizer):
        part.save_pretrained(tmp_path / "base")
    config = make_config(world.directory, tmp_path) | EVERY_STEP
    config |= {"base_model": str(tmp_path / "base"), "learning_rate": 1e-4}
    if name == "Mamba":  # transformers knows no other name for none
        config["attn_implementation"] = "eager"
    if kind == "lora":
        config |= adapter(lora_target_modules=LORA.get(name, "all-linear"))
    assert train_cut_off_and_evaluate(config, tmp_path, prompts) == ["out@0", "out@1", "out"]


#: Of state-space layers PEFT refuses the output projection.
LORA = {"Mamba": ["in_proj", "x_proj"], "Falcon-H1": ["in_proj", "q_proj", "v_proj"]}
