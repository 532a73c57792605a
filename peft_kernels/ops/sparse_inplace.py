"""Writing single elements of a weight: a sparse delta added or stored, and values exchanged bit by bit.

    scatter:  w.flat[idx] = alpha vals, or w.flat[idx] + alpha vals, rounded once
    swap:     w.flat[idx], stash = stash, w.flat[idx]

idx [nnz], int32 or int64, are places in w as if it were contiguous, strictly ascending. (w + v) - v is not w in
floating point: what is to be undone exactly is swapped, not added.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._op import Cost, Op, Sample, write

# id: shape of w, number of elements
_SHAPES = {
    "odd": ((13, 17), 50),
    "vector": ((40,), 7),
    "one": ((5, 4), 1),
    "none": ((6, 3), 0),
    "all": ((3, 7), 21),
    "int64": ((9, 4, 5), 31),
    "transposed": ((12, 20), 60),
    "mixed": ((11, 8), 20),
}


def _scatter_reference(w, idx, vals, alpha, add):
    dtype = torch.promote_types(w.dtype, vals.dtype)
    flat, idx, new = w.reshape(-1), idx.long(), vals.to(dtype) * alpha
    new = flat[idx].to(dtype) + new if add else new
    return flat.index_put((idx,), new.to(w.dtype)).view(w.shape)


def _swap_reference(w, idx, stash):
    flat, idx = w.reshape(-1), idx.long()
    return flat.index_put((idx,), stash).view(w.shape), flat[idx]


def _layouts(dtype, device):
    for name, (shape, nnz) in _SHAPES.items():
        made = torch.Generator().manual_seed(nnz)
        w = torch.randn(shape, generator=made, dtype=torch.float64).to(device, dtype)
        idx = torch.randperm(w.numel(), generator=made)[:nnz].sort().values
        vals = torch.randn(nnz, generator=made, dtype=torch.float64).to(device, dtype)
        yield (
            name,
            w.T if name == "transposed" else w,
            idx.to(device, torch.int64 if name == "int64" else torch.int32),
            vals,
        )


def _scatter_samples(dtype, device):
    for name, w, idx, vals in _layouts(dtype, device):
        vals = vals.to(torch.promote_types(dtype, torch.float32)) if name == "mixed" else vals
        yield Sample(name, (w, idx, vals, 1.0, True))
        yield Sample(name + "_stored", (w, idx, vals, -0.5, False))


def _swap_samples(dtype, device):
    for name, w, idx, stash in _layouts(dtype, device):
        yield Sample(name, (w, idx, stash))


def _cost(w: Tensor, idx: Tensor, vals: Tensor) -> Cost:
    return Cost(2 * idx.numel(), idx.numel() * (2 * w.element_size() + idx.element_size() + vals.element_size()))


_scatter = Op(
    "sparse_scatter",
    "(Tensor w, Tensor idx, Tensor vals, float alpha, bool add) -> Tensor",
    family="sparse",
    reference=_scatter_reference,
    samples=_scatter_samples,
    cost=lambda w, idx, vals, *_: _cost(w, idx, vals),
)

_swap = Op(
    "sparse_swap",
    "(Tensor w, Tensor idx, Tensor stash) -> (Tensor, Tensor)",
    family="sparse",
    reference=_swap_reference,
    samples=_swap_samples,
    cost=lambda w, idx, stash: _cost(w, idx, stash),
)


def _check(op: str, w: Tensor, idx: Tensor, vals: Tensor) -> None:
    if idx.dim() != 1 or vals.shape != idx.shape or idx.numel() > w.numel():
        raise ValueError(
            f"{op}: idx is {tuple(idx.shape)} and the values {tuple(vals.shape)}; "
            f"expected [nnz] both, at most the {w.numel()} of w"
        )
    if idx.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{op}: idx is {idx.dtype}; expected int32 or int64")
    if not w.device == idx.device == vals.device:
        raise ValueError(
            f"{op}: w is on {w.device}, idx on {idx.device}, the values on {vals.device}; move them to one"
        )


def sparse_scatter_(w: Tensor, idx: Tensor, vals: Tensor, *, alpha: float = 1.0, add: bool = True) -> None:
    """w.flat[idx] += alpha * vals, or with add=False w.flat[idx] = alpha * vals. No autograd.

    w any shape and strides   idx [nnz] int32 or int64, strictly ascending   vals [nnz] of w's dtype or wider
    The sum is rounded to w's dtype once. Raises ValueError on shapes, dtypes or devices that do not fit.
    """
    _check("sparse_scatter_", w, idx, vals)
    with torch.no_grad():
        write(w, _scatter.call_(w, idx, vals, float(alpha), add))


def sparse_swap_(w: Tensor, idx: Tensor, stash: Tensor) -> None:
    """Exchanges w.flat[idx] and stash, bit by bit: a second call restores both. No autograd.

    w any shape and strides   idx [nnz] int32 or int64, strictly ascending   stash [nnz] of w's dtype
    Raises ValueError on shapes, dtypes or devices that do not fit.
    """
    _check("sparse_swap_", w, idx, stash)
    if stash.dtype != w.dtype:
        raise ValueError(f"sparse_swap_: stash is {stash.dtype} and w {w.dtype}; give both the same dtype")
    with torch.no_grad():
        out, old = _swap.call_(w, idx, stash)
        write(w, out)
        write(stash, old)
