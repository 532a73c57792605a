"""What the CUDA launchers of kron serve, and torch's GEMMs for the rest; `ops` are those of the library or emulated.

fp32 is the GEMMs': without tensor cores the products alone take longer than Z through memory, and cuBLAS multiplies
best. What needs larger tables than a block has is refused, so that the next backend is asked.
"""

from __future__ import annotations

import torch

OPS = frozenset(("kron_linear", "kron_linear_add", "kron_linear_backward"))

_HALF = frozenset((torch.bfloat16, torch.float16))
_MOST, _MOST_FACTORS = 128, 64  # kron_most and kron_factors_most of kron.cuh


def _by_tensor_cores(x, a, y):
    return x.dtype in _HALF and a.dtype in (x.dtype, torch.float32) and y.dtype == x.dtype


def why_not_linear(x, a, b) -> str:
    most = max(a.shape[0], b.shape[0])
    if x.dtype in _HALF and most > _MOST:
        return f"a and b have up to {most} rows; the kernel takes {_MOST}"
    return ""


def why_not_backward(x, a, b) -> str:
    most = max(*a.shape, *b.shape)
    if x.dtype in _HALF and most > _MOST_FACTORS:
        return f"a and b have sides of up to {most}; the kernel takes {_MOST_FACTORS}"
    return ""


def linear(ops, y, acc, x, a, b, bias, scale):
    """y = acc + scale * x (a kron b) + bias. acc may be y, or None; bias is fp32; y, acc and x are contiguous."""
    (p, q), (r, s) = a.shape, b.shape
    if _by_tensor_cores(x, a, y):
        acc = None if acc is None else acc.view(-1, q * s)
        ops.kron_linear_cuda_.default(y.view(-1, q * s), x.view(-1, p * r), a, b, acc, bias, scale)
        return y
    x, a = _matrices(x, p, r, a.dtype), (a * scale).T
    product = a @ _times(x, b) if p * s * (r + q) <= q * r * (p + s) else _times(a @ x, b)
    product = product.view(y.shape)
    product = product if bias is None else product + bias
    return y.copy_(product if acc is None else acc + product)


def backward(ops, g, x, a, b, scale, needs):
    """(dx, da, db), empty where not needed. g and x are contiguous, nothing is empty."""
    (p, q), (r, s) = a.shape, b.shape
    dx, da, db = x.new_empty(0), a.new_empty(0), b.new_empty(0)
    if _by_tensor_cores(x, a, g):
        g2, x2 = g.view(-1, q * s), x.view(-1, p * r)
        if needs[0]:
            dx = torch.empty_like(x)
            ops.kron_linear_cuda_.default(dx.view(-1, p * r), g2, a.T, b.T, None, None, scale)
        if needs[1] or needs[2]:
            da, db = ops.kron_factors_cuda.default(g2, x2, a, b, scale, needs[1], needs[2])
        return dx, da, db
    x3, g3, scaled = _matrices(x, p, r, a.dtype), _matrices(g, q, s, a.dtype), a * scale
    v = scaled @ g3
    if needs[0]:
        dx = _times(v, b.T).view(x.shape).to(x.dtype)
    if needs[1]:
        da = torch.einsum("mik,mjk->ij", _times(x3, b), g3) * scale
    if needs[2]:
        db = x3.reshape(-1, r).T @ v.reshape(-1, s)
    return dx, da, db


def _matrices(x, rows, columns, dtype):
    return x.reshape(-1, rows, columns).to(dtype)


def _times(x, b):
    """[m, rows, k] times [k, columns] as one product"""
    return (x.reshape(-1, x.shape[2]) @ b).view(*x.shape[:2], b.shape[1])
