"""Sparse fine-tuning: a frozen weight plus a delta at a few fixed positions.

    y = x (W + D)^T + bias      x [..., n]   W [m, n]   y [..., m]   D [m, n] has vals[e] at (row e, col[e])

The mask is CSR: the entries of row i are crow[i] <= e < crow[i + 1], their columns col[e] ascend, none occurs twice.
crow [m + 1] and col [nnz] are int32 or int64. With g = dL/dy:

    dx = g (W + D)      dvals[e] = sum over tokens t of g[t, row e] x[t, col[e]]      dbias = sum over tokens of g

W is only read: W + D, rounded to the dtype of W, exists for a panel of W at a time at most, and the dense gradient of W
never in a kernel. Kernels sum in fp32; vals may be fp32 beside a 16-bit x and W.
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


def _places(crow: Tensor, col: Tensor) -> tuple[Tensor, Tensor]:
    """(row, column) of each entry."""
    entry = torch.arange(col.shape[0], dtype=crow.dtype, device=col.device)
    return torch.searchsorted(crow, entry, right=True) - 1, col.long()


def _dense(vals: Tensor, crow: Tensor, col: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """D [m, n]."""
    return vals.new_zeros(crow.shape[0] - 1, n, dtype=dtype).index_put(_places(crow, col), vals.to(dtype))


def _patched(w: Tensor, vals: Tensor, crow: Tensor, col: Tensor) -> Tensor:
    """W + D, rounded once."""
    dtype = torch.promote_types(w.dtype, vals.dtype)
    return (w.to(dtype) + _dense(vals, crow, col, w.shape[1], dtype)).to(w.dtype)


def _linear_reference(x, w, vals, crow, col, bias):
    return F.linear(x, _patched(w, vals, crow, col), bias)


def _add_reference(y, x, vals, crow, col):
    dtype = torch.promote_types(x.dtype, vals.dtype)
    return (y + F.linear(x.to(dtype), _dense(vals, crow, col, x.shape[-1], dtype))).to(y.dtype)


def _dx_reference(g, w, vals, crow, col, n):
    if w is not None:
        return g @ _patched(w, vals, crow, col)
    dtype = torch.promote_types(g.dtype, vals.dtype)
    return (g.to(dtype) @ _dense(vals, crow, col, n, dtype)).to(g.dtype)


def _sddmm_reference(dy, x, crow, col):
    dtype = torch.promote_types(torch.promote_types(dy.dtype, x.dtype), torch.float32)
    return (as_rows(dy).to(dtype).T @ as_rows(x).to(dtype))[_places(crow, col)]


# -- test inputs and costs --------------------------------------------------------------------------------------------

# id: leading dims, n, m, share of entries in the mask
_SHAPES = {
    "odd": ((3, 5), 17, 13, 0.3),
    "one_token": ((1,), 16, 8, 0.25),
    "no_tokens": ((0,), 12, 10, 0.2),
    "one_entry": ((17,), 20, 12, 1 / 240),
    "no_entries": ((5,), 9, 7, 0.0),
    "all_entries": ((4,), 11, 9, 1.0),
    "one_column": ((6,), 1, 5, 0.5),
    "clustered": ((7, 2), 33, 40, 0.1),
    "long": ((70,), 68, 36, 0.1),
    "int64": ((17,), 24, 31, 0.1),
    "transposed": ((6, 4), 20, 12, 0.2),
    "expanded": ((6, 4), 20, 12, 0.2),
    "mixed": ((5, 3), 40, 24, 0.2),
}


def _mask(name: str, m: int, n: int, share: float, made: torch.Generator) -> Tensor:
    """bool [m, n], round(share m n) entries; those of "clustered" are in a third of the rows, half of the columns."""
    scores = torch.rand(m, n, generator=made)
    if name == "clustered":
        scores[torch.arange(m) % 3 > 0] = 2
        scores[:, 1::2] = 2
    mask = torch.zeros(m * n, dtype=torch.bool)
    mask[scores.flatten().argsort()[: round(share * m * n)]] = True
    return mask.view(m, n)


def _layouts(dtype: torch.dtype, device: str) -> Iterator[tuple[str, tuple]]:
    """(id, (x, w, bias, y, (vals, crow, col))) over shapes, masks, strides and mixed dtypes."""
    for name, (lead, n, m, share) in _SHAPES.items():
        low = torch.promote_types(dtype, torch.float32) if name == "mixed" else dtype
        made = torch.Generator().manual_seed(len(name) + n)
        row, col = _mask(name, m, n, share, made).nonzero().T
        shapes = ((*lead, n), (m, n), (m,), (*lead, m), (len(col),))
        x, w, bias, y, vals = (torch.randn(s, generator=made, dtype=torch.float64).to(device, dtype) for s in shapes)
        w, vals = w * n**-0.5, (vals * n**-0.5).to(low)
        crow = F.pad(torch.bincount(row, minlength=m).cumsum(0), (1, 0))
        crow, col = (t.to(device, torch.int64 if name == "int64" else torch.int32) for t in (crow, col))
        if name == "transposed":
            x, w, y = x.transpose(0, 1), w.T.contiguous().T, y.transpose(0, 1)
        if name == "expanded":
            x, y = x[:1].expand_as(x), y[:1].expand_as(y)
        yield name, (x, w, None if name in ("expanded", "one_entry") else bias, y, (vals, crow, col))


def _linear_samples(dtype, device):
    for name, (x, w, bias, _, sparse) in _layouts(dtype, device):
        trained = (0, 2) if bias is None else (0, 2, 5)
        yield Sample(name, (x, w, *sparse, bias), (0, 1, 2, 5) if name == "mixed" else trained)


def _add_samples(dtype, device):
    for name, (x, _, _, y, sparse) in _layouts(dtype, device):
        yield Sample(name, (y, x, *sparse), (0, 1, 2))


def _dx_samples(dtype, device):
    for name, (x, w, _, g, sparse) in _layouts(dtype, device):
        yield Sample(name, (g, w, *sparse, x.shape[-1]))
        yield Sample(name + "_without_w", (g, None, *sparse, x.shape[-1]))


def _sddmm_samples(dtype, device):
    for name, (x, _, _, g, (_, crow, col)) in _layouts(dtype, device):
        yield Sample(name, (g, x, crow, col))


def _cost(a: Tensor, b_width: int, w: Tensor | None, col: Tensor, *moved: Tensor | None) -> Cost:
    """A product of every token of `a` with the entries, and with W if there is one, into rows of b_width numbers."""
    t = math.prod(a.shape[:-1])
    held = col.numel() if w is None else w.numel()
    return Cost(2 * t * held, nbytes(a, w, col, *moved) + t * b_width * a.element_size())


# -- the ops ----------------------------------------------------------------------------------------------------------

_dx = Op(
    "sparse_linear_dx",
    "(Tensor g, Tensor? w, Tensor vals, Tensor crow, Tensor col, SymInt n) -> Tensor",
    family="sparse",
    reference=_dx_reference,
    samples=_dx_samples,
    cost=lambda g, w, vals, crow, col, n: _cost(g, n, w, col, vals, crow),
)

_sddmm = Op(
    "sddmm",
    "(Tensor dy, Tensor x, Tensor crow, Tensor col) -> Tensor",
    family="sparse",
    reference=_sddmm_reference,
    samples=_sddmm_samples,
    cost=lambda dy, x, crow, col: Cost(2 * math.prod(x.shape[:-1]) * col.numel(), nbytes(dy, x, crow, col, col)),
)


def _linear_gradient(tensors, constants, grads, needs):
    (x, w, vals, crow, col), (g,) = tensors, grads
    dx = _dx(g, w, vals, crow, col, x.shape[-1]) if needs[0] else None
    dw = as_rows(g).T @ as_rows(x) if needs[1] else None
    dvals = _sddmm(g, x, crow, col).to(vals.dtype) if needs[2] else None
    return dx, dw, dvals, None, None, as_rows(g).sum(0).to(constants[0]) if needs[5] else None


def _add_gradient(tensors, constants, grads, needs):
    (x, vals, crow, col), (g,) = tensors, grads
    dx = _dx(g, None, vals, crow, col, x.shape[-1]).to(x.dtype) if needs[1] else None
    dvals = _sddmm(g, x, crow, col).to(vals.dtype) if needs[2] else None
    return g, dx, dvals, None, None


_linear = Op(
    "sparse_linear",
    "(Tensor x, Tensor w, Tensor vals, Tensor crow, Tensor col, Tensor? bias) -> Tensor",
    family="sparse",
    reference=_linear_reference,
    samples=_linear_samples,
    cost=lambda x, w, vals, crow, col, bias: _cost(x, w.shape[0], w, col, vals, crow, bias),
    gradient=Gradient(lambda args, out: (args[:5], (None if args[5] is None else args[5].dtype,)), _linear_gradient),
    autocast=(0, 1, 5),
)

_add = Op(
    "sparse_add",
    "(Tensor y, Tensor x, Tensor vals, Tensor crow, Tensor col) -> Tensor",
    family="sparse",
    reference=_add_reference,
    samples=_add_samples,
    cost=lambda y, x, vals, crow, col: _cost(x, y.shape[-1], None, col, vals, crow, y),
    gradient=Gradient(lambda args, out: (args[1:], ()), _add_gradient),
    autocast=(0, 1),
)


def _check(op: str, x: Tensor, m: int, crow: Tensor, col: Tensor, *others: Tensor | None) -> None:
    if crow.shape != (m + 1,) or col.dim() != 1:
        raise ValueError(f"{op}: crow is {tuple(crow.shape)} and col {tuple(col.shape)}; expected [{m + 1}], and [nnz]")
    if crow.dtype != col.dtype or col.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{op}: crow is {crow.dtype} and col {col.dtype}; expected both int32 or both int64")
    devices = {str(t.device) for t in (x, crow, col, *others) if t is not None}
    if len(devices) > 1:
        raise ValueError(f"{op}: its tensors are on {' and '.join(sorted(devices))}; move them to one device")


def _check_vals(op: str, vals: Tensor, col: Tensor) -> None:
    if vals.shape != col.shape:
        raise ValueError(f"{op}: vals is {tuple(vals.shape)}; expected {tuple(col.shape)}, one for each entry of col")


def sparse_linear(
    x: Tensor, w: Tensor, vals: Tensor, crow: Tensor, col: Tensor, *, bias: Tensor | None = None
) -> Tensor:
    """x (w + D)^T + bias, where D holds vals at the entries of the mask. w is not written.

    x [..., in]   w [out, in], any strides   vals [nnz]   crow [out + 1]   col [nnz]   bias [out] or None
    The mask is CSR, int32 or int64: columns ascend within each row and none occurs twice.
    dtypes: x, w and bias equal; vals theirs or wider. w + D is rounded to the dtype of w. Differentiable in x, vals,
    bias and, at the price of its dense gradient, w.
    Raises ValueError on shapes, dtypes or devices that do not fit.
    """
    if w.dim() != 2 or x.dim() == 0 or x.shape[-1] != w.shape[1]:
        raise ValueError(f"sparse_linear: w is {tuple(w.shape)}; expected [out, in] with the in of x {tuple(x.shape)}")
    if bias is not None and bias.shape != w.shape[:1]:
        raise ValueError(f"sparse_linear: bias is {tuple(bias.shape)}; expected [{w.shape[0]}], the out of w")
    _check("sparse_linear", x, w.shape[0], crow, col, w, vals, bias)
    _check_vals("sparse_linear", vals, col)
    return _linear(x, w, vals, crow, col, bias)


def _add_args(op, y, x, vals, crow, col):
    if x.dim() == 0 or y.dim() == 0 or y.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"{op}: y is {tuple(y.shape)} and x {tuple(x.shape)}; expected [..., out] and [..., in]")
    _check(op, x, y.shape[-1], crow, col, y, vals)
    _check_vals(op, vals, col)
    return y, x, vals, crow, col


def sparse_add(y: Tensor, x: Tensor, vals: Tensor, crow: Tensor, col: Tensor) -> Tensor:
    """y + x D^T, a new tensor, where D [out, in] holds vals at the entries of the mask.

    y [..., out]   x [..., in]   vals, crow, col as in sparse_linear
    y keeps its dtype. Differentiable in y, x and vals. Raises ValueError on shapes, dtypes or devices that do not fit.
    """
    return _add(*_add_args("sparse_add", y, x, vals, crow, col))


def sparse_add_(y: Tensor, x: Tensor, vals: Tensor, crow: Tensor, col: Tensor) -> Tensor:
    """`sparse_add` that may write into y, for a caller that owns y and goes on with the result alone."""
    return _add.call_(*_add_args("sparse_add_", y, x, vals, crow, col))


def sddmm(dy: Tensor, x: Tensor, crow: Tensor, col: Tensor) -> Tensor:
    """sum over tokens t of dy[t, i] x[t, j] for each entry (i, j) of the mask: the gradient of vals, fp32 [nnz].

    dy [..., out]   x [..., in]   crow [out + 1] and col [nnz] as in sparse_linear; fp64 where dy or x is.
    Sampled dense-dense matrix product. Raises ValueError on shapes, dtypes or devices that do not fit.
    """
    if x.dim() == 0 or dy.dim() == 0 or dy.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"sddmm: dy is {tuple(dy.shape)} and x {tuple(x.shape)}; expected [..., out] and [..., in]")
    _check("sddmm", x, dy.shape[-1], crow, col, dy)
    return _sddmm(dy, x, crow, col)


def sddmm_add_(dvals: Tensor, dy: Tensor, x: Tensor, crow: Tensor, col: Tensor) -> None:
    """dvals += sddmm(dy, x, crow, col), without autograd. dvals [nnz]."""
    _check_vals("sddmm_add_", dvals, col)
    with torch.no_grad():
        dvals.add_(sddmm(dy, x, crow, col))
