"""A run on the Hugging Face hub: its policies as revisions of a model, its pairs as a dataset.

A commit is made of what the hub does not have yet, so the same command again adds nothing, and one
that was broken off goes on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import yaml
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    constants,
    get_token,
    set_client_factory,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import _http

from sera_plugin.config.block import repository
from sera_plugin.config.quoting import plain
from sera_plugin.tools.report.reading import Run, find_run
from sera_plugin.tools.sharing.card import RUN_KEY
from sera_plugin.tools.sharing.names import run_id
from sera_plugin.tools.sharing.plan import CARD, WEIGHTS, Upload, plan_push, shown_plan

#: Of ours on the hub, what goes where this push does not have it: weights in other parts, and
#: iterations that were trained anew.
_REPLACED = re.compile(rf"{WEIGHTS}|adapter_config\.json|data/iteration-\d+\.parquet")
_KEPT_OF_CARD = ("license", "license_name", "license_link", "language", "extra_gated_prompt")
#: Seconds without which the hub's client waits for ever; an answer to a large commit takes a while.
_TIMEOUT = httpx.Timeout(60, read=300)
_AGAIN = "Start the same command again: it goes on with what is missing."


class PushFailed(OSError):
    """The hub did not take it; the message says why and what to do."""


@contextmanager
def _in_time() -> Iterator[None]:
    """No request to the hub waits for ever."""
    earlier = _http._GLOBAL_CLIENT_FACTORY  # which has no public name

    def make() -> httpx.Client:
        client = earlier()
        client.timeout = _TIMEOUT
        return client

    set_client_factory(make)
    try:
        yield
    finally:
        set_client_factory(earlier)


@_in_time()
def require_token(name: str, api: HfApi | None = None) -> None:
    """Whether the hub takes anything for the repository `user/name`; `api` is asked once.

    Raises:
        ValueError: without a connection, without a token, or with one that may not write there.
        PushFailed: where the hub does not answer.
    """
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
        me = (api or HfApi()).whoami(cache=True)
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise ValueError(
                f"{name} cannot be pushed to: {constants.ENDPOINT} does not know the token (that "
                "of HF_TOKEN, else of `hf auth login`). Make a new one."
            ) from None
        raise PushFailed(f"{constants.ENDPOINT} does not answer: {_said(error)}") from None
    except httpx.HTTPError as error:
        raise PushFailed(f"{constants.ENDPOINT} cannot be reached: {_said(error)}") from None
    except ValueError:  # the page of a network that wants a login first
        raise PushFailed(f"{constants.ENDPOINT} answers with no JSON") from None
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


@_in_time()
def push(
    api: HfApi, run: Run, uploads: list[Upload], public: bool, say: Callable[[str], None]
) -> None:
    """Upload a plan.

    Raises:
        ValueError: without a token that may write, or where a repository holds something else.
        PushFailed: where the hub refuses, or does not answer.
    """
    names = list(dict.fromkeys((one.kind, one.name) for one in uploads))
    for _, name in names:
        require_token(name, api)
    mine, name = run_id(run), ""
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
    # The client's own for an upload that failed is the second.
    except (httpx.HTTPError, RuntimeError, LocalEntryNotFoundError) as error:
        said = _said(error.__cause__ or error)
        raise PushFailed(f"{name}: the upload broke off ({said}). {_AGAIN}") from None


def _said(error: BaseException) -> str:
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
    with suppress(RemoteEntryNotFoundError, ValueError, yaml.YAMLError):
        path = api.hf_hub_download(name, CARD, repo_type=kind)
        found = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    if found.get(RUN_KEY) != mine:
        holds = "another SeRA run" if RUN_KEY in found else f"something else ({plain(there[0])})"
        raise ValueError(
            f"{kind} {name} is taken: it holds {holds}. Name another repository, or delete that "
            f"one in its settings at {constants.ENDPOINT}."
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
    card = ModelCard(bytes(upload.files[CARD]).decode())
    told = {key: there[key] for key in _KEPT_OF_CARD if there.get(key) is not None}
    if not told:
        return upload
    for key, value in told.items():
        setattr(card.data, key, value)
    return replace(upload, files={**upload.files, CARD: str(card).encode()})


def _commit(api: HfApi, one: Upload) -> str:
    """Make a revision what it should be, in one commit; says what was done."""
    if one.revision != "main":
        api.create_branch(one.name, branch=one.revision, repo_type=one.kind, exist_ok=True)
    where: dict[str, Any] = {"repo_type": one.kind, "revision": one.revision}
    there = api.list_repo_files(one.name, **where)
    before = api.repo_info(one.name, **where).sha
    stale = [path for path in there if _REPLACED.fullmatch(path) and path not in one.files]
    commit = api.create_commit(
        one.name,
        [
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
    api = HfApi()
    if not dry_run:
        require_token(repository(name), api)
    run = Run(find_run(output_dir))
    uploads, remarks = plan_push(run, name, f"{name}-pairs" if pairs == "" else pairs)
    say(shown_plan(uploads, public))
    for remark in remarks:
        say(remark)
    if not dry_run:
        push(api, run, uploads, public, say)
        say(f"{constants.ENDPOINT}/{name}")
