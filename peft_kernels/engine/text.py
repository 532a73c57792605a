"""Reports as text."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from typing import Any


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells in columns: names to the left, in the first one, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *numbers in rows:
        cells = (name.ljust(widths[0]), *(n.rjust(w) for n, w in zip(numbers, widths[1:], strict=True)))
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def columns(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows in aligned columns; the last one runs free."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    padded = [[*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]] for row in rows]
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


def shown(hint: Any) -> str:
    """A type as it is written."""
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")
