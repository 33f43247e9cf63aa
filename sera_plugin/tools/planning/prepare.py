"""A YAML as a plan's inputs: parsed, checked and its data prepared by the host, as `train` does."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import yaml
from axolotl.cli.config import load_cfg
from axolotl.integrations.base import PluginManager
from axolotl.loaders import load_tokenizer
from axolotl.loaders.utils import load_model_config
from axolotl.utils.dict import DictDefault
from huggingface_hub import constants, try_to_load_from_cache
from transformers import GenerationConfig

from sera_plugin.algorithm.annotations import annotate
from sera_plugin.algorithm.method import Method, Pairs
from sera_plugin.config.kinds import is_reference_free
from sera_plugin.config.quoting import quoted
from sera_plugin.config.sera import SeraConfig
from sera_plugin.data.dataset import TokenizedRows, kept_columns, prepare_rows
from sera_plugin.data.encoding import model_end_ids
from sera_plugin.rundir.store import make_table
from sera_plugin.sampling.choose import Choice, choose_sampler
from sera_plugin.tools.planning.empty_model import EmptyModel, read_model


@dataclass(frozen=True)
class Prepared:
    """What a plan is made of.

    Attributes:
        cfg: the host's resolved configuration.
        config: the `sera:` block in it.
        dataset: the host's prepared rows.
        rows: those of them that can be used, as token ids.
        pairs, held_out: the same as the run has them.
        model: the shape of the model, and why vLLM would not serve it.
        choice: what samples.
        tokenizer_bytes: of the tokenizer's files.
    """

    cfg: DictDefault
    config: SeraConfig
    dataset: Any
    rows: TokenizedRows
    pairs: Pairs
    held_out: Pairs | None
    model: EmptyModel
    choice: Choice
    tokenizer_bytes: int

    @cached_property
    def method(self) -> Method:
        reference_free = is_reference_free(self.config.loss) and not self.cfg.dpo_loss_type
        columns = kept_columns(self.dataset, self.rows.rows, self.config.score_columns)
        return Method(
            self.config,
            reference_free,
            per_token=False,
            total=len(self.pairs),
            iterations=int(self.cfg.num_epochs),
            seed=int(self.cfg.seed or 0),
            annotations=annotate(self.config, self.pairs.prompt_ids, columns, None),
        )


def prepare(path: Path, elsewhere: bool) -> Prepared:
    """Parse, check, load the data: everything that `axolotl train` does before it loads weights.

    Args:
        path: the YAML.
        elsewhere: whether the run will be on another machine, where another vLLM may be.

    Raises:
        ValueError, OSError: for a configuration or data that cannot be trained, with what to do.
    """
    cfg = parse(path)
    config = SeraConfig(**cfg.sera)
    tokenizer = load_tokenizer(cfg)
    model = read_model(cfg, tokenizer)
    data = PluginManager.get_instance().load_datasets(cfg, preprocess=True)
    end_ids = model_end_ids(SimpleNamespace(generation_config=_generation(cfg)), tokenizer)
    rows = prepare_rows(data.train_dataset, tokenizer, end_ids, cfg, config, "train")
    held_out = None
    if data.eval_dataset:
        held_out = prepare_rows(data.eval_dataset, tokenizer, end_ids, cfg, config, "eval")
    with TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        files = sum(file.stat().st_size for file in Path(scratch).rglob("*") if file.is_file())
    return Prepared(
        cfg=cfg,
        config=config,
        dataset=data.train_dataset,
        rows=rows,
        pairs=_pairs(rows),
        held_out=_pairs(held_out) if held_out else None,
        model=model,
        choice=_choose(config, model, elsewhere),
        tokenizer_bytes=files,
    )


def parse(path: Path) -> DictDefault:
    """The host's own parsing and checks, with nothing written into output_dir.

    Raises:
        ValueError, OSError: naming the key and what to do.
    """
    written = _read(path)
    _require_model(written)
    # The host begins output_dir's debug.log anew, and there may be a run there.
    with TemporaryDirectory() as scratch:
        cfg = load_cfg(str(path), output_dir=scratch)
    cfg.output_dir = str(written.get("output_dir") or "./model-out")
    if not cfg.sera:
        raise ValueError(
            f"{path} has no `rl: sera`. Add it and `plugins: [sera_plugin.SeraPlugin]`; README.md "
            "has the lines."
        )
    return cfg


def _read(path: Path) -> Mapping[str, Any]:
    try:
        written = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(written, dict):
        raise ValueError(f"{path} is not a configuration: it holds {quoted(written)}, not keys.")
    return written


def _require_model(written: Mapping[str, Any]) -> None:
    """Say what to do where config.json is not here and cannot be fetched."""
    name = written.get("base_model_config") or written.get("base_model")
    if not isinstance(name, str) or (Path(name) / "config.json").is_file():
        return
    if Path(name).is_dir():
        raise ValueError(f"base_model: {quoted(name, 200)} is a directory without config.json.")
    here = name.startswith((".", "/", "~")) or name.count("/") != 1
    revision = written.get("revision_of_model")
    cached = None if here else try_to_load_from_cache(name, "config.json", revision=revision)
    if isinstance(cached, str) or not (here or constants.HF_HUB_OFFLINE):
        return
    what = "there is no such directory" if here else "its config.json is not in the local hub cache"
    raise ValueError(
        f"base_model: {quoted(name, 200)} cannot be planned: {what}. A plan needs config.json and "
        "the tokenizer's files, no weights. Put them into a directory and name it, or where there "
        f"is a network run `hf download {name} --exclude '*.safetensors' '*.bin' '*.gguf' '*.pth'`."
    )


def _generation(cfg: DictDefault) -> Any:
    """What the model's own generation_config would be once it is loaded."""
    try:
        return GenerationConfig.from_pretrained(cfg.base_model, revision=cfg.revision_of_model)
    except OSError:
        return GenerationConfig.from_model_config(load_model_config(cfg))


def _pairs(rows: TokenizedRows) -> Pairs:
    columns = {name: getattr(rows, name) for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    return Pairs.from_table(make_table(columns))


def _choose(config: SeraConfig, model: EmptyModel, elsewhere: bool) -> Choice:
    if elsewhere and not model.unserved and config.sampler in ("vllm", "vllm-server"):
        return Choice(config.sampler, "as sera.sampler says; not looked for on this machine")
    return choose_sampler(config.sampler, config.vllm_python or sys.executable, model.unserved)
