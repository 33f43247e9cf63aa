"""`make audit`: findings fail and silence does not; and the reviewed exceptions."""

import importlib
import re
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def audit(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / ".ci")
    return importlib.import_module("audit")


FIXED = {"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["1.1", "2.0"]}
OPEN = {"id": "PYSEC-2", "aliases": [], "fix_versions": []}
PACKAGES = [
    {"name": "one", "version": "1.0", "vulns": [FIXED, OPEN]},
    {"name": "two", "skip_reason": "not there"},
]


def test_what_is_reviewed_needs_a_reason_and_is_no_finding_and_what_is_gone_is_said(audit):
    found = ["one 1.0: PYSEC-1 (fixed in 1.1, 2.0)", "one 1.0: PYSEC-2 (fixed in no release yet)"]
    assert audit.findings(PACKAGES, {}) == (found, [])
    reviewed = audit.read_reviewed("# a comment\n\nCVE-1  not used\nPYSEC-2 no\nPYSEC-9 fixed\n")
    assert reviewed == {"CVE-1": "not used", "PYSEC-2": "no", "PYSEC-9": "fixed"}
    assert audit.findings(PACKAGES, reviewed) == ([], ["PYSEC-9"])
    with pytest.raises(ValueError, match="PYSEC-1 is listed as reviewed without a reason"):
        audit.read_reviewed("PYSEC-1\n")
    audit.read_reviewed(audit.REVIEWED.read_text())


@pytest.mark.parametrize(
    ("known", "installed", "code", "said"),
    [
        ([{"vulns": [{}]}], PACKAGES, 1, "one 1.0: PYSEC-1 (fixed in 1.1, 2.0)"),
        ([{"vulns": [{}]}], PACKAGES[1:], 0, "0 packages audited, 0 findings"),
        # A database that answers and knows nothing, or that does not answer.
        ([{"vulns": []}], [], 0, "pip-audit could not reach the advisory database: not audited"),
        (None, None, 0, "pip-audit could not reach the advisory database: not audited"),
    ],
)
def test_findings_fail_and_silence_does_not(
    audit, monkeypatch, capsys, known, installed, code, said
):
    answers = {True: known, False: installed}
    monkeypatch.setattr(audit, "ask", lambda *given: answers["--requirement" in given])
    monkeypatch.setattr(audit.importlib.util, "find_spec", lambda name: True)
    assert audit.main() == code
    assert said in capsys.readouterr().out.splitlines()


def test_the_page_lists_every_exception_of_ruff():
    page = (ROOT / "docs/security.md").read_text()
    rows = dict(re.findall(r"^\| (S\d+) [^|]*\| ([^|]+) \|", page, re.M))
    lint = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]
    expected = {rule: {"everywhere"} for rule in lint["ignore"] if rule.startswith("S")}
    for path, rules in lint["per-file-ignores"].items():
        for rule in rules if path.startswith("sera_plugin/") else ():
            expected.setdefault(rule, set()).add(path.removeprefix("sera_plugin/"))
    shown = {rule: set(where.replace("`", "").split(", ")) for rule, where in rows.items()}
    assert shown == expected
    for path in (ROOT / "sera_plugin").rglob("*.py"):
        assert not re.search(r"noqa: *S\d|nosec", path.read_text()), path
