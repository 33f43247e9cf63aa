"""The host's public hooks, and nothing else."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from axolotl.integrations.base import BasePlugin
from axolotl.utils.dict import DictDefault

from sera_plugin.config.quoting import plain
from sera_plugin.config.sera import SeraConfig
from sera_plugin.host.config import resolve, restore_entries
from sera_plugin.host.ends import describe_done
from sera_plugin.host.errors import end_with_sentences
from sera_plugin.rundir.machines import Watch

if TYPE_CHECKING:
    from datasets import Dataset

    from sera_plugin.host.datasets import Loaded

LOG = logging.getLogger("axolotl.sera")


class SeraPlugin(BasePlugin):
    """Adds `rl: sera` to Axolotl."""

    #: The datasets as they were before the host validated them.
    _entries: Mapping[str, Any] = MappingProxyType({})
    #: The rows of `sera.prompts`, which the host has no way to hand to its trainer.
    prompts: Dataset | None = None

    def register(self, cfg: dict[str, Any]) -> None:
        """Raises ValueError for what SeRA cannot run with, before the host validates it."""
        end_with_sentences()
        self._entries = resolve(cfg) or self._entries

    def get_input_args(self) -> str:
        """The pydantic model that the host merges into its own."""
        return "sera_plugin.config.sera.SeraArgs"

    def load_datasets(self, cfg: DictDefault, preprocess: bool = False) -> Loaded:
        """The pairs to train and to evaluate on, instead of the host's own loading."""
        from sera_plugin.host.datasets import load_pairs
        from sera_plugin.sampling.samplers import require_vllm

        # `axolotl sera plan` may be of another machine.
        here = not preprocess or cfg.is_preprocess
        if here and os.environ.get("LOCAL_RANK", "0") == "0":  # each machine has its own
            # Both would be missed after hours of training.
            require_vllm(SeraConfig(**cfg.sera))
            if not preprocess and cfg.sera["push_to_hub"] and os.environ.get("RANK", "0") == "0":
                from sera_plugin.tools.sharing.hub import require_token

                require_token(cfg.sera["push_to_hub"])

        restore_entries(cfg, self._entries)
        if not preprocess:
            from sera_plugin.host.patches import prepare_host

            prepare_host(cfg)
        loaded = load_pairs(cfg)
        self.prompts = loaded.prompts
        return loaded

    def pre_model_load(self, cfg: DictDefault) -> None:
        """Seed what loading draws: rows of new tokens, the same in a continued run and each rank.

        The host seeds later.
        """
        from transformers import set_seed

        set_seed(cfg.seed)

    def post_trainer_create(self, cfg: DictDefault, trainer: Any) -> None:
        """Open the run: for training alone, and before the host writes into output_dir."""
        self._watch = Watch(trainer.store.ranks)
        trainer.write_card = partial(_write_card, cfg)
        later = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        trainer.loop.open(sharded_later=bool(later))

    def post_train(self, cfg: DictDefault, model: Any) -> None:
        """Processes end one by one from here on."""
        self._watch.close(done=True)

    def post_train_unload(self, cfg: DictDefault) -> None:
        """Write a report, push what `sera.push_to_hub` says, and say the last words."""
        if os.environ.get("RANK", "0") != "0":
            return
        output_dir, name = Path(cfg["output_dir"]), SeraConfig(**cfg["sera"]).push_to_hub
        report = None
        with _not_failing("the report could not be written", f"report {output_dir}"):
            from sera_plugin.tools.report.page import write_report

            LOG.info("SeRA: writing the report")
            report = write_report(output_dir)
        if name is not None:
            with _not_failing("the run was not pushed", f"push {output_dir} --to {name}"):
                from sera_plugin.tools.sharing.hub import push_run

                push_run(output_dir, name, say=lambda text: LOG.info("SeRA: %s", text))
        with suppress(Exception):  # a damaged file, which the report has named: the model is saved
            yaml = str(cfg.get("axolotl_config_path") or "YAML")
            LOG.info("%s", describe_done(output_dir, yaml, report))


def _write_card(cfg: DictDefault) -> None:
    with _not_failing("the model's card could not be written", ""):
        from sera_plugin.tools.sharing.card import write_card

        write_card(Path(cfg["output_dir"]))


@contextmanager
def _not_failing(what: str, again: str) -> Iterator[None]:
    """A run that is trained does not fail for want of what describes it; `again` is a command."""
    try:
        yield
    except Exception as error:  # whatever it is: the model is saved
        LOG.warning(
            f"SeRA: {what} ({type(error).__name__}: {plain(str(error), 300)})."
            + (f" The run is complete; to try again: axolotl sera {again}" if again else "")
        )
