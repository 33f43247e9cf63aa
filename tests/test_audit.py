"""`make audit` against an advisory database of our own: real findings fail, silence does not."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / ".ci/audit.py"
installed = pytest.mark.skipif(
    importlib.util.find_spec("pip_audit") is None, reason="needs pip-audit"
)


@pytest.fixture
def audit() -> ModuleType:
    specification = importlib.util.spec_from_file_location("audit", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@contextmanager
def database(*vulnerable: str) -> Iterator[str]:
    """The URL of an OSV service that knows one vulnerability of each of these packages."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            name = request["package"]["name"]
            package = {"name": name, "ecosystem": "PyPI"}
            ranges = [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "99"}]}]
            known = {
                "id": f"PLANTED-{name}",
                "summary": "planted",
                "aliases": [f"CVE-{name}"],
                "affected": [{"package": package, "ranges": ranges}],
            }
            content = json.dumps({"vulns": [known]} if name in vulnerable else {}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def run(url: str, cache: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "PIP_AUDIT_VULNERABILITY_SERVICE": "osv",
        "PIP_AUDIT_OSV_URL": url,
        "XDG_CACHE_HOME": str(cache),
    }
    return subprocess.run(
        [sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True, timeout=300
    )


@installed
def test_a_finding_fails(tmp_path):
    with database("jinja2", "pytest") as url:
        done = run(url, tmp_path)
    assert done.returncode == 1, done.stderr
    assert re.search(r"^pytest [\d.]+: CVE-pytest \(fixed in 99\)$", done.stdout, re.M)
    assert re.search(r"^\d+ packages audited, \d findings$", done.stdout, re.M)


@installed
def test_a_database_that_answers_and_knows_nothing_is_no_database(tmp_path):
    with database() as url:
        done = run(url, tmp_path)
    assert done.returncode == 0
    assert done.stdout == "pip-audit could not reach the advisory database: not audited\n"


@installed
def test_a_database_that_is_not_there_is_said_and_fails_nothing(tmp_path):
    with database() as url:
        pass
    done = run(url, tmp_path)
    assert done.returncode == 0
    assert done.stdout == "pip-audit could not reach the advisory database: not audited\n"


PACKAGES = [
    {
        "name": "one",
        "version": "1.0",
        "vulns": [
            {"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["1.1", "2.0"]},
            {"id": "PYSEC-2", "aliases": [], "fix_versions": []},
        ],
    },
    {"name": "two", "skip_reason": "not there"},
]


def test_what_is_reviewed_is_no_finding_and_what_is_gone_is_said(audit):
    found, gone = audit.findings(PACKAGES, {})
    assert found == ["one 1.0: PYSEC-1 (fixed in 1.1, 2.0)", "one 1.0: PYSEC-2 (fixed in no "
                     "release yet)"]  # fmt: skip
    assert gone == []
    reviewed = {"CVE-1": "not used", "PYSEC-2": "not used", "PYSEC-9": "fixed since"}
    assert audit.findings(PACKAGES, reviewed) == ([], ["PYSEC-9"])


def test_a_reviewed_line_has_a_reason(audit):
    assert audit.read_reviewed("# a comment\n\nPYSEC-1  only its server part\n") == {
        "PYSEC-1": "only its server part"
    }
    with pytest.raises(ValueError, match="PYSEC-1 is listed as reviewed without a reason"):
        audit.read_reviewed("PYSEC-1\n")
    audit.read_reviewed(audit.REVIEWED.read_text())


def test_the_page_lists_every_exception_of_bandit():
    page = (ROOT / "docs/security.md").read_text()
    rows = dict(re.findall(r"^\| (B\d+) [^|]*\| ([^|]+) \|", page, re.M))
    spots: dict[str, set[str]] = {}
    for path in sorted((ROOT / "sera_plugin").rglob("*.py")):
        for number, line in enumerate(lines := path.read_text().splitlines()):
            if "nosec" in line:
                (rule,) = re.findall(r"# nosec (B\d+)$", line)
                spots.setdefault(rule, set()).add(path.relative_to(ROOT / "sera_plugin").as_posix())
                near = lines[max(0, number - 8) : number]
                assert any(one.strip().startswith("#") for one in near), (path, line)
    skipped = re.findall(r'^    "(B\d+)",  # \w+', (ROOT / "pyproject.toml").read_text(), re.M)
    assert rows.keys() == spots.keys() | set(skipped)
    for rule, paths in spots.items():
        assert set(re.findall(r"`([^`]+)`", rows[rule])) == paths
    assert all(rows[rule] == "everywhere" for rule in skipped)


@pytest.mark.skipif(importlib.util.find_spec("bandit") is None, reason="needs bandit")
def test_bandit_finds_what_is_planted(tmp_path):
    (tmp_path / "planted.py").write_text("import subprocess\nsubprocess.run('ls', shell=True)\n")
    command = [sys.executable, "-m", "bandit", "-q", "-r", "-c", str(ROOT / "pyproject.toml")]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "B602" in done.stdout
