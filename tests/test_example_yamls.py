"""Every shipped YAML, and every whole one in the docs, is one that the host's commands take."""

import json
import math
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import yaml
from axolotl.cli.config import prepare_plugins
from axolotl.cli.main import cli
from axolotl.integrations.base import PluginManager
from axolotl.prompt_strategies.dpo import load
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault
from click.testing import CliRunner
from safetensors.torch import load_file

from sera_plugin.cli import sera
from sera_plugin.config.sera import SeraConfig
from sera_plugin.tools import paper
from sera_plugin.tools.demo.run import compared_with
from tests.conftest import adapter
from tests.doc_pages import PAGES, ROOT, blocks

FILES = sorted((ROOT / "example_yamls").glob("*.yaml"))
README = (ROOT / "README.md").read_text()
#: selection_ratio, bootstrap_ratio, loss and rl_beta, where they are not the first ones.
EXPECTED = dict.fromkeys((path.stem for path in FILES), (0.7, 0.3, "dpo", 0.2)) | {
    "mistral-7b-lora": (0.7, 0.3, "dpo", 0.01),
    "mistral-7b-qlora-24gb": (0.7, 0.3, "dpo", 0.01),
    "llama3.1-8b-qlora-24gb": (0.7, 0.3, "dpo", 0.01),
    "llama3.1-8b-qlora-2x24gb": (0.7, 0.3, "dpo", 0.01),
    "llama3.1-70b-lora-2x8x80gb": (0.7, 0.3, "dpo", 0.01),
    "qwen2.5-3b-qlora-16gb": (0.7, 0.3, "dpo", 0.05),
    "best-sera": (0.7, 2.0, "dpo", 0.2),
    "selection-only": (0.7, 0.0, "dpo", 0.2),
    "iterative-dpo": (1.0, 0.0, "dpo", 0.2),
    "ipo": (0.7, 0.3, "ipo", 1.0),
    "slic": (0.7, 0.3, "slic", 0.2),
    "simpo": (0.7, 0.3, "simpo", 2.0),
}


@pytest.fixture
def parse(monkeypatch):
    """The host's own parsing as `load_cfg` does it, short of what needs a hub or a GPU."""
    gpu = {"bf16": True, "tf32": True, "fp8": False, "n_gpu": 1, "compute_capability": "sm_86"}

    def parse(text: str):
        monkeypatch.setattr(PluginManager, "_instance", None)
        written = yaml.safe_load(text)
        cfg = DictDefault(written)
        prepare_plugins(cfg)
        cfg = validate_config(cfg, capabilities=gpu, env_capabilities={"torch_version": "2.13.0"})
        assert (cfg.rl, cfg.trainer_cls) == ("dpo", "sera_plugin.host.trainer.SeraTrainer")
        assert SeraConfig(**cfg.sera) == SeraConfig(**(written.get("sera") or {}))
        # The host drops keys that it does not know.
        assert set(written) - set(cfg.keys()) == set()
        for index, dataset in enumerate(cfg.datasets):
            kind = dataset["type"]
            name = kind if isinstance(kind, str) else "user_defined.default"
            assert load(name, cfg, dataset_idx=index) is not None
        return cfg

    return parse


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_yaml_is_what_it_says(path, parse):
    cfg = parse(path.read_text())
    selection, bootstrap, loss, beta = EXPECTED[path.stem]
    assert (cfg.sera["selection_ratio"], cfg.sera["bootstrap_ratio"]) == (selection, bootstrap)
    assert (cfg.sera["loss"], cfg.rl_beta, cfg.num_epochs) == (loss, beta, 3)
    if path.stem != "demo-cpu":
        gpus = math.prod(map(int, re.findall(r"(\d+)x", path.stem)))
        assert cfg.micro_batch_size * cfg.gradient_accumulation_steps * gpus == 16


def test_the_notebooks_yaml_is_for_a_gpu_without_bf16(parse):
    cells = json.loads((ROOT / "docs/sera_t4.ipynb").read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells]
    [text] = [one for one in sources if one.startswith("%%writefile sera-t4.yaml\n")]
    cfg = parse(text.partition("\n")[2])
    assert (cfg.fp16, cfg.bf16, cfg.adapter, cfg.load_in_4bit) == (True, False, "qlora", True)
    assert cfg.micro_batch_size * cfg.gradient_accumulation_steps == 16


def test_the_demo_is_compared_with_plain_dpo_and_with_the_papers_reward(parse):
    lines = yaml.safe_load((ROOT / "example_yamls/demo-cpu.yaml").read_text())
    others = compared_with(lines, Path("sera-demo"))
    assert list(others) == ["plain DPO, 3 epochs", "SeRA with the paper's reward"]
    plain, published = others.values()
    assert plain["rl"] == "dpo"
    assert not {"plugins", "sera"} & plain.keys()
    ours = {"reward": "paper", "trust": "warn", "keep": "last"}
    assert parse(yaml.safe_dump(published)).sera.items() >= ours.items()
    changed = {"rl", "plugins", "sera", "output_dir", "dataset_prepared_path"}
    for keys in (plain, published):
        assert {key for key in lines if keys.get(key) != lines[key]} <= changed


