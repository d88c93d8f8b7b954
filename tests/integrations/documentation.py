"""The code of the pages in docs, as their readers would run it."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page: str, language: str) -> list[str]:
    """The blocks of code in one language of a page."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def before_and_after(page: str, number: int = 0) -> tuple[str, str]:
    """What a reader has today, and what the page makes of it."""
    lines = blocks(page, "diff")[number].splitlines()
    assert {line[:1] for line in lines} <= {" ", "+", "-", ""}
    before, after = ("\n".join(line[1:] for line in lines if line[:1] != left_out) for left_out in ("+", "-"))
    return before, after
