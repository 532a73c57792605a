"""Products with W', a copy of W in which some numbers are others, on the CPU: W' exists a panel at a time.

A panel is some rows of W (x W'^T) or some columns (g W'): W is only read, the copy stays in the cache until it is
multiplied, and as no sum goes over several panels the product costs what that with W does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Change = Callable[[Tensor, int], object]  # (panel, where it begins in W): makes it one of W', in place


def linear(x: Tensor, w: Tensor, bias: Tensor | None, change: Change, nbytes: int) -> Tensor:
    """x W'^T + bias   x [T, in]   w [out, in]   bias [out] or None   change: of rows   nbytes: of a panel"""
    y = x.new_empty(len(x), len(w))
    for begin, panel in _panels(w, 0, change, nbytes):
        out = y.narrow(1, begin, len(panel))
        if bias is None:
            torch.mm(x, panel.T, out=out)
        else:
            torch.addmm(bias.narrow(0, begin, len(panel)), x, panel.T, out=out)
    return y


def product(g: Tensor, w: Tensor, change: Change, nbytes: int) -> Tensor:
    """g W'   g [T, out]   w [out, in]   change: of columns   nbytes: of a panel"""
    dx = g.new_empty(len(g), w.shape[1])
    for begin, panel in _panels(w, 1, change, nbytes):
        torch.mm(g, panel, out=dx.narrow(1, begin, panel.shape[1]))
    return dx


def _panels(w: Tensor, dim: int, change: Change, nbytes: int) -> Iterator[tuple[int, Tensor]]:
    """(begin, panel of W') along a dimension of W, all in one buffer that is laid out as W is."""
    along, across = w.shape[dim], w.shape[1 - dim]
    if not along:
        return
    size = max(nbytes // max(across * w.itemsize, 1) // 64, 1) * 64
    size = min(-(-along // -(-along // size)), along)  # equal panels
    shape = (size, across) if dim == 0 else (across, size)
    room = w.new_empty(shape[::-1]).T if w.stride(0) < w.stride(1) else w.new_empty(shape)
    for begin in range(0, along, size):
        own = min(size, along - begin)
        panel = room.narrow(dim, 0, own).copy_(w.narrow(dim, begin, own))
        change(panel, begin)
        yield begin, panel