# A configuration is its dataset's keys, its model's and its system's. The host checks most of them
# with an adapter, so every system is parsed with that model, and every other pair once.
PARSED = {
    *product(["ultrafeedback"], ["mistral-7b"], paper.SYSTEMS),
    *product(paper.DATASETS, paper.MODELS, ["sera-dpo"]),
}


def test_the_papers_configurations_are_parsed_by_the_host(parse, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    everything = product(paper.DATASETS, paper.MODELS, paper.SYSTEMS)
    assert sum(names[2] in paper.systems(names[0]) for names in everything) == 90
    for names in PARSED:
        text = paper.yaml_text(*names)
        keys = yaml.safe_load(text)
        assert (keys["sera"] | keys).items() >= paper.SYSTEMS[names[2]].items()
        cfg = parse(text)
        assert cfg.micro_batch_size * cfg.gradient_accumulation_steps == 16, names


def test_the_paper_command_lists_and_writes_and_overwrites_nothing(tmp_path):
    def call(*arguments):
        return CliRunner().invoke(sera, ["paper", *map(str, arguments)])

    for name in (*paper.DATASETS, *paper.MODELS, *paper.SYSTEMS):
        assert f"  {name} " in call().output
    names, file = ("ultrafeedback", "tinyllama-1.1b", "sera-dpo"), tmp_path / "config.yaml"
    assert call(*names).output == paper.yaml_text(*names)
    assert call(*names, "--output", file).output == f"{file}\n"
    assert file.read_text() == paper.yaml_text(*names)
    again = call(*names, "--output", file)
    said = f"Error: {file} exists. Remove it, or name another file.\n"
    assert (again.exit_code, again.stderr) == (2, said)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("ultrafedback", "mistral-7b", "dpo"), "Did you mean ultrafeedback?"),
        (("tldr", "tinyllama", "dpo"), "Did you mean tinyllama-1.1b?"),
        (("tldr", "mistral-7b", "sera"), " or sera-dpo or "),
        (("tldr", "mistral-7b", "zzz"), "'zzz' is not a system of the paper. Known: sera-dpo, "),
        (("tldr", "mistral-7b", "spin"), "spin is not run on tldr. These are: sera-dpo, "),
        (("tldr", "mistral-7b"), "Give DATASET, MODEL and SYSTEM, or nothing to list them."),
    ],
)
def test_the_paper_command_names_what_it_does_not_know(names, said):
    result = CliRunner().invoke(sera, ["paper", *names])
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr


def test_the_quickstart_turns_a_dpo_yaml_into_a_sera_one(parse):
    (diff,) = re.findall(r"```diff\n(.*?)```", README, re.DOTALL)
    lines = diff.splitlines()
    rest = yaml.safe_load((ROOT / "example_yamls/mistral-7b-lora.yaml").read_text())
    for key in ("plugins", "rl", "sera", "rl_beta", "base_model", "num_epochs"):
        del rest[key]
    after = "\n".join(line[1:] for line in lines if not line.startswith("-"))
    cfg = parse(after + "\n" + yaml.safe_dump(rest))
    assert (cfg.num_epochs, cfg.rl_beta) == (3, 0.2)
    before = yaml.safe_load("\n".join(line[1:] for line in lines if not line.startswith("+")))
    assert before["rl"] == "dpo"


def test_whole_yamls_of_the_pages_are_read(parse):
    for page in PAGES:
        for block in blocks(page, "yaml"):
            keys = yaml.safe_load(block.text)
            if "base_model" in keys and keys.get("rl") == "sera":
                parse(block.text)


def test_readme_and_package_have_the_shipped_yamls():
    assert EXPECTED.keys() == {path.stem for path in FILES}
    links = re.findall(r"\]\(([\w.-]+\.yaml)\)", (ROOT / "example_yamls/README.md").read_text())
    assert sorted(links) == [path.name for path in FILES]
    assert len(FILES) <= 17
    packaged = ROOT / "sera_plugin/tools/demo/demo-cpu.yaml"
    assert packaged.read_text() == (ROOT / "example_yamls/demo-cpu.yaml").read_text()


@pytest.mark.slow
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
    assert "SeRA: what this run will do" in log
    assert "SeRA plan" in log
    assert "SeRA iteration 2: trains on 24 pairs" in log
    assert "SeRA iteration 2 is trained" in log
    # Standard error is no terminal: a line a phase, no bar, and no figures that trackers get.
    assert log.count("SeRA: sample: 24 prompts\n") == 1
    assert "sera/iteration" not in log
    out = tmp_path / "out"
    # The report comes by itself, with the texts of the world's own tokenizer.
    assert f"pairs to read: {out / 'sera/report.html'}\n" in log
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
