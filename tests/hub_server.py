"""A server that speaks the Hugging Face hub's protocol as far as its client uses it here.

Repositories with branches and commits, LFS objects stored once; private ones are
hidden from whoever has no token.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from threading import Lock
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.servers import Handler, serving

TOKEN = "hf_aPlantedTokenOfTheTests1"
_LFS = re.compile(r".*\.(safetensors|parquet)")
_REPO = r"(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)"
_FILE = r"/(?P<kind>datasets/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)"


def _oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repository:
    """A repository: the files of each commit, and where each branch is."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        told = repr([len(self.commits), branch, sorted(files)])
        sha = hashlib.sha1(told.encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha

    def files(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        sha = self.branches.get(revision, revision)
        return (sha, self.commits[sha]) if sha in self.commits else None


class Hub(ThreadingHTTPServer):
    """`repositories` by kind and name; `steps` is what was asked, and `uploaded` what was stored.

    `user` and `role` are the token's. `breaks_after` uploads the server answers with an error, and
    `forbidden` requests, by a pattern of their path, with 403. `page` is the answer to everything
    that is read, as of a network that wants a login.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _HubHandler)
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.steps: list[str] = []
        self.uploaded: list[str] = []
        self.user, self.role = "user", "write"
        self.breaks_after: int | None = None
        self.forbidden: str | None = None
        self.page: bytes | None = None
        self.lock = Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self, kind: str, name: str, revision: str = "main") -> dict[str, bytes]:
        found = self.repositories[kind, name].files(revision)
        assert found is not None
        return found[1]

    def commits(self) -> int:
        return sum(len(one.commits) for one in self.repositories.values())


class _HubHandler(Handler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        its, path = self.server, self._begin()
        if its.page is not None:
            return self.answer(200, its.page)
        if path == "/api/whoami-v2":
            if self._token() != TOKEN:
                return self.answer(401, {"error": "Invalid credentials"})
            access = {"accessToken": {"role": its.role}}
            orgs = [{"name": "an-org"}]
            return self.answer(200, {"name": its.user, "orgs": orgs, "auth": access})
        if found := re.fullmatch(_FILE, path):
            return self._file(found)
        if found := re.fullmatch(rf"/api/{_REPO}(/revision/(?P<revision>[^/]+))?", path):
            at = self._at(found)
            if at:
                repo, sha, files = at
                siblings = [{"rfilename": name} for name in files]
                told = {"id": found["name"], "private": repo.private, "sha": sha}
                self.answer(200, told | {"siblings": siblings, "tags": [], "downloads": 0})
            return None
        if found := re.fullmatch(rf"/api/{_REPO}/refs", path):
            if repo := self._repo(found):
                heads = repo.branches.items()
                told = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": s} for n, s in heads]
                self.answer(200, {"branches": told, "converts": [], "tags": []})
            return None
        if found := re.fullmatch(rf"/api/{_REPO}/tree/(?P<revision>[^/]+)(/(?P<path>.*))?", path):
            if at := self._at(found):
                under = f"{found['path']}/" if found["path"] else ""
                names = [name for name in at[2] if name.startswith(under)]
                below = {name for name in names if "/" in name.removeprefix(under)}
                if "recursive=true" not in self.path.lower():
                    names = [name for name in names if name not in below]
                entries = [self._entry(name, at[2][name]) for name in names]
                for directory in {under + name.removeprefix(under).split("/")[0] for name in below}:
                    entries.append({"type": "directory", "path": directory, "oid": _oid(b"")})
                self.answer(200, entries)
            return None
        return self.answer(404, {"error": f"no such address: {path}"})

    def do_POST(self) -> None:
        its, path = self.server, self._begin()
        raw = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if its.forbidden and re.search(its.forbidden, path):
            return self.answer(403, {"error": "You don't have the rights"})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if self._token() != TOKEN:
            return self.answer(401, {"error": "Invalid credentials"})
        if found := re.fullmatch(rf"/api/{_REPO}/commit/(?P<revision>[^/]+)", path):
            return self._commit(found, [json.loads(line) for line in raw.splitlines()])
        if found := re.fullmatch(rf"/api/{_REPO}/paths-info/(?P<revision>[^/]+)", path):
            if at := self._at(found):
                asked = re.findall(r"paths=([^&]+)", raw.decode()) or json.loads(raw)["paths"]
                names = [unquote(n) for n in ([asked] if isinstance(asked, str) else asked)]
                self.answer(200, [self._entry(n, at[2][n]) for n in names if n in at[2]])
            return None
        body = json.loads(raw or b"{}")
        if path == "/api/repos/create":
            return self._create(body)
        if found := re.fullmatch(rf"/api/{_REPO}/branch/(?P<branch>[^/]+)", path):
            repo = self._repo(found)
            if repo and found["branch"] in repo.branches:
                return self.answer(409, {"error": "Reference already exists"})
            if repo:
                repo.branches[found["branch"]] = repo.branches["main"]
                return self.answer(200, {})
            return None
        if found := re.fullmatch(rf"/api/{_REPO}/preupload/(?P<revision>[^/]+)", path):
            if at := self._at(found):
                files = []
                for one in body["files"]:
                    name, there = one["path"], at[2].get(one["path"])
                    large = bool(_LFS.fullmatch(name))
                    digest = (
                        hashlib.sha256(there or b"").hexdigest() if large else _oid(there or b"")
                    )
                    oid = {} if there is None else {"oid": digest}
                    mode = "lfs" if large else "regular"
                    files.append({"path": name, "uploadMode": mode, "shouldIgnore": False, **oid})
                self.answer(200, {"files": files})
            return None
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = []
            for one in body["objects"]:
                upload = {"upload": {"href": f"{its.url}/lfs/{one['oid']}"}}
                new = {} if one["oid"] in its.objects else {"actions": upload}
                objects.append({**one, **new})
            return self.answer(200, {"transfer": "basic", "objects": objects})
        return self.answer(404, {"error": f"no such address: {path}"})

    def do_PUT(self) -> None:
        its, path = self.server, self._begin()
        if its.breaks_after is not None and len(its.uploaded) >= its.breaks_after:
            self.rfile.read(int(self.headers["Content-Length"] or 0))
            return self.answer(400, {"error": "the connection broke"})
        data, oid = self.rfile.read(int(self.headers["Content-Length"] or 0)), path.split("/")[-1]
        assert hashlib.sha256(data).hexdigest() == oid
        its.objects[oid] = data
        its.uploaded.append(oid)
        return self.answer(200, {})

    def _begin(self) -> str:
        path = unquote(urlsplit(self.path).path)
        with self.server.lock:
            self.server.steps.append(f"{self.command} {path}")
        return path

    def _token(self) -> str | None:
        return (self.headers["Authorization"] or "").removeprefix("Bearer ") or None

    def _repo(self, found: Any) -> Repository | None:
        kind = "dataset" if (found["kind"] or "").startswith("dataset") else "model"
        repo = self.server.repositories.get((kind, found["name"]))
        if repo is None or (repo.private and self._token() != TOKEN):
            headers = {"X-Error-Code": "RepoNotFound"}
            self.answer(404, {"error": "Repository not found"}, **headers)
            return None
        return repo

    def _at(self, found: Any) -> tuple[Repository, str, dict[str, bytes]] | None:
        if (repo := self._repo(found)) is None:
            return None
        at = repo.files(found["revision"] or "main")
        if at is None:
            self.answer(404, {"error": "Invalid rev"}, **{"X-Error-Code": "RevisionNotFound"})
            return None
        return repo, *at

    @staticmethod
    def _entry(name: str, data: bytes) -> dict[str, Any]:
        large = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        lfs = {"lfs": large} if _LFS.fullmatch(name) else {}
        return {"type": "file", "path": name, "size": len(data), "oid": _oid(data), **lfs}

    def _file(self, found: Any) -> None:
        if at := self._at(found):
            _, sha, files = at
            if found["path"] not in files:
                self.answer(404, {"error": "no"}, **{"X-Error-Code": "EntryNotFound"})
                return
            data = files[found["path"]]
            etag = self._entry(found["path"], data)
            headers = {"X-Repo-Commit": sha, "ETag": f'"{etag.get("lfs", etag)["oid"]}"'}
            self.answer(200, data, **headers)

    def answer(self, status: int, content: Any, **headers: str) -> None:
        if self.command != "HEAD":
            super().answer(status, content, **headers)
            return
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def _create(self, body: dict[str, Any]) -> None:
        its, kind = self.server, body.get("type") or "model"
        name = f"{body.get('organization') or its.user}/{body['name']}"
        url = f"{its.url}/{'datasets/' if kind == 'dataset' else ''}{name}"
        if (kind, name) in its.repositories:
            self.answer(409, {"error": "You already created this repo", "url": url})
            return
        repo = Repository(body.get("visibility") == "private" or body.get("private") is True)
        repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        its.repositories[kind, name] = repo
        self.answer(200, {"url": url, "name": name, "id": name})

    def _commit(self, found: Any, lines: list[dict[str, Any]]) -> None:
        if (at := self._at(found)) is None:
            return
        repo, _, files = at
        files = dict(files)
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.server.objects[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        sha = repo.commit(found["revision"], files)
        url = f"{self.server.url}/{found['name']}/commit/{sha}"
        self.answer(200, {"commitUrl": url, "commitOid": sha, "pullRequestUrl": None})


@contextmanager
def running_hub() -> Iterator[Hub]:
    with serving(server := Hub()):
        yield server
