"""What SVD reports, and where it may run without the weight."""

from __future__ import annotations

from typing import Any

from ..engine.text import aligned


def bare(base: Any) -> bool:
    """Whether the frozen module is all that lies below a tuner."""
    while hasattr(base, "base"):  # some rows of it, or beside a gate
        base = base.base
    return getattr(base, "tuner", None) is None


class SVDReport(list):
    """Rows dict(site, rank, most, numbers, dense, error); str() is the table."""

    def __str__(self) -> str:
        rows = [("layer", "rank", "numbers", "of", "error")]
        for row in self:
            rank = f"{row['rank']} <= {row['most']}" if row["rank"] else "as it is"
            rows.append((row["site"], rank, f"{row['numbers']:,}", f"{row['dense']:,}", f"{row['error']:.4f}"))
        numbers, dense = (sum(row[key] for row in self) for key in ("numbers", "dense"))
        rows.append((f"{len(self)} layers", "", f"{numbers:,}", f"{dense:,}", ""))
        return aligned(rows)
