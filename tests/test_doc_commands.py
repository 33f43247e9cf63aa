"""Every command that README and docs show is run, or listed here with the reason why not.

A page's blocks are followed in order, in a directory of its own: `yaml` blocks that begin with
`# NAME.yaml` and `diff` blocks with `--- A.yaml` and `+++ B.yaml` make files, `sh` and `python`
blocks are run. What lies in that directory beforehand is said at `playground`.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.doc_pages import PAGES, ROOT, blocks, commands, file_name, inline_code, patched

#: Commands that are not run, and why. Whatever matches none of these is.
NOT_RUN = {
    r"make [a-z-]+.*": "makes an environment of its own; the target is looked up below",
    r"pip install (\.|\"\.\[flash-attn\].*|dist/\S+)": "needs a package index",
    r"python3(\.\d+)? -m venv ~/vllm( && ~/vllm/bin/pip install vllm)?": "needs a package index",
    r"~/vllm/bin/pip install vllm": "needs a package index",
    r"CUDA_VISIBLE_DEVICES=1 .* ~/vllm/bin/vllm serve .*": "needs a GPU and a model from the hub",
    r"axolotl sera convert my_dpo\.yaml .*|axolotl (preprocess|train) sera\.yaml": "needs other "
    "files of a LLaMA-Factory user; tests/test_convert.py converts such files and trains",
    r"_AXOLOTL_COMPLETE=.*|echo \"source .*": "changes a shell; test_report_commands.py completes",
    r"axolotl sera eval .* alpaca_eval\.json .*": "needs AlpacaEval's prompts and a judge",
    r"axolotl sera eval .* (ifeval\.jsonl|reward_bench\.parquet).*": "needs a benchmark's rows; "
    "tests/test_eval_command.py and test_eval_rewards.py have such",
    r".* \| jq .*": "needs jq; --json is tested in test_report_commands.py",
    r"axolotl train example_yamls/\S+\.yaml --launcher python": "needs a GPU and a model from the "
    "hub; tests/test_example_yamls.py has the host parse each of these files",
    r"axolotl train config\.yaml --launcher torchrun -- --nnodes=2 .*": "needs two machines with "
    "eight GPUs each; tests/test_machines.py has two of another kind",
    r"docker (build|run) .*": "needs Docker and the host's image; tests/test_package.py runs the "
    "Dockerfile's steps",
    r"axolotl train ray\.yaml --launcher python": "needs GPUs and ray; tests/test_ray.py has CPUs",
}
#: In Python blocks that are not run, because they download something.
DOWNLOADS = ("load_dataset(", "lm_eval.tasks")
#: Run once, before any page, because other pages need what it makes.
MADE_BEFORE = "axolotl sera demo"
SHOWN = [(block, line) for page in PAGES for block in blocks(page, "sh")
         for line in commands(block)]  # fmt: skip


def reason(line: str) -> str | None:
    return next((why for pattern, why in NOT_RUN.items() if re.fullmatch(pattern, line)), None)


def test_every_block_says_what_it_is():
    """A command could hide in a block that is not marked as one."""
    known = {"sh", "yaml", "diff", "python", "json", "text", "{toctree}"}
    command = re.compile(r"^\s*(\$ *)?(axolotl|make|pip|python3?) ", re.M)
    for block in (block for page in PAGES for block in blocks(page)):
        assert block.language in known, block.place
        hidden = block.language == "text" and command.search(block.text)
        assert not hidden, f"{block.place} holds a command: mark it as sh"


def test_what_is_not_run_is_shown_and_exists():
    for pattern in NOT_RUN:
        assert any(re.fullmatch(pattern, line) for _, line in SHOWN), f"{pattern}: remove it"
    assert sum(reason(line) is None for _, line in SHOWN) > len(SHOWN) / 2
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    for block, line in SHOWN:
        words = line.split()
        if words[0] == "make":
            assert words[1] in targets, block.place
        if words[2:] and words[2].startswith("example_yamls/"):
            assert (ROOT / words[2]).exists(), block.place


def test_commands_have_the_options_that_they_name():
    """Those in sentences and those in blocks: cheap beside running them, which a release does."""
    from sera_plugin.cli import sera

    inline = [(page, code) for page in PAGES for code in inline_code(page)]
    for where, code in [(block.page, line) for block, line in SHOWN] + inline:
        words = code.split()
        if words[:2] == ["axolotl", "sera"] and re.fullmatch("[a-z]+", "".join(words[2:3])):
            known = {option for one in sera.commands[words[2]].params for option in one.opts}
            given = {word.split("=")[0] for word in words if word.startswith("--")}
            assert given <= known | {"--help"}, f"{where.name}: {code}"


@pytest.fixture(scope="session")
def playground(world, tmp_path_factory) -> Path:
    """A directory as the pages find it: a demo and two other runs, YAMLs, a scored prompt."""
    here = tmp_path_factory.mktemp("playground")
    (here / "sera-demo").mkdir()
    shutil.copytree(world.base, here / "sera-demo/base-model")
    shutil.copy(world.directory / "train.jsonl", here / "sera-demo/pairs.jsonl")
    shutil.copytree(ROOT / "example_yamls", here / "example_yamls")
    answers = [{"text": "a b", "score": 1.0}, {"text": "b a", "score": 0.5}]
    (here / "scored.jsonl").write_text(json.dumps({"prompt": "b a", "responses": answers}) + "\n")
    config = (ROOT / "example_yamls/demo-cpu.yaml").read_text()
    (here / "config.yaml").write_text(config.replace("./sera-demo/run", "./outputs/config"))
    (here / ".venv/bin").mkdir(parents=True)
    (here / ".venv/bin/activate").touch()
    (here / ".programs").mkdir()
    # The group without the host, which takes ten seconds to start; that the host has it is tested
    # in test_example_yamls.py.
    (here / ".programs/axolotl").write_text(
        '#!/bin/sh\n[ "$1" = sera ] && { shift; exec python -m sera_plugin "$@"; }\n'
        'exec python -m axolotl.cli.main "$@"\n'
    )
    (here / ".programs/axolotl").chmod(0o755)
    run(here, MADE_BEFORE)
    # The demo's pairs are too few here to tell its fitted reward from a coin: what it compares with
    # has sampled pairs, too.
    for name, made in (("my-run", "paper-sera"), ("other-run", "run")):
        shutil.copytree(here / "sera-demo" / made, here / "outputs" / name)
    return here


def run(here: Path, command: str | list[str]) -> None:
    """Run a shell line, with `axolotl` and `python` of this environment, or a program."""
    path = f"{here}/.programs:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "HOME": str(here)}
    line = ["bash", "-euo", "pipefail", "-c", command] if isinstance(command, str) else command
    how = {"cwd": here, "env": environment, "stdin": subprocess.DEVNULL, "timeout": 600}
    done = subprocess.run(line, capture_output=True, text=True, **how)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"


RUNNING = {block.page for block, line in SHOWN if reason(line) is None}
RUNNING |= {page for page in PAGES if blocks(page, "python")}


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("page", sorted(RUNNING), ids=lambda page: page.name)
def test_what_a_page_shows_runs(page, playground, tmp_path):
    here = tmp_path / "here"
    shutil.copytree(playground, here)
    files: dict[str, str] = {}
    for block in blocks(page):
        if block.language == "yaml" and (name := file_name(block)):
            files[name] = block.text
            (here / name).write_text(block.text)
        elif block.language == "diff" and (made := patched(block, files)):
            name, files[made[0]] = made
            (here / name).write_text(files[name])
        elif block.language == "python" and not any(one in block.text for one in DOWNLOADS):
            run(here, [sys.executable, "-c", block.text])
        elif block.language == "sh":
            for line in commands(block):
                if reason(line) is None and line != MADE_BEFORE:
                    run(here, line)
