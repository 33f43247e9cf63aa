"""Which base model a run began with: the files that make it what it is, as run.json keeps them.

Noise of some per cent on them moves the log-probabilities of a 4-bit model by less than its kernels
do, so that only the files tell it.
"""

import os
import stat
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from sera_plugin.config.quoting import quoted
from sera_plugin.rundir.checksums import digest
from sera_plugin.rundir.format import Invalid, WeightIndex, read_json

#: What a model's weights are in, which file has which of them, and what is computed with them.
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")
_FILES = (*_WEIGHTS, "config.json", "adapter_config.json")


def describe_base(base_model: str, revision: str | None = None) -> dict[str, Any] | None:
    """The base model's weight files and configuration.

    Returns:
        For a directory `files`: their sizes in bytes, and `sha256` of each. For a model of the hub
        `revision`, the commit that the name led to, and `files` without it. None where the hub's
        cache does not have it.

    Raises:
        ValueError: if a file cannot be read.
    """
    directory = Path(base_model)
    if directory.is_dir():
        sizes = _sizes(base_model, directory)
        hashed = [name for name, size in sizes.items() if size is not None]
        return {"files": sizes, "sha256": _hashes(base_model, directory, hashed)}
    try:
        found = try_to_load_from_cache(base_model, "config.json", revision=revision)
    except ValueError:  # no name that the hub could have
        found = None
    if not isinstance(found, str):
        return None
    snapshot = Path(found).parent
    return {"revision": snapshot.name, "files": _sizes(base_model, snapshot)}


def require_same_base(
    earlier: Mapping[str, Any], base_model: str, revision: str | None, root: Path
) -> None:
    """Refuse to continue the run in `root` with another base model than it began with.

    Sizes are compared first: what they tell takes no time. Of a model of the hub a cache may have
    got further files since.

    Args:
        earlier: what `describe_base` has said when the run began.

    Raises:
        ValueError: naming the file that differs, and what to do.
    """
    before: dict[str, int | None] = earlier.get("files", {})
    if "revision" in earlier:
        now = describe_base(base_model, revision)
        if now is None:
            return
        if (commit := now.get("revision")) != earlier["revision"]:
            raise _another(
                base_model,
                root,
                f"its revision is {commit}, and was {earlier['revision']}",
                f"set revision_of_model: {earlier['revision']}",
            )
        after = {name: size for name, size in now["files"].items() if name in before}
    else:
        directory = Path(base_model)
        after = _sizes(base_model, directory, before) if directory.is_dir() else {}
    for name in sorted(before.keys() | after.keys()):
        if name not in after:
            raise _another(base_model, root, f"{name} is missing")
        if name not in before:
            raise _another(base_model, root, f"{name} was not there")
        if (has := after[name]) != (had := before[name]):
            raise _another(base_model, root, f"{name} has {_bytes(has)}, and had {_bytes(had)}")
    sums: dict[str, str] = earlier.get("sha256", {})
    for name, found in _hashes(base_model, Path(base_model), list(sums)).items():
        if found != sums[name]:
            raise _another(base_model, root, f"the checksum of {name} differs")


def _another(base_model: str, root: Path, what: str, restore: str = "restore it") -> ValueError:
    return ValueError(
        f"base_model: {quoted(base_model, 200)} is not the model that the run in {root} began "
        f"with: {what}. To continue the run, {restore}. To start fresh, set another output_dir; "
        "this run stays as it is."
    )


def _bytes(size: int | None) -> str:
    return "no content of a file" if size is None else f"{size:,} bytes"


def _names(directory: Path) -> set[str]:
    """The files that make a model what it is; those that an index names may be further down."""
    names = {name for name in os.listdir(directory) if any(map(Path(name).match, _FILES))}
    for index in [name for name in names if name.endswith(".index.json")]:
        with suppress(Invalid, OSError):  # no model is loaded by it
            parts = set(read_json(directory / index, WeightIndex)["weight_map"].values())
            names |= {one for one in parts if not {"..", "/"} & {*Path(one).parts}}
    return names


def _sizes(base_model: str, directory: Path, known: Collection[str] = ()) -> dict[str, int | None]:
    """Name -> bytes, through links; None for what is no file. `known` are to be looked for too."""
    found: dict[str, int | None] = {}
    try:
        for name in sorted(_names(directory).union(known)):
            path = directory / name
            if not os.path.lexists(path):
                continue
            about = path.stat() if path.exists() else None
            regular = about is not None and stat.S_ISREG(about.st_mode)
            found[name] = about.st_size if about is not None and regular else None
    except OSError as error:
        raise _unreadable(base_model, error) from None
    return found


def _hashes(base_model: str, directory: Path, names: list[str]) -> dict[str, str]:
    """Name -> SHA-256, hexadecimal."""
    try:
        return {name: digest(directory / name) for name in names}
    except OSError as error:
        raise _unreadable(base_model, error) from None


def _unreadable(base_model: str, error: OSError) -> ValueError:
    return ValueError(
        f"base_model: {quoted(base_model, 200)} cannot be read: {error.strerror}: "
        f"{quoted(error.filename, 200)}. Change its permissions, or name another copy."
    )
