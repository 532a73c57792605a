"""FAR's linear layer as torch's own products, on the CPU: of many tokens with panels of W', of few with W and wt apart.

A panel is some rows of W (forward) or some columns (dx) with the trained rows written over them: W itself is only
read, the copy stays in the cache until it is multiplied, and the product costs what that with W does.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

VERIFIED_ON: frozenset[str] = frozenset()  # compute capabilities with a correct run under benchmarks/results

ON_CUDA: frozenset[str] = frozenset()  # there the reference is two products and a copy of the trained columns

_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
_PANEL_BYTES = 16 << 20
_PANEL_PAYS = 32  # trained rows x tokens over rows of W, from which copying W costs less than multiplying twice


def unavailable(device: str) -> str:
    return ""


def why_not(first, *rest) -> str:
    return "" if first.dtype in _DTYPES else f"no kernel for {first.dtype}"


def _by_panels(x, w, rows):
    return len(rows) * math.prod(x.shape[:-1]) >= _PANEL_PAYS * len(w)


def _panels(w, along):
    """(start, size) of the panels along a dimension of W, and room for one, laid out as W is."""
    count = max(1, -(-w.numel() * w.itemsize // _PANEL_BYTES))
    size = -(-w.shape[along] // count)
    shape = (size, w.shape[1]) if along == 0 else (w.shape[0], size)
    transposed = w.stride(0) < w.stride(1)
    room = w.new_empty(shape[::-1]).T if transposed else w.new_empty(shape)
    return [(i, min(size, w.shape[along] - i)) for i in range(0, w.shape[along], size)], room


def far_linear(x, w, bias, wt, bt, rows):
    x, wt, rows = x.contiguous(), wt.to(w.dtype), rows.long()
    if bias is not None and bt is not None:
        bias = bias.index_copy(0, rows, bt.to(bias.dtype))
    if not _by_panels(x, w, rows):
        y = F.linear(x, w, bias)
        return y.index_copy_(-1, rows, F.linear(x, wt, None if bias is None else bias.index_select(0, rows)))
    y = x.new_empty(*x.shape[:-1], len(w))
    m = math.prod(x.shape[:-1])
    tokens, columns = x.view(m, x.shape[-1]), y.view(m, len(w))
    rows, order = rows.sort()
    where, room = _panels(w, 0)
    ends = torch.searchsorted(rows, torch.tensor([i for i, _ in where] + [len(w)])).tolist()
    if ends[0] or ends[-1] < len(rows):
        raise IndexError(f"rows {int(rows[0])} to {int(rows[-1])} of a weight that has {len(w)}")
    for (i, size), begin, end in zip(where, ends, ends[1:], strict=False):
        panel = room[:size].copy_(w[i : i + size])
        panel.index_copy_(0, rows[begin:end] - i, wt[order[begin:end]])
        if bias is None:
            torch.mm(tokens, panel.T, out=columns[:, i : i + size])
        else:
            torch.addmm(bias[i : i + size], tokens, panel.T, out=columns[:, i : i + size])
    return y


def far_linear_backward(g, x, w, wt, rows, needs):
    g, rows = g.contiguous(), rows.long()
    tokens = g.view(math.prod(g.shape[:-1]), g.shape[-1])
    gt = tokens.index_select(1, rows)
    sums = torch.promote_types(g.dtype, torch.float32)
    dx = _dx(tokens, gt, w, wt.to(w.dtype), rows).view(*g.shape[:-1], w.shape[1]) if needs[0] else g.new_empty(0)
    dwt = (gt.T @ x.reshape(len(gt), w.shape[1])).to(wt.dtype) if needs[1] else wt.new_empty(0)
    return dx, dwt, gt.sum(0, dtype=sums) if needs[2] else g.new_empty(0, dtype=sums)


def _dx(g, gt, w, wt, rows):
    if not _by_panels(g, w, rows):
        return (g.index_fill(1, rows, 0.0) @ w).addmm_(gt, wt)
    dx = g.new_empty(len(g), w.shape[1])
    where, room = _panels(w, 1)
    for i, size in where:
        panel = room[:, :size].copy_(w[:, i : i + size])
        torch.mm(g, panel.index_copy_(0, rows, wt[:, i : i + size]), out=dx[:, i : i + size])
    return dx
