"""How the project reaches a machine: wheel and sdist, the Dockerfile, the notebook."""

import os
import re
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import nbformat
import pytest
import yaml
from nbclient import NotebookClient
from transformers import AutoTokenizer

from tests.conftest import DATA_TYPE
from tests.doc_pages import ROOT

NOTEBOOK = ROOT / "docs/sera_t4.ipynb"
WRITEFILE = "%%writefile sera-t4.yaml\n"
#: Of a model of the tests' words.
TEMPLATE = (
    "<s>{% for message in messages %}<|{{ message.role }}|> {{ message.content }} {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


#: What git has or would take.
FILES = ("git", "ls-files", "--cached", "--others", "--exclude-standard")


def run(*command: object, **keys) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **keys)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """The project, without what builds leave in a working tree."""
    copy = tmp_path_factory.mktemp("sources")
    for name in run(*FILES, cwd=ROOT).splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def built(sources, tmp_path_factory) -> dict[str, Path]:
    """The sdist and the wheel that is built from it, by suffix."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, sources)
    return {path.suffix: path for path in out.iterdir()}


@pytest.fixture
def host(tmp_path) -> dict[str, str]:
    """The variables of a fresh environment that has Axolotl and its libraries, and not SeRA."""
    home = tmp_path / "axolotl-venv"
    venv.create(home, symlinks=True)
    python = home / "bin/python"
    place = run(python, "-c", "import site; print(site.getsitepackages()[0])").strip()
    # Directories of libraries alone: what is editable in them stays out.
    Path(place, "host.pth").write_text("\n".join(site.getsitepackages()))
    command = home / "bin/axolotl"
    command.write_text(f"#!{python}\nfrom axolotl.cli.main import main\nmain()\n")
    command.chmod(0o755)
    path = os.pathsep.join(
        [str(home / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
    )
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return {**kept, "VIRTUAL_ENV": str(home), "PATH": path, "HF_HUB_OFFLINE": "1"}


def imported_from(host: dict[str, str], tmp_path: Path) -> Path:
    return Path(
        run(
            "python",
            "-c",
            "import sera_plugin; print(sera_plugin.__file__)",
            env=host,
            cwd=tmp_path,
        )
    )


def test_wheel_and_sdist_are_whole_and_pass_the_indexs_checks(built):
    run(sys.executable, "-m", "twine", "check", "--strict", *built.values())
    tracked = run(*FILES, "sera_plugin", cwd=ROOT).splitlines()
    with zipfile.ZipFile(built[".whl"]) as wheel:
        files = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert files == {name for name in tracked if (ROOT / name).exists()}


@pytest.mark.nightly
def test_the_wheel_brings_its_commands_into_an_environment_with_the_host(built, host, tmp_path):
    run("uv", "pip", "install", "--offline", "--no-deps", built[".whl"], env=host)
    assert host["VIRTUAL_ENV"] in str(imported_from(host, tmp_path))
    assert "sera_plugin, version" in run("axolotl", "sera", "--version", env=host, cwd=tmp_path)


def steps(text: str) -> list[tuple[str, str]]:
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [tuple(line.split(None, 1)) for line in lines if line and not line.startswith("#")]


@pytest.mark.nightly
def test_the_steps_of_the_dockerfile_make_an_environment_with_the_command(sources, host, tmp_path):
    """Short of its network: the image is a fresh environment, and `uv` takes no dependencies."""
    ignored = (sources / ".dockerignore").read_text().splitlines()
    kept = [line[1:] for line in ignored if line.startswith("!")]
    variables = {"UV_ARGS": "--offline --no-deps", "VLLM": ""}
    seen = []
    for instruction, rest in steps((sources / "Dockerfile").read_text()):
        seen.append(instruction)
        rest = rest.replace("/workspace", str(tmp_path))
        if instruction == "ARG":
            name, default = rest.split("=", 1)
            variables.setdefault(name, default.strip('"'))
        elif instruction == "FROM":
            assert rest == "${AXOLOTL}"
            assert re.fullmatch(r"axolotlai/axolotl-uv:0\.19\.\d+", variables["AXOLOTL"])
        elif instruction == "COPY":
            *_, place = rest.split()
            for name in kept:
                target = Path(place, name)
                target.parent.mkdir(parents=True, exist_ok=True)
                copy = shutil.copytree if (sources / name).is_dir() else shutil.copy
                copy(sources / name, target)
        else:
            assert instruction == "RUN"
            said = run("sh", "-c", rest, env=host | variables, cwd=tmp_path)
            if "--version" in rest:
                assert "sera_plugin, version" in said
    assert seen == ["ARG", "FROM", "COPY", "ARG", "RUN", "RUN", "ARG", "RUN"]
    assert host["VIRTUAL_ENV"] in str(imported_from(host, tmp_path))


def config_of(notebook) -> dict:
    [source] = [cell.source for cell in notebook.cells if cell.source.startswith(WRITEFILE)]
    return yaml.safe_load(source.removeprefix(WRITEFILE))


@pytest.mark.nightly
def test_the_notebook_runs_from_top_to_bottom(world, tmp_path, monkeypatch):
    """On this machine, with a tiny model in the place of its own and without installing."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    base = tmp_path / "base"
    shutil.copytree(world.base, base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(base)
    rows = {"path": str(world.directory / "train.jsonl"), "ds_type": "json", "split": "train"}
    smoke = {
        "base_model": str(base),
        "datasets": [rows | {"type": DATA_TYPE}],
        "sera": {"selection_ratio": 0.7, "bootstrap_ratio": 0.3, "max_new_tokens": 12},
        **{"sequence_len": 48, "fp16": False, "gradient_accumulation_steps": 8},
    }
    config = config_of(notebook)
    assert config["fp16"] is True
    assert smoke.keys() <= config.keys()
    for cell in notebook.cells:
        if cell.source.startswith("%pip"):
            cell.source = ""
        elif cell.source.startswith(WRITEFILE):
            cell.source = WRITEFILE + yaml.safe_dump(config | smoke)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    place = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=600, resources=place).execute()
    said = {
        cell.source.splitlines()[0]: "".join(
            out.get("text") or out.get("data", {}).get("text/html", "") for out in cell.outputs
        )
        for cell in notebook.cells
        if cell.cell_type == "code" and cell.outputs
    }
    assert "Fits: " in said["!axolotl sera plan sera-t4.yaml --gpu 15"]
    assert "pairs to read: " in said["!axolotl train sera-t4.yaml --launcher python"]
    assert "<iframe srcdoc=" in said["from html import escape"]
    [inspected] = [text for line, text in said.items() if line.startswith("!axolotl sera inspect")]
    assert "Error" not in inspected
    assert "import torch" in said
