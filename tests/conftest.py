"""A small world to train in, and the real host to train with."""

import copy
import json
import logging
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from random import Random
from types import SimpleNamespace

# Before the host is imported: it reads these at import time.
os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_DISABLED", "true")

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

DATA_TYPE = {
    **{f"field_{name}": name for name in ("prompt", "chosen", "rejected")},
    "prompt_format": "<s> <|user|> {prompt} <|assistant|>",
    "chosen_format": " {chosen}",
    "rejected_format": " {rejected}",
}
#: A YAML that trains in seconds on a CPU in float32.
SHORT = """
{plugins: [sera_plugin.SeraPlugin], rl: sera, sera: {max_new_tokens: 12, temperature: 1.0,
reward: paper, trust: warn, keep: last},
sequence_len: 48, num_epochs: 3, micro_batch_size: 4, gradient_accumulation_steps: 2,
learning_rate: 1.0e-3, lr_scheduler: constant, optimizer: adamw_torch, seed: 11, bf16: false,
fp16: false, tf32: false, attn_implementation: sdpa, gradient_checkpointing: false,
logging_steps: 1, evals_per_epoch: 1, saves_per_epoch: 1}
"""


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> SimpleNamespace:
    """The demo's model, barely trained, and 24 preference pairs with 6 held out."""
    return make_world(tmp_path_factory.mktemp("world"))


def make_world(directory: Path) -> SimpleNamespace:
    """See `world`; for tests that make it in a process of their own."""
    from sera_plugin.tools.demo.base_model import load_model, respond, train_base_model
    from sera_plugin.tools.demo.run import make_pairs
    from sera_plugin.tools.demo.world import make_prompt

    train_base_model(directory / "base", steps=40, batch_size=32)
    random = Random(5)
    prompts = [make_prompt(random) for _ in range(40)]
    model, tokenizer = load_model(directory / "base")
    first, second = (respond(model, tokenizer, prompts, seed=seed) for seed in (1, 2))
    rows = make_pairs(prompts, first, second)
    write_rows(directory / "train.jsonl", rows[:24])
    write_rows(directory / "test.jsonl", rows[24:30])
    return SimpleNamespace(base=directory / "base", directory=directory, rows=rows)


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def base_config(world, tmp_path) -> dict:
    """`SHORT` with data, model and a place for its output; tests change what they are about."""
    return make_config(world.directory, tmp_path)


def make_config(world: Path, directory: Path) -> dict:
    """See `base_config`: the data and the model of `world`, output below `directory`."""
    data = {"ds_type": "json", "split": "train", "type": DATA_TYPE}
    return copy.deepcopy(
        {
            **yaml.safe_load(SHORT),
            "base_model": str(world / "base"),
            "datasets": [{"path": str(world / "train.jsonl"), **data}],
            "test_datasets": [{"path": str(world / "test.jsonl"), **data}],
            "dataset_prepared_path": str(directory / "prepared"),
            "output_dir": str(directory / "out"),
        }
    )


def with_an_early_best(config: dict) -> dict:
    """theta_1 is the best policy: the pairs are held out too, and learnt the wrong way round."""
    config["sera"] |= {"keep": "best", "label_noise": 1.0}
    return config | {"test_datasets": config["datasets"], "learning_rate": 1e-2}


