"""The linear layer of FAR, of whose weight some rows are trained. Vucetic et al. 2022, arXiv:2205.01541.

    y = x W'^T + b'      x [..., K]   y [..., N]      W' [N, K] is W, but its row rows[i] is wt[i]; b' is bias with bt

With g = dL/dy and g_t = g[..., rows] the gradients are

    dx = g W'      dwt = g_t^T x      dbt = sum over tokens of g_t

W is only read; neither its dense gradient nor a permutation of the output is formed. x, W, bias and y share one dtype;
wt and bt may be fp32 beside 16-bit ones and are read rounded to it, dwt too is rounded to it once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ._op import Cost, Gradient, Op, Sample
from ._tensors import as_rows, nbytes

# -- references -------------------------------------------------------------------------------------------------------


def _reference(x, w, bias, wt, bt, rows):
    rows, wt = rows.long(), wt.to(w.dtype)
    if bias is not None and bt is not None:
        bias = bias.index_copy(0, rows, bt.to(bias.dtype))
    own = None if bias is None else bias.index_select(0, rows)
    return F.linear(x, w, bias).index_copy(-1, rows, F.linear(x, wt, own))


def _backward_reference(g, x, w, wt, rows, needs):
    rows = rows.long()
    gt = g.index_select(-1, rows)
    dx = g.index_fill(-1, rows, 0.0) @ w + gt @ wt.to(w.dtype) if needs[0] else g.new_empty(0)
    dwt = (as_rows(gt).T @ as_rows(x)).to(wt.dtype) if needs[1] else wt.new_empty(0)
    return dx, dwt, as_rows(gt).sum(0, dtype=_summed(g)) if needs[2] else g.new_empty(0, dtype=_summed(g))


def _summed(g: Tensor) -> torch.dtype:
    return torch.promote_types(g.dtype, torch.float32)


# -- test inputs and costs --------------------------------------------------------------------------------------------

# id: leading dims, K, N, how many rows are trained
_SHAPES = {
    "odd": ((3, 5), 17, 13, 4),
    "one_row": ((1,), 16, 8, 3),
    "one_trained": ((17,), 20, 12, 1),
    "none_trained": ((4,), 8, 6, 0),
    "all_trained": ((33,), 24, 31, 31),
    "half": ((70,), 36, 40, 20),
    "no_rows": ((0,), 12, 10, 3),
    "one_column": ((7,), 1, 5, 2),
    "transposed": ((6, 4), 20, 12, 9),
    "expanded": ((6, 4), 20, 12, 7),
    "mixed": ((10, 3), 40, 24, 13),
}


def _layouts(dtype: torch.dtype, device: str) -> Iterator[tuple[str, tuple, Tensor]]:
    """(id, (x, w, bias, wt, bt, rows), g) over shapes, strides and mixed dtypes; the rows come in any order."""
    for name, (lead, k, n, h) in _SHAPES.items():
        low = torch.promote_types(dtype, torch.float32) if name == "mixed" else dtype
        made = torch.Generator().manual_seed(len(name))
        shapes = ((*lead, k), (n, k), (n,), (h, k), (h,), (*lead, n))
        x, w, bias, wt, bt, g = (torch.randn(s, generator=made, dtype=torch.float64).to(device, dtype) for s in shapes)
        rows = torch.randperm(n, generator=made)[:h].to(device, torch.int64 if name == "half" else torch.int32)
        w, wt, bt = w * k**-0.5, (wt * k**-0.5).to(low), bt.to(low)
        if name == "transposed":
            x, w, g = x.transpose(0, 1), w.T.contiguous().T, g.transpose(0, 1)
        if name == "expanded":
            x, g = x[:1].expand_as(x), g[:1].expand_as(g)
        biases = None if name == "expanded" else bias, None if name in ("expanded", "one_trained") else bt
        yield name, (x, w, biases[0], wt, biases[1], rows), g


def _samples(dtype, device):
    for name, args, _ in _layouts(dtype, device):
        trained = {"expanded": (0, 3), "one_trained": (0, 3), "odd": (0, 2, 3, 4)}
        yield Sample(name, args, trained.get(name, (0, 3, 4)))


def _backward_samples(dtype, device):
    for name, (x, w, _, wt, _, rows), g in _layouts(dtype, device):
        for needs in ((True, True, True), (False, True, False), (True, False, False)):
            x_or_none = x if needs[1] else None
            yield Sample(f"{name}_{''.join(str(int(n)) for n in needs)}", (g, x_or_none, w, wt, rows, needs))


def _cost(x, w, bias, wt, bt, rows):
    tokens = math.prod(x.shape[:-1])
    y = tokens * w.shape[0] * x.element_size()
    return Cost(2 * tokens * w.numel(), nbytes(x, w, bias, wt, bt, rows) + y)


def _backward_cost(g, x, w, wt, rows, needs):
    tokens = math.prod(g.shape[:-1])
    dx = tokens * w.shape[1] * g.element_size()
    flops = 2 * tokens * (w.numel() * needs[0] + wt.numel() * needs[1])
    return Cost(flops, nbytes(g, x, wt, rows) + needs[0] * (nbytes(w) + dx) + needs[1] * nbytes(wt))


# -- the ops ----------------------------------------------------------------------------------------------------------

_backward = Op(
    "far_linear_backward",
    "(Tensor g, Tensor? x, Tensor w, Tensor wt, Tensor rows, bool[3] needs) -> (Tensor, Tensor, Tensor)",
    family="split",
    reference=_backward_reference,
    samples=_backward_samples,
    cost=_backward_cost,
)


def _keep(args, out):
    x, w, bias, wt, bt, rows = args
    # Without trained rows that ask for a gradient x is not held.
    return (x if wt.requires_grad else None, w, wt, rows), tuple(None if b is None else b.dtype for b in (bias, bt))


def _gradient(tensors, constants, grads, needs):
    (x, w, wt, rows), (bias, bt), (g, *_) = tensors, constants, grads
    wanted = (needs[0], needs[3], needs[4])
    dx, dwt, dbt = _backward(g, x, w, wt, rows, wanted) if any(wanted) else (None, None, None)
    dbias = None
    if needs[2]:
        dbias = as_rows(g).sum(0, dtype=_summed(g)).to(bias)
        dbias = dbias if bt is None else dbias.index_fill(0, rows.long(), 0.0)
    out = dx, None, dbias, dwt, None if dbt is None or bt is None else dbt.to(bt), None
    return tuple(grad if need else None for grad, need in zip(out, needs, strict=True))


_linear = Op(
    "far_linear",
    "(Tensor x, Tensor w, Tensor? bias, Tensor wt, Tensor? bt, Tensor rows) -> Tensor",
    family="split",
    reference=_reference,
    samples=_samples,
    cost=_cost,
    gradient=Gradient(_keep, _gradient),
    autocast=(0, 1, 2),
)


def _fits(op: str, w: Tensor, rows: Tensor, src: Tensor) -> None:
    if w.dim() != 2 or rows.dim() != 1 or src.shape != (len(rows), w.shape[1]) or len(rows) > len(w):
        raise ValueError(
            f"{op}: w is {tuple(w.shape)}, rows {tuple(rows.shape)} and their values {tuple(src.shape)}; "
            "expected [out, in], [h] and [h, in] with h <= out"
        )
    if rows.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{op}: rows is {rows.dtype}; expected int32 or int64")
    if not w.device == rows.device == src.device:
        raise ValueError(
            f"{op}: w is on {w.device}, rows on {rows.device}, their values on {src.device}; use one device"
        )


def far_linear(
    x: Tensor, w: Tensor, wt: Tensor, rows: Tensor, *, bias: Tensor | None = None, bt: Tensor | None = None
) -> Tensor:
    """The linear layer of weight w and bias, in which wt and bt take the place of some rows.

    x [..., in]   w [out, in]   wt [h, in]   rows [h] int32 or int64, in any order   bias [out] or None   bt [h] or None
    dtypes: x, w and bias equal; wt and bt the same or fp32. Differentiable in x, wt, bt and bias; where w asks for a
    gradient, dense, in w too. w is only read. x is held for the backward only if wt asks for a gradient.
    The rows must differ from each other, which is not checked; one that does not exist raises IndexError on the CPU.
    Raises ValueError on shapes, dtypes or devices that do not fit. Vucetic et al. 2022, arXiv:2205.01541.
    """
    _fits("far_linear", w, rows, wt)
    if not x.dim() or x.shape[-1] != w.shape[1] or x.device != w.device:
        raise ValueError(f"far_linear: x is {tuple(x.shape)} on {x.device}; expected [..., {w.shape[1]}] on {w.device}")
    if (bias is not None and bias.shape != w.shape[:1]) or (
        bt is not None and (bias is None or bt.shape != rows.shape)
    ):
        given = [None if b is None else tuple(b.shape) for b in (bias, bt)]
        raise ValueError(f"far_linear: bias, bt are {given}; expected [{len(w)}] or None, and with it [{len(rows)}]")
    if torch.is_grad_enabled() and w.requires_grad:
        return _reference(x, w, bias, wt, bt, rows)
    return _linear(x, w, bias, wt, bt, rows)


@torch.no_grad()
def row_scatter_(w: Tensor, rows: Tensor, src: Tensor) -> Tensor:
    """w[rows] = src, rounded to w's dtype, in place; the other rows keep their bits. Returns w.

    w [out, in]   rows [h] int32 or int64   src [h, in]. Raises ValueError on shapes, dtypes or devices that do not fit.
    """
    _fits("row_scatter_", w, rows, src)
    return w.index_copy_(0, rows.long(), src.to(w.dtype))
