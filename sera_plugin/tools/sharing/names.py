"""What a run, its base model and its datasets are called where the run's machine is not known."""

import os
import re
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path

from sera_plugin.tools.report.reading import Run

_IDENTITY = ("dataset_fingerprint", "evaluation_fingerprint", "seed", "loss", "beta")
_METHOD = ("selection", "selection_ratio", "labeler", "bootstrap_ratio", "reward", "trust", "gamma")
#: Names as the hub has them, or of a directory in another.
NAMED = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_DATA_SUFFIXES = (".arrow", ".csv", ".gz", ".json", ".jsonl", ".parquet", ".txt", ".zip")


def run_id(run: Run) -> str:
    """What a run is known by, wherever its directory lies.

    Drawn when it began; earlier versions have not, and it is then made of its data and the method.
    """
    if drawn := run.description.get("run_id"):
        return str(drawn)
    told = [run.description.get(key) for key in _IDENTITY]
    told += [shown_base(run), run.config.get("learning_rate"), run.config.get("num_epochs")]
    told += [run.settings.get(key) for key in _METHOD]
    return sha256(repr(told).encode()).hexdigest()[:16]


def shown_base(run: Run) -> str:
    """The base model's name: a local one's directory."""
    return hub_base(run) or Path(str(run.config.get("base_model", "unknown"))).name


def hub_base(run: Run) -> str | None:
    """The base model's name on the hub, None of a local one."""
    name = str(run.config.get("base_model", ""))
    weights = run.description.get("base_weights")
    if weights is not None and weights.get("revision") is None:  # its files were read
        return None
    return name if _on_hub(name) else None


def _on_hub(name: str, local: Sequence[str] | None = None) -> bool:
    """Whether a name is one of the hub's and was none of a `local` file or directory.

    Where that is not known, as of a run of an earlier version: whether it is none here.
    """
    here = os.path.exists(name) if local is None else name in local
    return bool(NAMED.fullmatch(name)) and not name.endswith(_DATA_SUFFIXES) and not here


def datasets_of(run: Run) -> tuple[list[str], list[str]]:
    """The datasets, and those of prompts, by name: those on the hub, and the names of local files
    or directories."""
    hub, local = [], []
    known = run.description.get("local_datasets")
    for entry in (*(run.config.get("datasets") or ()), *(run.settings.get("prompts") or ())):
        path = str((entry if isinstance(entry, Mapping) else {}).get("path", ""))
        if _on_hub(path, known) and not entry.get("ds_type"):
            hub.append(path)
        elif path:
            # Of an address what follows its host, and no query, could be a secret.
            local.append(Path(path.partition("?")[0]).name)
    return list(dict.fromkeys(hub)), list(dict.fromkeys(local))
