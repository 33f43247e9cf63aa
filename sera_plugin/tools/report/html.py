"""HTML that needs nothing else and asks nobody.

Text of models and datasets is made printable before it comes here, and escaped by the template
engine. If both failed, the page's own policy still lets no other script run and no address be
asked: the only script allowed is ours, by its hash.
"""

from __future__ import annotations

import base64
import hashlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2

from sera_plugin import __version__

_HERE = Path(__file__).parent


def fill(template: str, **content: Any) -> str:
    """Fill a template that extends base.html.

    Args:
        template: its file name.
        content: what it shows. Only `Markup` is not escaped.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    script = environment.get_template("page.js").render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(
        **content,
        script_hash=digest,
        version=__version__,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
