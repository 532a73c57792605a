"""Factors of a weight: what KronA starts from and SVD trains."""

from __future__ import annotations

from typing import Any

from ..engine.factor import nearest_kronecker, rearranged, truncated_svd

__all__ = ["SVDReport", "bare", "nearest_kronecker", "rearranged", "truncated_svd"]


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
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join((name.ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells, widths[1:], strict=True)))).rstrip()
            for name, *cells in rows
        )
