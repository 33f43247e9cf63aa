"""Write docs/configuration.md, docs/agents.md and tables of two pages: `make docs`."""

import types
import typing
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from sera_plugin.config.block import JudgeConfig
from sera_plugin.config.host_keys import HOST_KEYS
from sera_plugin.config.labelers import FunctionConfig
from sera_plugin.config.sera import LabelerName, SeraConfig
from sera_plugin.host.keys import ENTRY_UNUSED, REFUSALS, UNUSED
from sera_plugin.tools import agent_docs
from sera_plugin.tools.convert.convert import RULES
from sera_plugin.tools.convert.settings import LEFT_OUT, TEMPLATES
from sera_plugin.tools.report.page import published_runs

PAGE = Path(__file__).parent / "configuration.md"


def kind(field: FieldInfo) -> str:
    """The type as a YAML author thinks of it."""
    return " \\| ".join(_kinds(field.annotation))


def _kinds(annotation: Any) -> list[str]:
    if typing.get_origin(annotation) is typing.Literal:
        return [f"`{value}`" for value in typing.get_args(annotation)]
    names: dict[Any, str] = {
        float: "number",
        int: "whole number",
        bool: "true or false",
        str | None: "path or name",
        JudgeConfig | None: "block of keys",
        FunctionConfig | None: "file.py:function, or a block of keys",
        tuple[dict[str, Any], ...]: "list of datasets",
        tuple[LabelerName, ...]: "list of `implicit` and then others that score",
    }
    if annotation in names:
        return [names[annotation]]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        given = [one for one in typing.get_args(annotation) if one is not types.NoneType]
        return [kind for one in given for kind in _kinds(one)]
    return ["list of names"]


def limits(field: FieldInfo) -> str:
    """Bounds in words."""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    found = [
        f"{sign} {getattr(bound, name):,.12g}"
        for bound in field.metadata
        for name, sign in signs.items()
        if hasattr(bound, name)
    ]
    return ", ".join(found)


def default(field: FieldInfo) -> str:
    value = field.default
    if isinstance(value, bool):
        return str(value).lower()
    return {(): "[]", None: "unset"}.get(value, str(value))


def render() -> str:
    """The whole page."""
    lines = [
        "# Configuration",
        "",
        "<!-- Written by docs/generate.py from sera_plugin/config; `make docs` rewrites it. -->",
        "",
        "## Inside `sera:`",
        "",
        "Unknown keys are errors. Every key has a default; `rl: sera` alone runs SeRA.",
        "",
        "| key | default | allowed | meaning |",
        "|---|---|---|---|",
    ]
    for name, field in SeraConfig.model_fields.items():
        allowed = ", ".join(filter(None, (kind(field), limits(field))))
        meaning = " ".join(str(field.description).split())
        lines.append(f"| `{name}` | `{default(field)}` | {allowed} | {meaning} |")
    lines += [
        "",
        "`bootstrap_ratio` needs `ceil(bootstrap_ratio)` disjoint pairs a prompt (fewer where",
        "`prompts` brings others), and `candidates` give `candidates // 2`: asking for more is an",
        "error that says which number to raise. What",
        "`selection`, `labeler`, `reference` and length control make of a run is in systems.md.",
        "",
        "## Host keys that SeRA reads",
        "",
        "| key | what SeRA does with it |",
        "|---|---|",
    ]
    for keys, meaning in HOST_KEYS.items():
        lines.append(f"| {', '.join(f'`{key}`' for key in keys.split(', '))} | {meaning} |")
    lines += [
        "",
        "## Refused, with the remedy, before any model is loaded",
        "",
        "A setting that cannot mean what it says:",
        "",
        "| key | why, and what to do |",
        "|---|---|",
    ]
    for refusal in REFUSALS:
        names = ", ".join(f"`{key}`" for key in refusal.keys.split(", "))
        names += f" ({refusal.values})" if refusal.values else ""
        lines.append(f"| {names} | {refusal.remedy.format(key='it')}. |")
    lines += [
        "",
        "Also a `num_epochs` that is not whole, losses, label smoothing and numbers that do not go",
        "together, misspelt `sera` keys inside or beside the block, a `sera:` block or the plugin",
        "line with another `rl`, a `dpo_loss_type` that TRL does not have, and `datasets` or",
        "`test_datasets` that are not a list of blocks with a `path`, or ask for what the host",
        "does in supervised fine-tuning only (`shards`, `drop_system_message`, ...).",
        "",
        "## Without effect, with a warning",
        "",
        "What the host reads for other kinds of training alone, or nowhere. A warning of `train`,",
        "`preprocess` and `axolotl sera plan` names each that is on and not at its default.",
        "",
        "| key | why |",
        "|---|---|",
    ]
    of_entries = {", ".join(_of_entry(keys)): why for keys, why in ENTRY_UNUSED.items()}
    for keys, why in (UNUSED | of_entries).items():
        lines.append(f"| {', '.join(f'`{key}`' for key in keys.split(', '))} | {why}. |")
    lines += [
        "",
        "A key that neither the host nor a plugin under `plugins:` has is named as well, with the",
        "one that it resembles: the host would drop it without a word.",
        "",
    ]
    return "\n".join(lines)


def _of_entry(keys: str) -> list[str]:
    return [f"datasets[].{key}" for key in keys.split(", ")]


def convert_tables() -> list[str]:
    """The tables of docs/llama-factory.md: keys, keys that become nothing, templates."""
    keys = ["| LLaMA-Factory | Axolotl | |", "|---|---|---|"]
    same = []
    for rule in filter(None, RULES):
        names = ", ".join(f"`{name}`" for name in rule.names)
        if names == rule.to and not rule.about:
            same.append(names)
        else:
            keys.append(f"| {names} | {rule.to} | {rule.about} |")
    keys.append(f"| {', '.join(same)} | the same | |")
    lost = ["| left out | why |", "|---|---|"]
    for names, why in LEFT_OUT.items():
        lost.append(f"| {', '.join(f'`{name}`' for name in names.split())} | {why} |")
    templates = ["| `template` | `chat_template` | |", "|---|---|---|"]
    templates += [f"| `{one}` | `{host}` | {note} |" for one, (host, note) in TEMPLATES.items()]
    return ["\n".join(table) for table in (keys, lost, templates)]


def drift_table() -> str:
    """The table of docs/drift.md, of the figures that reports draw."""
    runs = published_runs()
    names = [name.replace("_", " ") for name in runs[0] if name != "source"]
    lines = [f"| {' | '.join(names)} |", "|---|---" + "|---:" * 3 + "|---" * 4 + "|"]
    for one in runs:
        run, *cells, source = one.values()
        lines.append(f"| [{run}]({source}) | {' | '.join(cells)} |")
    return "\n".join(lines)


def fill(page: str, tables: list[str]) -> str:
    """A page with tables put in place of those that begin with the same line."""
    for table in tables:
        head = table.partition("\n")[0]
        start = page.index(head)
        end = page.find("\n\n", start)
        page = page[:start] + table + (page[end:] if end >= 0 else "\n")
    return page


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
    PAGE.with_name("agents.md").write_text(agent_docs.text(), encoding="utf-8")
    for name, tables in (("llama-factory", convert_tables()), ("drift", [drift_table()])):
        page = PAGE.with_name(f"{name}.md")
        page.write_text(fill(page.read_text(encoding="utf-8"), tables), encoding="utf-8")
