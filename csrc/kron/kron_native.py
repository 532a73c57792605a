"""Kronecker products as torch's own products, on the CPU."""

from __future__ import annotations

import torch

from . import _cuda

VERIFIED_ON: frozenset[str] = frozenset()  # compute capabilities with a correct run under benchmarks/results

ON_CUDA = _cuda.OPS

_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
_ops = torch.ops._peft_kernels


def _of_cuda(t):
    """Whether the launchers are CUDA's: on a GPU, or in their emulation."""
    return t.is_cuda or _ops is not torch.ops._peft_kernels


def unavailable(device: str) -> str:
    return ""


def why_not(*args) -> str:
    return next(
        (f"no kernel for {a.dtype}" for a in args if isinstance(a, torch.Tensor) and a.dtype not in _DTYPES), ""
    )


def why_not_kron_linear(x, a, b, *rest) -> str:
    return why_not(x, a, b, *rest) or (_cuda.why_not_linear(x, a, b) if _of_cuda(x) else "")


def why_not_kron_linear_add(acc, *args) -> str:
    return why_not(acc) or why_not_kron_linear(*args)


def why_not_kron_linear_backward(g, x, a, b, *rest) -> str:
    return why_not(g, x, a, b) or (_cuda.why_not_backward(x, a, b) if _of_cuda(x) else "")


def _b_first(p, q, r, s):
    return p * s * (r + q) <= q * r * (p + s)


def _times(x, b):
    """[M, rows, k] times [k, columns] as one product"""
    m, rows, k = x.shape
    return (x.reshape(m * rows, k) @ b).view(m, rows, b.shape[1])


def kron_linear(x, a, b, bias, scale):
    return kron_linear_add(None, x, a, b, bias, scale)


def kron_linear_add(acc, x, a, b, bias, scale):
    if _of_cuda(x) and x.numel() and a.numel() and b.numel():
        like = x if acc is None else acc
        y = like.new_empty(*x.shape[:-1], a.shape[1] * b.shape[1])
        return _cuda.linear(_ops, y, acc, x, a, b, bias, scale)
    (p, q), (r, s) = a.shape, b.shape
    x3 = x.reshape(x.shape[:-1].numel(), p, r).to(a.dtype)
    at = (a * scale).T
    y = at @ _times(x3, b) if _b_first(p, q, r, s) else _times(at @ x3, b)
    y = y.view(*x.shape[:-1], q * s)
    y = y if bias is None else y + bias
    return y.to(x.dtype) if acc is None else (acc.contiguous() + y).to(acc.dtype)


def kron_linear_backward(g, x, a, b, scale, needs):
    (p, q), (r, s) = a.shape, b.shape
    if _of_cuda(x) and x.numel() and a.numel() and b.numel():
        return _cuda.backward(_ops, g, x, a, b, scale, needs)
    m = x.shape[:-1].numel()
    x3, g3 = x.reshape(m, p, r).to(a.dtype), g.reshape(m, q, s).to(a.dtype)
    scaled = a * scale
    v = scaled @ g3
    dx = _times(v, b.T).view(x.shape).to(x.dtype) if needs[0] else x.new_empty(0)
    da = torch.einsum("mik,mjk->ij", _times(x3, b), g3) * scale if needs[1] else a.new_empty(0)
    db = x3.reshape(m * p, r).T @ v.reshape(m * p, s) if needs[2] else b.new_empty(0)
    return dx, da, db


def kron_sum_weight(a, b, scale):
    (n, p, q), (_, r, s) = a.shape, b.shape
    h = (a * scale).reshape(n, p * q).T @ b.reshape(n, r * s)
    return h.view(p, q, r, s).transpose(1, 2).reshape(p * r, q * s)


def kron_sum_weight_backward(g, a, b, scale, needs):
    (n, p, q), (_, r, s) = a.shape, b.shape
    g = g.reshape(p, r, q, s).transpose(1, 2).reshape(p * q, r * s) * scale
    da = (b.reshape(n, r * s) @ g.T).view(a.shape) if needs[0] else a.new_empty(0)
    db = (a.reshape(n, p * q) @ g).view(b.shape) if needs[1] else b.new_empty(0)
    return da, db


def kron_add(w, w1, w2, alpha):
    return kron_add_(w.clone(memory_format=torch.contiguous_format), w1, w2, alpha)


def kron_add_(w, w1, w2, alpha):
    """A block of rows of w at a time, so that the sum is rounded once without a whole product in fp32."""
    o2, i2 = w2.shape
    first, second = (w1.float() * alpha)[:, :, None], w2.float()
    for i, row in enumerate(first):
        for k in range(0, o2):
            block = w[i * o2 + k]
            block.copy_(block.float() + (row * second[k]).view(block.shape))
    return w
