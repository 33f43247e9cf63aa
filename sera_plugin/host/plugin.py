"""The host's public hooks, and nothing else."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from axolotl.integrations.base import BasePlugin
from axolotl.utils.dict import DictDefault

from sera_plugin.config.quoting import plain
from sera_plugin.host.config import resolve
from sera_plugin.host.data_config import restore_entries

if TYPE_CHECKING:
    from axolotl.common.datasets import TrainDatasetMeta

LOG = logging.getLogger("axolotl.sera")


class SeraPlugin(BasePlugin):
    """Adds `rl: sera` to Axolotl."""

    #: The datasets as they were before the host validated them.
    _entries: Mapping[str, Any] = MappingProxyType({})

    def register(self, cfg: dict[str, Any]) -> None:
        """The raw configuration, before the host validates it.

        Raises:
            ValueError: for anything in it that SeRA cannot run with.
        """
        self._entries = resolve(cfg) or self._entries

    def get_input_args(self) -> str:
        """The pydantic model that the host merges into its own."""
        return "sera_plugin.config.sera.SeraArgs"

    def load_datasets(self, cfg: DictDefault, preprocess: bool = False) -> TrainDatasetMeta:
        """The pairs to train and to evaluate on, instead of the host's own loading."""
        from sera_plugin.host.datasets import load_pairs

        restore_entries(cfg, self._entries)
        if not preprocess:
            from sera_plugin.host.patches import prepare_host

            prepare_host(cfg)
        return load_pairs(cfg)

    def post_trainer_create(self, cfg: DictDefault, trainer: Any) -> None:
        """The host calls this for training alone, and before it writes into output_dir."""
        trainer.open_run()

    def post_train_unload(self, cfg: DictDefault) -> None:
        """After the last thing the host does: a report on the run, which nothing waits for."""
        if os.environ.get("RANK", "0") == "0":
            _report(Path(cfg["output_dir"]))


def _report(output_dir: Path) -> None:
    """Write the report; a run that is trained does not fail for want of one."""
    try:
        from sera_plugin.tools.report.page import write_report

        LOG.info("SeRA report: %s", write_report(output_dir))
    except Exception as error:  # whatever it is: the model is saved
        LOG.warning(
            "SeRA: the report could not be written (%s: %s). The run is complete; to try again: "
            "axolotl sera report %s",
            type(error).__name__,
            plain(str(error), 300),
            output_dir,
        )
