"""Tables between the markers of pages, made of benchmarks/results alone."""

import importlib
import json
import re
from collections.abc import Sequence

from benchmarks.harness import ROOT, described

RESULTS = ROOT / "benchmarks" / "results"
#: Parts in their order, and the devices each is measured on.
PARTS = {
    "scoring": ("cpu", "cuda"),
    "sharing": ("cpu", "cuda"),
    "memory": ("cpu", "cuda"),
    "step": ("cpu", "cuda"),
    "whole_run": ("cpu", "cuda"),
    "ranks": ("cpu",),
    "ranks_run": ("cpu",),
    "many_ranks": ("cpu",),
    "large_n": ("cpu",),
    "noise": ("cpu",),
    "plan": ("cpu", "cuda"),
    "servers": ("cpu",),
}
#: Pages and the parts that each has a place for.
PAGES = {
    ROOT / "docs" / "benchmarks.md": tuple(part for part in PARTS if part != "plan"),
    ROOT / "docs" / "plan.md": ("plan",),
}
NOTHING = "No results yet."


def tables(part: str) -> str:
    """What stands between a part's markers."""
    module = importlib.import_module(f"benchmarks.{part}")
    found = []
    for path in sorted((RESULTS / part).glob("*.json")):
        kept = json.loads(path.read_text(encoding="utf-8"))
        found.append(f"{module.table(kept['result'])}\n\n{described(kept['about'])}")
    return "\n\n".join(found) or NOTHING


def render(page: str, parts: Sequence[str]) -> str:
    """A page with its tables as the results have them.

    Raises:
        ValueError: if the markers of a part are not there once.
    """
    for part in parts:
        between = re.compile(rf"(<!-- {part} -->\n).*?(\n<!-- end of {part} -->)", re.DOTALL)
        text = tables(part)
        page, count = between.subn(lambda match, text=text: match[1] + text + match[2], page)
        if count != 1:
            raise ValueError(f"the page has {count} places for {part}; it needs one")
    return page


def update_pages() -> None:
    for page, parts in PAGES.items():
        page.write_text(render(page.read_text(encoding="utf-8"), parts), encoding="utf-8")
