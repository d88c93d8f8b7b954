"""What arguments may be."""

from __future__ import annotations

import operator


def integer(value: object) -> int | None:
    """The value of an integer of Python's or of a library's kind, such as numpy's; None for anything else."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None
