"""A run on the Hugging Face hub: its policies as revisions of a model, its pairs as a dataset.

What is uploaded is named, never a directory: weights, their configuration, the tokenizer and the
card. A commit is made of what the hub does not have yet, so the same command again adds nothing,
and one that was broken off goes on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    constants,
    get_token,
)
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import EntryNotFoundError

from sera_plugin.config.block import repository
from sera_plugin.config.quoting import plain
from sera_plugin.rundir.checksums import damage
from sera_plugin.tools.report.reading import Run, find_run
from sera_plugin.tools.sharing.card import RUN_KEY, hub_base, model_card, policies_of, run_id
from sera_plugin.tools.sharing.pairs import Pairs

#: What of a policy's directory is uploaded; its README.md is made anew.
_WEIGHTS = r"(adapter_)?model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"
_UPLOADED = re.compile(
    rf"{_WEIGHTS}|(adapter_|generation_)?config\.json|(special_tokens_map|added_tokens|vocab)\.json"
    r"|tokenizer(_config)?\.json|(tokenizer|spiece|sentencepiece\.bpe)\.model|vocab\.txt|merges\.txt"
    r"|chat_template\.(jinja|json)"
)
#: Of ours on the hub, what goes where this push does not have it: weights in other parts, and
#: iterations that were trained anew.
_REPLACED = re.compile(rf"{_WEIGHTS}|adapter_config\.json|data/iteration-\d+\.parquet")
#: Keys of configuration files that have a path.
_PLACES = re.compile(r".*(path|name_or_path|_file|_dir)$")
_CARD = "README.md"
_KEPT_OF_CARD = ("license", "license_name", "license_link", "language", "extra_gated_prompt")
_AGAIN = "Start the same command again: it goes on with what is missing."


class PushFailed(OSError):
    """The hub did not take it; the message says why and what to do."""


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
    repository(name)
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
            dataset = Pairs(run, repository(pairs))
        except ValueError as error:
            if not re.fullmatch(r".+/.+", pairs) or "no repository" in str(error):
                raise
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
        files = {**_files(run, places[policy]), _CARD: str(card).encode()}
        uploads.append(Upload("model", name, revision, f"theta_{policy}", files))
    if dataset is not None:
        files = dataset.files()
        what = f"pairs of {len(dataset.iterations)} iterations"
        what += ", conversations" if dataset.messages else ", as text"
        uploads.append(Upload("dataset", str(pairs), "main", what, files))
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
    local = None if hub_base(run) else str(run.config.get("base_model", ""))
    adapter = bool(run.config.get("adapter"))
    found: dict[str, Path | bytes] = {}
    for path in sorted(directory.iterdir()):
        base_of_adapter = adapter and path.name.startswith(("model", "config.json"))
        if path.is_symlink() or not _UPLOADED.fullmatch(path.name) or base_of_adapter:
            continue
        found[path.name] = path
        if path.name in ("adapter_config.json", "config.json", "tokenizer_config.json"):
            content = json.loads(path.read_text(encoding="utf-8"))
            text = json.dumps(_without_places(content, local), indent=2, ensure_ascii=False)
            found[path.name] = text.encode() + b"\n"
    return found


def _without_places(value: Any, local: str | None, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _without_places(inner, local, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_places(inner, local, key) for inner in value]
    if isinstance(value, str) and _PLACES.fullmatch(key):
        if value == local or value.startswith(("/", "~", ".")) or Path(value).exists():
            return Path(value).name
    return value


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


def require_token(name: str) -> None:
    """Raises ValueError where the hub would take nothing for the repository `user/name`: without a
    connection, without a token, or with one that may not write there."""
    if constants.HF_HUB_OFFLINE:
        raise ValueError(
            f"{name} cannot be pushed to: HF_HUB_OFFLINE is set, which forbids any request to the "
            "hub. Unset it, or push later: axolotl sera push."
        )
    if not get_token():
        raise ValueError(
            f"{name} cannot be pushed to: there is no token. Make one that may write at "
            f"{constants.ENDPOINT}/settings/tokens, then `hf auth login` or export HF_TOKEN."
        )
    try:
        me = HfApi().whoami()
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise ValueError(
                f"{name} cannot be pushed to: {constants.ENDPOINT} does not know the token (that "
                "of HF_TOKEN, else of `hf auth login`). Make a new one."
            ) from None
        raise PushFailed(f"{constants.ENDPOINT} does not answer: {_said(error)}") from None
    except httpx.HTTPError as error:
        raise PushFailed(f"{constants.ENDPOINT} cannot be reached: {_said(error)}") from None
    role = ((me.get("auth") or {}).get("accessToken") or {}).get("role")
    owners = [str(me.get("name")), *(str(one.get("name")) for one in me.get("orgs") or ())]
    if name.split("/")[0] not in owners:
        raise ValueError(
            f"{name} cannot be pushed to: the token is {plain(owners[0])}'s, who may write to "
            f"{', '.join(f'{plain(one)}/...' for one in owners)}."
        )
    if role == "read":
        raise ValueError(
            f"{name} cannot be pushed to: the token may only read. Make one that may write at "
            f"{constants.ENDPOINT}/settings/tokens."
        )


def push(run: Run, uploads: list[Upload], public: bool, say: Callable[[str], None]) -> None:
    """Upload a plan.

    Raises:
        ValueError: without a token that may write, or where a repository holds something else.
        PushFailed: where the hub refuses, or does not answer.
    """
    names = list(dict.fromkeys((one.kind, one.name) for one in uploads))
    for _, name in names:
        require_token(name)
    api, mine = HfApi(), run_id(run)
    name = ""
    try:
        cards = {}
        for kind, name in names:  # before anything is made
            cards[kind, name] = _card_there(api, kind, name, mine)
        for kind, name in names:
            _make(api, kind, name, public, say)
        for one in uploads:
            name = one.name
            say(_commit(api, _with_license(one, cards[one.kind, one.name])))
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise PushFailed(
                f"{name}: the hub refuses ({_said(error)}). The token may not write there: make "
                f"one that may at {constants.ENDPOINT}/settings/tokens, or name a repository of "
                "your own. Nothing that was uploaded is lost."
            ) from None
        raise PushFailed(f"{name}: the hub refuses ({_said(error)}). {_AGAIN}") from None
    except httpx.HTTPError as error:
        raise PushFailed(f"{name}: the upload broke off ({_said(error)}). {_AGAIN}") from None


def _said(error: Exception) -> str:
    text = getattr(error, "server_message", None) or str(error) or type(error).__name__
    return plain(" ".join(str(text).split()), 200)


def _card_there(api: HfApi, kind: str, name: str, mine: str) -> Mapping[str, Any]:
    """The metadata of the card that a repository has; ValueError if it is of something else."""
    try:
        there = api.list_repo_files(name, repo_type=kind)
    except RepositoryNotFoundError:
        return {}
    if not set(there) - {".gitattributes"}:
        return {}
    found: dict[str, Any] = {}
    with suppress(EntryNotFoundError, ValueError):
        path = api.hf_hub_download(name, _CARD, repo_type=kind)
        found = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    if found.get(RUN_KEY) != mine:
        holds = "another SeRA run" if RUN_KEY in found else f"something else ({plain(there[0])})"
        raise ValueError(
            f"{kind} {name} is taken: it holds {holds}. Name another repository, or delete that "
            f"one at {constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{name}/settings."
        )
    return found


def _make(api: HfApi, kind: str, name: str, public: bool, say: Callable[[str], None]) -> None:
    api.create_repo(name, repo_type=kind, private=not public, exist_ok=True)
    if api.repo_info(name, repo_type=kind).private is public:
        say(
            f"{kind} {name} is {'private' if public else 'public'} already and stays so; its "
            "settings on the hub change that"
        )


def _with_license(upload: Upload, there: Mapping[str, Any]) -> Upload:
    """What people have written into the metadata of the card on the hub stays."""
    card = ModelCard(_text(upload.files[_CARD]))
    told = {key: there[key] for key in _KEPT_OF_CARD if there.get(key) is not None}
    if not told:
        return upload
    for key, value in told.items():
        setattr(card.data, key, value)
    return replace(upload, files={**upload.files, _CARD: str(card).encode()})


def _text(content: Path | bytes) -> str:
    return content.decode() if isinstance(content, bytes) else content.read_text(encoding="utf-8")


def _commit(api: HfApi, one: Upload) -> str:
    """Make a revision what it should be, in one commit; says what was done."""
    if one.revision != "main":
        api.create_branch(one.name, branch=one.revision, repo_type=one.kind, exist_ok=True)
    where = {"repo_id": one.name, "repo_type": one.kind, "revision": one.revision}
    there = api.list_repo_files(**where)
    before = api.repo_info(**where).sha
    stale = [path for path in there if _REPLACED.fullmatch(path) and path not in one.files]
    commit = api.create_commit(
        operations=[
            *(CommitOperationAdd(path, content) for path, content in one.files.items()),
            *map(CommitOperationDelete, stale),
        ],
        commit_message=f"SeRA: {one.what}",
        **where,
    )
    done = "is there already" if commit.oid == before else "uploaded"
    return f"{one.kind} {one.name} @ {one.revision}: {one.what} {done}"


def push_run(
    output_dir: Path,
    name: str,
    *,
    pairs: str | None = "",
    public: bool = False,
    dry_run: bool = False,
    say: Callable[[str], None],
) -> None:
    """Say what will go where, then upload it; see `plan_push` and `push` for what they raise.

    Args:
        pairs: the dataset's repository, "" for `name` with `-pairs` behind, None for none.
    """
    if not dry_run:
        require_token(repository(name))
    run = Run(find_run(output_dir))
    uploads, remarks = plan_push(run, name, f"{name}-pairs" if pairs == "" else pairs)
    say(shown_plan(uploads, public))
    for remark in remarks:
        say(remark)
    if not dry_run:
        push(run, uploads, public, say)
        say(f"{constants.ENDPOINT}/{name}")
