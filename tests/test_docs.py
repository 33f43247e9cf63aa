"""The docs are in step with the code."""

import ast
import re
import runpy
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from sera_plugin import __version__
from sera_plugin.config.block import JudgeConfig
from sera_plugin.config.sera import SeraConfig
from sera_plugin.tools import agent_docs
from tests.doc_pages import PAGES, ROOT, blocks, file_name, inline_code, tokens

DOCS = ROOT / "docs"
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def test_what_is_generated_is_the_codes():
    generate = runpy.run_path(str(DOCS / "generate.py"))
    generated = generate["render"]()
    assert (DOCS / "configuration.md").read_text() == generated, "run `make docs`"
    assert (DOCS / "agents.md").read_text() == agent_docs.text(), "run `make docs`"
    assert all(f"| `{name}` |" in generated for name in SeraConfig.model_fields)
    tables = {"llama-factory": generate["convert_tables"](), "drift": [generate["drift_table"]()]}
    for name, filled in tables.items():
        page = (DOCS / f"{name}.md").read_text()
        assert generate["fill"](page, filled) == page, "run `make docs`"


@cache
def anchors(page: Path) -> set[str]:
    """What the site and plain git hosts call the headings of a page."""
    pairs = pairwise(tokens(page))
    titles = [after.content for token, after in pairs if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@every_page
def test_links_lead_somewhere_and_no_text_is_taken_for_html(page):
    """`list<int32>` outside of code would lose its brackets and what is in them."""
    for token in tokens(page):
        link = str(token.attrs["href"]) if token.type == "link_open" else "://"
        if "://" not in link:
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link
        if token.type in ("html_inline", "html_block"):
            assert token.content.startswith("<!--"), token.content


@every_page
def test_yaml_blocks_are_what_the_host_and_the_plugin_read(page, tmp_path, monkeypatch):
    from axolotl.integrations.lm_eval import LMEvalArgs
    from axolotl.utils.schemas.config import AxolotlInputConfig

    monkeypatch.setenv("HOME", str(tmp_path))
    python = tmp_path / "vllm/bin/python"
    python.parent.mkdir(parents=True)
    python.touch(mode=0o755)
    shown = [code for code in inline_code(page) if code.startswith("sera: {") and "..." not in code]
    for block in blocks(page, "yaml"):
        content = yaml.safe_load(block.text)
        model = JudgeConfig if file_name(block) == "judge.yaml" else AxolotlInputConfig
        assert content.keys() <= {*model.model_fields, *LMEvalArgs.model_fields, "sera"}, (
            block.place
        )
        shown += [block.text] if "sera" in content else []
    for text in shown:
        SeraConfig.model_validate(yaml.safe_load(text)["sera"])


def test_every_page_of_the_site_is_built_and_loads_nothing_from_a_network(site):
    """A link that leads nowhere is a warning there, and an error."""
    pages = {path.stem: path.read_text(encoding="utf-8") for path in site.glob("*.html")}
    assert pages.keys() - {"search"} == {page.stem for page in DOCS.glob("*.md")}
    for name, text in pages.items():
        loaded = re.findall(r'<(?:link|script|img|iframe)\b[^>]*?\s(?:href|src)="([^"]*)"', text)
        assert loaded
        assert not [link for link in loaded if "//" in link], name


def test_what_the_architecture_names_exists():
    """Files by their path in the package, functions and classes as `room/file.py:name`."""
    package = ROOT / "sera_plugin"
    named = [re.fullmatch(r"([\w/]+\.py)(?::([\w.]+))?", code)
             for code in inline_code(DOCS / "architecture.md")]  # fmt: skip
    for file, name in (match.groups() for match in named if match):
        path = ROOT / file if file.startswith("tests/") else package / file
        assert path.exists(), file
        for part in (name or "").split("."):
            assert re.search(rf"\b{part}\b", path.read_text()), f"{file}:{name}"


def test_the_readme_is_short_and_the_changelog_has_this_version():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_messages_are_those_of_the_code():
    from axolotl.utils.schemas.enums import RLType

    *first, last = (repr(one.value) for one in RLType)
    said = {f"Input should be {', '.join(first)} or {last}"}
    for path in (ROOT / "sera_plugin").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.add(node.value)
    bold = re.findall(r"\*\*`(.+?)`\*\*", (DOCS / "troubleshooting.md").read_text(), re.DOTALL)
    assert bold
    for message in bold:
        for piece in filter(str.strip, message.replace("\n", " ").split("...")):
            assert any(piece.strip() in one for one in said), message


def test_the_keys_of_other_trainers_are_theirs_and_ours():
    from axolotl.utils.schemas.config import AxolotlInputConfig
    from axolotl.utils.schemas.datasets import SFTDataset
    from trl import DPOConfig, ModelConfig, ScriptArguments

    trl = {key for one in (DPOConfig, ModelConfig, ScriptArguments)
           for key in one.__dataclass_fields__}  # fmt: skip
    # alignment-handbook's own, and what older versions of it and of transformers have.
    trl |= {"dataset_mixture", "dataset_mixer", "dataset_splits", "split", "test_split_size"}
    trl |= {"preprocessing_num_workers", "chat_template", "warmup_ratio"}
    ours = {*AxolotlInputConfig.model_fields, *(f"sera.{key}" for key in SeraConfig.model_fields)}
    ours |= {f"datasets[].{key}" for key in SFTDataset.model_fields}
    text = (DOCS / "coming-from.md").read_text()
    tables = re.findall(r"^\| here .*\n((?:\|.*\n)+)", text, re.M)
    rows = [line.strip("| ").split(" | ") for table in tables for line in table.splitlines()[1:]]
    assert len(rows) > 30
    for here, there, *_ in rows:
        for cell, known in ((here, ours), (here if there == "the same" else there, trl)):
            for key in re.findall(r"`([\w.\[\]]+)(?:: [^`]+)?`", cell):
                assert key in known, f"{key} in | {here} | {there} |"
