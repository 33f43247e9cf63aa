"""The host's commands take the same YAML."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file

from tests.conftest import adapter

pytestmark = pytest.mark.slow


@pytest.mark.nightly
def test_preprocess_train_inference_and_merge_take_one_yaml(base_config, tmp_path):
    def axolotl(*arguments, stdin=None, fails=False):
        command = [sys.executable, "-m", "axolotl.cli.main", *map(str, arguments)]
        if arguments[0] not in ("sera", "merge-lora", "preprocess"):
            command += ["--launcher", "python"]
        result = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, timeout=300, input=stdin
        )
        output = result.stdout + result.stderr
        assert bool(result.returncode) == fails, output[-3000:]
        return output

    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(base_config | adapter() | {"num_epochs": 2}))
    # The host prints an example's tokens in colours, each with its id.
    assert "<|user|>" in axolotl("preprocess", config, "--debug")
    log = axolotl("train", config)
    assert "Loading prepared dataset from disk" in log
    assert "Mapping RL Dataset" not in log
    assert "SeRA run" in log
    assert "SeRA iteration 2: trains on 24 pairs" in log
    assert "SeRA iteration 2 is trained" in log
    # Standard error is no terminal: a line a phase, no bar, and no figures that trackers get.
    assert log.count("SeRA: sample: 24 prompts\n") == 1
    assert "sera/iteration" not in log
    out = tmp_path / "out"
    # The report comes by itself, with the texts of the world's own tokenizer.
    assert f"SeRA report: {out / 'sera/report.html'}" in log
    assert "&lt;|assistant|&gt;" in (out / "sera/report.html").read_text()
    assert "  <s> <|user|>" in axolotl("sera", "inspect", out, "--row", 0)
    assert "Use `axolotl sera eval" in axolotl("evaluate", config, fails=True)
    said = axolotl("inference", config, "--lora-model-dir", out, stdin="b a")
    assert "<|user|>" in said or "b a" in said
    axolotl("merge-lora", config, "--lora-model-dir", out)
    assert load_file(out / "merged/model.safetensors")


def test_the_host_has_the_commands_and_ends_at_a_mistake_before_any_model_is_loaded(
    base_config, tmp_path
):
    from axolotl.cli.main import cli
    from axolotl.integrations.base import PluginManager

    assert "demo" in CliRunner().invoke(cli, ["sera", "--help"]).output
    PluginManager._instance = PluginManager._cfg = None
    base_config["base_model"] = str(tmp_path / "no-such-model")
    base_config["sera"]["selecton_ratio"] = 0.5
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(base_config))
    done = CliRunner().invoke(cli, ["train", str(config), "--launcher", "python"])
    assert done.exit_code == 1
    assert "sera.selecton_ratio is not a key. Did you mean `selection_ratio`?" in str(
        done.exception
    )
