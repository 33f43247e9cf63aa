"""What the pages show, as a Markdown parser sees them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
_PARSER = MarkdownIt("commonmark").enable("table")


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def tokens(page: Path) -> Iterator[Token]:
    """All tokens of a page, those inside paragraphs too."""
    for token in _PARSER.parse(page.read_text(encoding="utf-8")):
        yield token
        yield from token.children or ()


def blocks(page: Path, *languages: str) -> list[Block]:
    """The code blocks of a page, of these languages if any are given."""
    found = [
        Block(page, token.map[0] + 1, token.info.strip(), token.content)
        for token in tokens(page)
        if token.type in ("fence", "code_block") and token.map is not None
    ]
    return [block for block in found if not languages or block.language in languages]


def inline_code(page: Path) -> list[str]:
    return [token.content for token in tokens(page) if token.type == "code_inline"]


def commands(block: Block) -> list[str]:
    """The command lines of a shell block: comments left out, continued lines joined."""
    lines = re.sub(r"\\\n\s*", "", block.text).splitlines()
    return [line for line in map(str.strip, lines) if line and not line.startswith("#")]


def file_name(block: Block) -> str | None:
    """The file that a YAML block shows, where its first line says so: `# config.yaml`."""
    match = re.match(r"# ([\w.-]+\.ya?ml)\n", block.text)
    return match[1] if match else None


def patched(block: Block, read: dict[str, str]) -> tuple[str, str] | None:
    """What a diff with `---` and `+++` lines makes of a file: its new name and its new text."""
    match = re.match(r"--- (\S+)\n\+\+\+ (\S+)\n", block.text)
    if match is None:
        return None
    lines = block.text[match.end() :].splitlines(keepends=True)
    before = "".join(line[1:] for line in lines if line[0] in " -")
    after = "".join(line[1:] for line in lines if line[0] in " +")
    text = read[match[1]]
    assert text.count(before) == 1, f"{block.place}: {before!r} is not in {match[1]} once"
    return match[2], text.replace(before, after)
