"""The site that `make docs` builds: without warnings, without broken links, without a network."""

from __future__ import annotations

import os
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

from tests.doc_pages import ROOT


class Html(HTMLParser):
    """The links, the loaded files and the anchors of a built page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if "id" in found:
            self.anchors.add(found["id"])
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        elif tag in ("link", "script", "img", "iframe"):
            self.loaded += [found[key] for key in ("src", "href") if found.get(key)]


@cache
def html(path: Path) -> Html:
    return Html(path)


def test_every_page_is_built(site):
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert pages == {path.stem for path in site.glob("*.html")} - {"search"}


def test_every_link_of_the_site_leads_somewhere(site):
    for page in site.glob("*.html"):
        for link in html(page).links:
            if link.startswith(("http://", "https://")):
                continue
            name, _, anchor = link.partition("#")
            target = Path(os.path.normpath(page.parent / name)) if name else page
            assert target.exists(), f"{page.name}: {link}"
            if anchor and target.suffix == ".html":
                assert anchor in html(target).anchors, f"{page.name}: {link}"


def test_the_site_loads_nothing_from_elsewhere(site):
    for page in site.glob("*.html"):
        assert html(page).loaded
        for name in html(page).loaded:
            assert "//" not in name, f"{page.name}: {name}"
