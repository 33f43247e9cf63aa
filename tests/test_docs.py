"""The docs are in step with the code."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from sera_plugin import __version__
from sera_plugin.args import SeraConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_configuration_reference_is_generated_from_the_schema():
    generated = runpy.run_path(str(ROOT / "docs/generate.py"))["render"]()
    assert (ROOT / "docs/configuration.md").read_text() == generated, "run `make docs`"
    assert all(f"| `{name}` |" in generated for name in SeraConfig.model_fields)


def test_readme_lists_every_key_with_its_default():
    readme = (ROOT / "README.md").read_text()
    default = runpy.run_path(str(ROOT / "docs/generate.py"))["default"]
    for name, field in SeraConfig.model_fields.items():
        assert f"| `{name}` | `{default(field)}` |" in readme


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_every_module_is_in_the_architecture():
    text = (ROOT / "docs/architecture.md").read_text()
    for module in (ROOT / "sera_plugin").rglob("*.py"):
        name = module.relative_to(ROOT / "sera_plugin").as_posix()
        assert f"`{name}`" in text, name


def test_changelog_has_this_version():
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()
