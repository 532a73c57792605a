"""FAR's linear layer as torch's products, on the CPU: of many tokens with panels of W', of few with W and wt apart."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ..common import panels

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


def far_linear(x, w, bias, wt, bt, rows):
    x, wt, rows = x.contiguous(), wt.to(w.dtype), rows.long()
    if bias is not None and bt is not None:
        bias = bias.index_copy(0, rows, bt.to(bias.dtype))
    if not _by_panels(x, w, rows):
        y = F.linear(x, w, bias)
        return y.index_copy_(-1, rows, F.linear(x, wt, None if bias is None else bias.index_select(0, rows)))
    rows, order = rows.sort()
    if len(rows) and (rows[0] < 0 or rows[-1] >= len(w)):
        raise IndexError(f"rows {int(rows[0])} to {int(rows[-1])} of a weight that has {len(w)}")

    def change(panel, at):
        begin, end = torch.searchsorted(rows, torch.tensor([at, at + len(panel)])).tolist()
        panel.index_copy_(0, rows[begin:end] - at, wt[order[begin:end]])

    tokens = x.view(math.prod(x.shape[:-1]), x.shape[-1])
    return panels.linear(tokens, w, bias, change, _PANEL_BYTES).view(*x.shape[:-1], len(w))


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
    return panels.product(
        g, w, lambda panel, at: panel.index_copy_(0, rows, wt.narrow(1, at, panel.shape[1])), _PANEL_BYTES
    )
