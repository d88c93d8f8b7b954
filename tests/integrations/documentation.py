"""The code of the pages in docs, as their readers would run it."""

from __future__ import annotations

from pathlib import Path

from sybil import Document
from sybil.parsers.markdown.lexers import FencedCodeBlockLexer

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page: str, language: str) -> list[str]:
    """The blocks of code in one language of a page."""
    path = DOCS / page
    document = Document(path.read_text(encoding="utf-8"), str(path))
    return [region.lexemes["source"] for region in FencedCodeBlockLexer(language)(document)]


def sides_of_diff(block: str) -> tuple[str, str]:
    """What a reader has today, and what the page makes of it."""
    lines = block.splitlines()
    assert {line[:1] for line in lines} <= {" ", "+", "-", ""}
    before, after = ("\n".join(line[1:] for line in lines if line[:1] != left_out) for left_out in ("+", "-"))
    return before, after


def before_and_after(page: str, number: int = 0) -> tuple[str, str]:
    """Both sides of a diff of a page."""
    return sides_of_diff(blocks(page, "diff")[number])
