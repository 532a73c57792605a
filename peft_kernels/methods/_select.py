"""Which numbers of some tensors are kept: the best of all together, or n of every m neighbours."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod

import torch
from torch import Tensor

from .. import ops
from ..engine.method import Method
from ..engine.site import Site

FREE = "free"


def parsed(pattern: str) -> tuple[int, int] | None:
    """(n, m) of "n:m", None for "free"; ValueError for anything else."""
    if pattern == FREE:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    if match is None or not 0 < int(match[1]) <= int(match[2]):
        raise ValueError(f"pattern {pattern!r}; expected {FREE!r}, or n:m with 0 < n <= m such as '2:4'")
    return int(match[1]), int(match[2])


def kept(total: int, ratio: float, pattern: str) -> int:
    """How many of `total` numbers: at least one."""
    sizes = parsed(pattern)
    return max(1, round(total * ratio)) if sizes is None else total // sizes[1] * sizes[0]


def best(scores: Sequence[Tensor], k: int, pattern: str = FREE, *, use_abs: bool = False) -> list[Tensor]:
    """For each tensor [out, in] the flat int64 positions of what is kept, ascending. ValueError on a NaN.

    "free": the k largest of all tensors together, k in all. "n:m": the n largest of every m neighbours in a row,
    whatever k is. Ties go to the first tensor, and within one to the first position. On the meta device, where no
    number is the best, as many positions without values, an even part of each tensor.
    """
    sizes = parsed(pattern)
    if scores and all(s.is_meta for s in scores):
        ends = [*accumulate(s.numel() for s in scores)]
        counts = [round(k * b / ends[-1]) - round(k * a / ends[-1]) for a, b in pairwise((0, *ends))]
        if sizes is not None:
            counts = [kept(s.numel(), 1.0, pattern) for s in scores]
        return [s.new_empty(n, dtype=torch.int64) for s, n in zip(scores, counts, strict=True)]
    if sizes is None:
        threshold, _ = ops.topk_threshold(scores, k, use_abs=use_abs)
        return ops.topk_compact(scores, threshold, k, use_abs=use_abs)
    return [_best_of_neighbours(s.detach().abs() if use_abs else s.detach(), *sizes) for s in scores]


def _best_of_neighbours(scores: Tensor, n: int, m: int) -> Tensor:
    if scores.isnan().any():
        raise ValueError(f"{int(scores.isnan().sum())} scores are NaN; expected numbers, look for where they arise")
    groups = scores.reshape(-1, m)
    order = groups.sort(dim=1, descending=True, stable=True).indices[:, :n].sort(dim=1).values  # [groups, n]
    return (order + torch.arange(0, scores.numel(), m, device=scores.device)[:, None]).flatten()


def erk(shapes: Sequence[Sequence[int]], keep_ratio: float) -> list[float]:
    """The part of each weight [a, b] to keep: e (a + b) / (a b), at most 1, together keep_ratio of all numbers."""
    parts = [1.0] * len(shapes)
    sparse = list(range(len(shapes)))
    while sparse:
        whole = sum(prod(shapes[i]) for i in range(len(shapes)) if i not in sparse)
        e = (keep_ratio * sum(map(prod, shapes)) - whole) / sum(sum(shapes[i]) for i in sparse)
        for i in sparse:
            parts[i] = min(1.0, e * sum(shapes[i]) / prod(shapes[i]))
        if not any(parts[i] == 1.0 for i in sparse):
            break
        sparse = [i for i in sparse if parts[i] < 1.0]
    return parts


@dataclass(frozen=True)
class Masked(Method):
    """A method that trains some numbers of each weight."""

    keep_ratio: float = 0.005  # the part of the numbers that is trained
    pattern: str = FREE  # or n:m, the n best of every m neighbours in a row, which decides the part itself

    def __post_init__(self):
        super().__post_init__()
        name = type(self).__name__
        if not 0 < self.keep_ratio <= 1:
            raise ValueError(f"{name} keep_ratio = {self.keep_ratio}; expected more than 0 and at most 1")
        try:
            parsed(self.pattern)
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None

    def at(self, site: Site) -> Method:
        sizes = parsed(self.pattern)
        if sizes is not None and site.n_in % sizes[1]:
            raise ValueError(
                f"{type(self).__name__} pattern = {self.pattern!r} at {site.name}, whose rows have {site.n_in}; "
                f"give an m that divides {site.n_in}, or other targets"
            )
        return self