def adapter(**keys) -> dict:
    """The keys that make a configuration a LoRA one."""
    modules = ["q_proj", "v_proj", "down_proj"]
    lora = {"lora_r": 4, "lora_alpha": 8, "lora_target_modules": modules}
    return {"adapter": "lora", **lora, **keys}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory as LLaMA-Factory has one, see `llama_factory.lay_out`."""
    from tests.llama_factory import lay_out

    monkeypatch.chdir(tmp_path)
    lay_out(tmp_path / "data")
    return tmp_path


def load_config(config: dict, directory: Path):
    """Parse a configuration with the real host, as every command does."""
    from axolotl.cli.config import load_cfg
    from axolotl.integrations.base import PluginManager

    # A process parses one configuration; tests parse many.
    PluginManager._instance = PluginManager._cfg = None
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return load_cfg(str(path))


def train_config(config: dict, directory: Path) -> SimpleNamespace:
    """`axolotl train` in this process; returns what happened."""
    import axolotl.loaders.model
    import axolotl.train
    from axolotl.integrations.base import PluginManager

    from sera_plugin.host.loop import Loop

    iterations = {}
    begin = Loop.begin

    def spy(self, iteration, *args):
        prepared = begin(self, iteration, *args)
        iterations[iteration] = prepared[0]
        return prepared

    cfg = load_config(config, directory)
    # Both keep the manager that there was when they were imported.
    for module in (axolotl.train, axolotl.loaders.model):
        module.PLUGIN_MANAGER = PluginManager.get_instance()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "begin", spy)
        # The host takes bf16 for a GPU's alone; torch's autocast knows it on a CPU too.
        patch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
        data = PluginManager.get_instance().load_datasets(cfg, preprocess=False)
        model, _, trainer = axolotl.train.train(cfg=cfg, dataset_meta=data)
    output, history = Path(cfg.output_dir), trainer.state.log_history
    found = {"cfg": cfg, "model": model, "trainer": trainer, "training_pairs": iterations}
    return SimpleNamespace(**found, output=output, run=output / "sera", history=history)


@pytest.fixture
def load(tmp_path):
    """See `load_config`."""
    return lambda config: load_config(config, tmp_path)


@pytest.fixture
def with_template(world, load, tmp_path):
    """A parsed configuration of `world` whose messages go through the tokenizer's chat template."""
    config = make_config(world.directory, tmp_path) | {"chat_template": "tokenizer_default"}
    return load(config | {"test_datasets": None})


@pytest.fixture
def sera_log(caplog, monkeypatch):
    """What SeRA warns of. The host sets up loggers of its own, whose messages reach no other."""
    import axolotl.cli  # noqa: F401

    log = logging.getLogger("axolotl.sera")
    monkeypatch.setattr(log, "handlers", [caplog.handler])
    monkeypatch.setattr(log, "propagate", False)
    caplog.set_level("WARNING", "axolotl.sera")
    return caplog


@pytest.fixture
def train(tmp_path):
    """See `train_config`."""
    return lambda config: train_config(config, tmp_path)


def table(run: Path, iteration: int, name: str) -> dict[str, list]:
    """A table of an iteration, as columns."""
    return pq.read_table(run / f"iteration-{iteration:02d}/{name}.parquet").to_pydict()


def summary(run: Path, iteration: int) -> dict:
    return json.loads((run / f"iteration-{iteration:02d}/summary.json").read_text())


@pytest.fixture
def model(world):
    """The world's model, loaded by itself."""
    from sera_plugin.tools.demo.base_model import load_model

    return load_model(world.base)[0].eval()


def ids(*lengths, seed=0):
    """Token ids of the world's words, a sequence a length."""
    random = np.random.default_rng(seed)
    return [random.integers(6, 36, length).astype(np.int32) for length in lengths]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 MiB of its own; only root may have one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def fill(disk: Path) -> None:
    """Leave no byte free on a disk."""
    with (disk / "filler").open("wb", buffering=0) as file:
        for size in (2**16, 1):
            with suppress(OSError):
                while True:
                    file.write(bytes(size))


def flip(path: Path) -> None:
    """Change a bit of a file."""
    content = bytearray(path.read_bytes())
    content[Random(1).randrange(len(content))] ^= 4
    path.write_bytes(content)


@pytest.fixture(scope="session")
def bench(world, tmp_path_factory):
    """Runs that are killed and continued; each kind's uninterrupted run is made once."""
    from tests.crash.points import Bench

    return Bench(tmp_path_factory.mktemp("crash"), world.directory)


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """The docs as `make docs` builds them; a warning is an error."""
    directory = tmp_path_factory.mktemp("site")
    root = Path(__file__).parents[1]
    options = ["--nitpicky", "--fail-on-warning", "--keep-going", "--quiet"]
    command = [sys.executable, "-m", "sphinx", *options, root / "docs", directory]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    return directory
