"""Known vulnerabilities of the installed packages, less the reviewed ones: `make audit`.

pip-audit asks an advisory database about each package. Behind a package mirror that has packages
and no advisories it ends with success after finding nothing, so the database is first asked about
a release whose vulnerability is long known. Where it does not know that one, nothing is audited
and this says so.
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REVIEWED = Path(__file__).with_name("reviewed-vulnerabilities.txt")
#: Every advisory database has this one (PYSEC-2014-8).
KNOWN = "jinja2==2.4.1"


def read_reviewed(text: str) -> dict[str, str]:
    """Reason by ID, from lines `ID reason`; `#` begins a comment.

    Raises:
        ValueError: for an ID without a reason.
    """
    found = {}
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            name, _, reason = line.strip().partition(" ")
            if not reason.strip():
                raise ValueError(f"{name} is listed as reviewed without a reason")
            found[name] = reason.strip()
    return found


def ask(*arguments: str) -> list[dict[str, Any]] | None:
    """pip-audit's answer per package, or None if it has none."""
    command = [sys.executable, "-m", "pip_audit", "--format", "json", "--timeout", "10"]
    done = subprocess.run(
        [*command, "--progress-spinner", "off", *arguments], capture_output=True, text=True
    )
    try:
        dependencies: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except ValueError:
        return None
    return dependencies


def knows_advisories() -> bool:
    """Whether a database with advisories answers."""
    with tempfile.TemporaryDirectory() as directory:
        requirements = Path(directory) / "requirements.txt"
        requirements.write_text(KNOWN + "\n", encoding="utf-8")
        answer = ask("--requirement", str(requirements), "--no-deps", "--disable-pip")
    return bool(answer) and any(package.get("vulns") for package in answer or [])


def findings(
    packages: list[dict[str, Any]], reviewed: dict[str, str]
) -> tuple[list[str], list[str]]:
    """What is vulnerable and not reviewed, and what is reviewed and not there any more."""
    found, seen = [], set()
    for package in packages:
        for vulnerability in package.get("vulns", []):
            names = {vulnerability["id"], *vulnerability["aliases"]}
            seen |= names
            if not names & reviewed.keys():
                fixed = ", ".join(vulnerability["fix_versions"]) or "no release yet"
                found.append(
                    f"{package['name']} {package['version']}: {vulnerability['id']} (fixed in "
                    f"{fixed})"
                )
    return found, sorted(reviewed.keys() - seen)


def main() -> int:
    if importlib.util.find_spec("pip_audit") is None:
        print("pip-audit is not installed: install the extra `test`")
        return 1
    reviewed = read_reviewed(REVIEWED.read_text(encoding="utf-8"))
    packages = ask("--skip-editable") if knows_advisories() else None
    if packages is None:
        print("pip-audit could not reach the advisory database: not audited")
        return 0
    unknown = [package["name"] for package in packages if "skip_reason" in package]
    found, gone = findings(packages, reviewed)
    print(f"{len(packages) - len(unknown)} packages audited, {len(found)} findings")
    if unknown:
        print(f"not in the database: {', '.join(unknown)}")
    for line in found:
        print(line)
    for name in gone:
        print(f"{name} is listed as reviewed and found no more: remove its line")
    return 1 if found or gone else 0


if __name__ == "__main__":
    sys.exit(main())
