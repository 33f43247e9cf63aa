"""The site that `make docs` builds, where a link that leads nowhere is a warning and an error."""

from __future__ import annotations

import re

from tests.doc_pages import ROOT


def test_every_page_is_built_and_loads_nothing_from_a_network(site):
    pages = {path.stem: path.read_text(encoding="utf-8") for path in site.glob("*.html")}
    assert pages.keys() - {"search"} == {page.stem for page in ROOT.glob("docs/*.md")}
    for name, text in pages.items():
        loaded = re.findall(r'<(?:link|script|img|iframe)\b[^>]*?\s(?:href|src)="([^"]*)"', text)
        assert loaded
        assert not [link for link in loaded if "//" in link], name
