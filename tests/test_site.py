"""The site that `make docs` builds: without warnings, without broken links, without a network."""

from __future__ import annotations

import html
import re

from tests.doc_pages import ROOT

_LINK = re.compile(r'<(a|link|script|img|iframe)\b[^>]*?\s(?:href|src)="([^"]*)"')


def test_every_page_is_built_and_links_what_is_there(site):
    pages = {path.resolve(): path.read_text(encoding="utf-8") for path in site.glob("*.html")}
    assert {path.stem for path in pages} - {"search"} == {p.stem for p in ROOT.glob("docs/*.md")}
    anchors = {path: set(re.findall(r'\sid="([^"]*)"', text)) for path, text in pages.items()}
    for page, text in pages.items():
        found = _LINK.findall(text)
        loaded = [link for tag, link in found if tag != "a"]
        assert loaded
        assert not [link for link in loaded if "//" in link], page.name
        for link in (html.unescape(link) for tag, link in found if tag == "a"):
            name, _, anchor = link.partition("#")
            if not link.startswith(("http://", "https://")):
                target = (page.parent / name).resolve() if name else page
                assert target.exists(), f"{page.name}: {link}"
                assert not anchor or anchor in anchors.get(target, {anchor}), f"{page.name}: {link}"
