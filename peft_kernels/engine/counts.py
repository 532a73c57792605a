"""Counting: how many numbers a method trains, changes and stores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from .attach import names_of, tuners
from .method import Changes, largest_rank, overlaid
from .site import base_modules, base_numbers
from .store import tensors


@dataclass(frozen=True)
class Counts:
    """The three counts of the survey, and the two of the file.

    trainable: numbers that get a gradient.   changed: numbers of the base whose value a merge changes.
    rank: sum over the changed matrices of an upper bound on the rank of the change, of `pk.SVD` on that of the product
        which replaces the matrix.
    stored: numbers in the saved adapter.   bytes: its size, with the positions of numbers and other integers.
    total: numbers of the base model; packed weights count as if they were dense.
    """

    trainable: int
    changed: int
    rank: int
    stored: int
    total: int
    bytes: int

    def __str__(self) -> str:
        def row(label: str, n: int) -> str:
            return f"{label:<10}{n:>16,}  {100 * n / max(self.total, 1):8.4f} %"

        return "\n".join(
            (
                row("trainable", self.trainable),
                row("changed", self.changed),
                f"{'rank':<10}{self.rank:>16,}",
                row("stored", self.stored) + f"  {self.bytes:,} bytes",
                f"{'total':<10}{self.total:>16,}",
            )
        )


def counts(model: nn.Module, name: str | None = None) -> Counts:
    """Counts of one adapter (None: all attached). print() gives the survey's report."""
    trainable = stored = size = 0
    found: dict[str, list[dict[Any, Changes]]] = {}
    for n in names_of(model, name):
        for path, tuner in tuners(model, n):
            trainable += sum(p.numel() for p in tuner.parameters() if p.requires_grad)
            found.setdefault(path, []).append(tuner.changes_by_rows())
        values = tensors(model, n).values()
        stored += sum(t.numel() for t in values if t.is_floating_point())
        size += sum(t.numel() * t.element_size() for t in values)
    modules = dict(base_modules(model))
    changed = rank = 0
    for path, changes in found.items():
        blocks = overlaid(changes)
        whole, parts = blocks.pop(None, Changes()), Changes()
        for change in blocks.values():
            parts = parts.beside(change)
        both = whole.over(parts)
        own = [p for _, p in base_numbers(modules[path])]
        changed += min(both.weight + both.bias, sum(p.numel() for p in own))
        rank += min(both.rank, sum(largest_rank(p) for p in own))
    return Counts(trainable, changed, rank, stored, sum(p.numel() for _, p in base_numbers(model)), size)
