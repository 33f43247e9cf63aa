"""What of a run goes where on the hub: files by name, never a directory.

Weights, their configuration, the tokenizer and the card; no place on this machine is in them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from sera_plugin.config.block import repository
from sera_plugin.rundir.checksums import damage
from sera_plugin.tools.report.reading import Run
from sera_plugin.tools.sharing.card import model_card, policies_of
from sera_plugin.tools.sharing.names import hub_base
from sera_plugin.tools.sharing.pairs import Pairs

CARD = "README.md"
#: What of a policy's directory is uploaded; its README.md is made anew.
WEIGHTS = r"(adapter_)?model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"
_UPLOADED = re.compile(
    rf"{WEIGHTS}|(adapter_|generation_)?config\.json|(special_tokens_map|added_tokens|vocab)\.json"
    r"|tokenizer(_config)?\.json|(tokenizer|spiece|sentencepiece\.bpe)\.model|vocab\.txt|merges\.txt"
    r"|chat_template\.(jinja|json)"
)
#: Keys of configuration files that have a path.
_PLACES = re.compile(r".*(path|name_or_path|_file|_dir)$")


@dataclass(frozen=True)
class Upload:
    """Files for one revision of a repository, by path there."""

    kind: str  # of repository: `model` or `dataset`
    name: str
    revision: str
    what: str  # for people
    files: Mapping[str, Path | bytes] = field(repr=False)

    @property
    def bytes(self) -> int:
        """How large it is."""
        return sum(
            len(one) if isinstance(one, bytes) else one.stat().st_size
            for one in self.files.values()
        )


def plan_push(run: Run, name: str, pairs: str | None) -> tuple[list[Upload], list[str]]:
    """What goes where, and remarks on what does not.

    Args:
        name: the model's repository, `user/name`.
        pairs: the dataset's, None for none.

    Raises:
        ValueError: if a name is none, or the run has no policy that could be pushed.
    """
    for one in filter(None, (name, pairs)):
        repository(one)
    kept, last = policies_of(run)
    if run.state == "going on":
        raise ValueError(f"{run.root.parent} is being trained. Push it when training has ended.")
    if last == 0:
        raise ValueError(
            f"{run.root.parent} has finished no iteration, so there is no policy to push. Continue "
            "the run with `auto_resume_from_checkpoints: true`."
        )
    remarks, dataset = list(run.notes), None
    if pairs is not None:
        try:
            dataset = Pairs(run, pairs)
        except ValueError as error:
            remarks.append(f"no pairs are pushed: {error}")
            pairs = None
    places = _places(run, kept, last)
    if kept not in places:
        raise ValueError(
            f"theta_{kept} is not whole on disk, neither in {run.root.parent} nor in {run.root}. "
            "Restore it from a copy, or train again in another output_dir."
        )
    if run.state != "finished":
        remarks.append(f"the run has not finished: its newest policy, theta_{kept}, is pushed")
    gone = [f"theta_{p}" for p in range(1, last + 1) if p not in places]
    if gone:
        remarks.append(
            f"no revision for {', '.join(gone)}: no longer on disk (sera.keep_policies: true keeps "
            "all)"
        )
    revisions = {"main": kept} | {f"iteration-{policy}": policy for policy in sorted(places)}
    uploads = []
    for revision, policy in revisions.items():
        # The card of `main` says that it is the one that was kept; so does none of the others.
        card = model_card(run, policy, name, pairs, revision)
        files = {**_files(run, places[policy]), CARD: str(card).encode()}
        uploads.append(Upload("model", name, revision, f"theta_{policy}", files))
    if dataset is not None:
        data: dict[str, Path | bytes] = {**dataset.files()}
        what = f"pairs of {len(dataset.iterations)} iteration{'s' * (len(dataset.iterations) > 1)}"
        what += ", conversations" if dataset.messages else ", as text"
        uploads.append(Upload("dataset", str(pairs), "main", what, data))
    return uploads, remarks


def _places(run: Run, kept: int, last: int) -> dict[int, Path]:
    """Where whole policies from theta_1 on are; the host has put the one that is kept in
    `output_dir`."""
    found = {}
    for policy in range(1, last + 1):
        sealed = [run.root / f"iteration-{policy + 1:02d}/policy"]
        if policy == last and run.state == "finished":
            sealed.append(run.root / "last/policy")
        whole = [place for place in sealed if damage(place) is None]
        if not whole and policy == kept and run.state == "finished":
            whole = [run.root.parent] if any(run.root.parent.glob("*.safetensors")) else []
        if whole:
            found[policy] = whole[0]
    return found


def _files(run: Run, directory: Path) -> dict[str, Path | bytes]:
    """A policy's files; in those of its configuration no place on this machine."""
    hub, adapter = hub_base(run), bool(run.config.get("adapter"))
    found: dict[str, Path | bytes] = {}
    for path in sorted(directory.iterdir()):
        base_of_adapter = adapter and path.name.startswith(("model", "config.json"))
        if path.is_symlink() or not _UPLOADED.fullmatch(path.name) or base_of_adapter:
            continue
        found[path.name] = path
        if path.name in ("adapter_config.json", "config.json", "tokenizer_config.json"):
            content = json.loads(path.read_text(encoding="utf-8"))
            text = json.dumps(_without_places(content, hub), indent=2, ensure_ascii=False)
            found[path.name] = text.encode() + b"\n"
    return found


def _without_places(value: Any, hub: str | None, key: str = "") -> Any:
    """A configuration with the last name alone of each path; `hub` is a name of the hub's."""
    if isinstance(value, dict):
        return {name: _without_places(inner, hub, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_places(inner, hub, key) for inner in value]
    if isinstance(value, str) and value != hub and (_PLACES.fullmatch(key) or _is_place(value)):
        return Path(value).name
    return value


def _is_place(value: str) -> bool:
    """Whether a text is an absolute path; `/` and `/think` could be tokens."""
    return os.path.isabs(value) and "\n" not in value and len(Path(value).parts) > 2


def shown_plan(uploads: list[Upload], public: bool) -> str:
    """The plan for people."""
    seen = "public" if public else "private"
    lines = [f"to {constants.ENDPOINT}, {seen} where a repository is new:"]
    lines += [
        f"  {one.kind} {one.name} @ {one.revision}: {one.what}, {len(one.files)} files, "
        f"{_size(one.bytes)}"
        for one in uploads
    ]
    return "\n".join(lines)


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
