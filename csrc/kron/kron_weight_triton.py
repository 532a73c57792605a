"""Weights that are Kronecker products in Triton: sums of small ones, their gradients, and one added in place.

Both ways are bound by the large weight: it is written, or read, once for each result. An element of the sum takes two
numbers for each term, which caches have, as neighbours share them. A gradient is the product of the other factor, as
[n, elements], with the weight, as [elements of one factor, elements of the other], without that copy of it: addresses
are computed for each element.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.triton_util import cast, dot, split, tile
from ..lora.lora_triton import _reduce

_FREE = ("n",)


@triton.jit(do_not_specialize=_FREE)
def kron_sum_kernel(
    a_ptr, b_ptr, w_ptr, scale, n, P, Q, R, S, stride_an, stride_ap, stride_aq, stride_bn, stride_br, stride_bs,
    stride_wi, stride_wj,
    BI: tl.constexpr, BJ: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """A tile [BI, BJ] of w = scale * sum of a kron b, or of w += that."""
    tiles = tl.cdiv(Q * S, BJ)
    i = tl.program_id(0) // tiles * BI + tl.arange(0, BI)
    j = tl.program_id(0) % tiles * BJ + tl.arange(0, BJ)
    mask = (i < P * R)[:, None] & (j < Q * S)[None, :]
    a_at = a_ptr + (i // R)[:, None].to(tl.int64) * stride_ap + (j // S)[None, :].to(tl.int64) * stride_aq
    b_at = b_ptr + (i % R)[:, None].to(tl.int64) * stride_br + (j % S)[None, :].to(tl.int64) * stride_bs
    total = tl.zeros([BI, BJ], tl.float32)
    for term in range(n):
        a = tl.load(a_at + tl.cast(term, tl.int64) * stride_an, mask=mask, other=0.0)
        b = tl.load(b_at + tl.cast(term, tl.int64) * stride_bn, mask=mask, other=0.0)
        total += cast(a, tl.float32) * cast(b, tl.float32)
    total *= scale
    to = w_ptr + i.to(tl.int64)[:, None] * stride_wi + j.to(tl.int64)[None, :] * stride_wj
    if ADD:
        total += cast(tl.load(to, mask=mask, other=0.0), tl.float32)
    tl.store(to, cast(total, w_ptr.dtype.element_ty), mask=mask)


@triton.jit
def pair_of(index, columns, stride_row, stride_column):
    """The offset of element `index` of a matrix of so many columns."""
    return (index // columns).to(tl.int64) * stride_row + (index % columns).to(tl.int64) * stride_column


@triton.jit(do_not_specialize=(*_FREE, "chunk"))
def kron_sum_grad_kernel(
    g_ptr, f_ptr, out_ptr, scale, n, U, V, K, L, stride_gu, stride_gv, stride_gk, stride_gl, stride_fn, stride_fk,
    stride_fl, chunk,
    BN: tl.constexpr, BU: tl.constexpr, BK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """out [parts, n, U V] = scale * sum over (k, l) of f[t, k, l] g[u, v, k, l], over a chunk of their steps."""
    tiles = tl.cdiv(U * V, BU)
    term = tl.program_id(0) // tiles * BN + tl.arange(0, BN)
    own = tl.program_id(0) % tiles * BU + tl.arange(0, BU)
    part = tl.program_id(1)
    g_own = g_ptr + pair_of(own, V, stride_gu, stride_gv)
    f_terms = f_ptr + term.to(tl.int64) * stride_fn
    total = tl.zeros([BN, BU], tl.float32)
    for step in range(part * chunk, tl.minimum(part * chunk + chunk, tl.cdiv(K * L, BK))):
        at = step * BK + tl.arange(0, BK)
        there = at < K * L
        f = tl.load(
            f_terms[:, None] + pair_of(at, L, stride_fk, stride_fl)[None, :],
            mask=(term < n)[:, None] & there[None, :], other=0.0,
        )  # fmt: skip  # [BN, BK]
        g = tl.load(
            g_own[None, :] + pair_of(at, L, stride_gk, stride_gl)[:, None],
            mask=(own < U * V)[None, :] & there[:, None], other=0.0,
        )  # fmt: skip  # [BK, BU]
        total = dot(f, g, total, EXACT)
    to = out_ptr + (part.to(tl.int64) * n + term)[:, None] * (U * V) + own[None, :]
    tl.store(to, cast(total * scale, out_ptr.dtype.element_ty), mask=(term < n)[:, None] & (own < U * V)[None, :])


def _sum(a, b, w: Tensor, scale: float, add: bool) -> Tensor:
    """w [p r, q s] = or += scale * sum of a [n, p, q] kron b [n, r, s], all of any strides."""
    (n, p, q), (_, r, s) = a.shape, b.shape
    if w.numel():
        bi, bj = tile(p * r, 16, 32), tile(q * s, 16, 128)
        if w.stride(0) < w.stride(1):  # a transposed one
            bi, bj = tile(p * r, 16, 128), tile(q * s, 16, 32)
        grid = (triton.cdiv(p * r, bi) * triton.cdiv(q * s, bj),)
        with torch.cuda.device_of(w):
            kron_sum_kernel[grid](
                a, b, w, scale, n, p, q, r, s, *a.stride(), *b.stride(), *w.stride(), BI=bi, BJ=bj, ADD=add, num_warps=4
            )
    return w


def _grad(g, f, like: Tensor, scale: float, own, other) -> Tensor:
    """The gradient of one factor, with f the other: (rows, columns, strides in g) of own and of the other elements."""
    n, (u, v, *strides_own), (k, l, *strides_other) = len(f), own, other
    out = torch.zeros_like(like, memory_format=torch.contiguous_format)
    if out.numel() == 0 or f.numel() == 0:
        return out
    bn, bu, bk = tile(n, 16, 64), tile(u * v, 16, 64), tile(k * l, 16, 64)
    tiles = triton.cdiv(n, bn) * triton.cdiv(u * v, bu)
    splits, chunk = split(triton.cdiv(k * l, bk), tiles)
    parts = out if splits == 1 else torch.empty((splits, *out.shape), dtype=torch.float32, device=out.device)
    kron_sum_grad_kernel[(tiles, splits)](
        g, f, parts, scale, n, u, v, k, l, *strides_own, *strides_other, *f.stride(), chunk,
        BN=bn, BU=bu, BK=bk, EXACT=out.dtype == torch.float32, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out if splits == 1 else _reduce(parts, out)


def kron_sum_weight(a, b, scale):
    return _sum(a, b, a.new_empty(a.shape[1] * b.shape[1], a.shape[2] * b.shape[2]), scale, False)


def kron_sum_weight_backward(g, a, b, scale, needs):
    (_, p, q), (_, r, s) = a.shape, b.shape
    row, column = g.stride()
    of_a, of_b = (p, q, row * r, column * s), (r, s, row, column)
    with torch.cuda.device_of(g):
        da = _grad(g, b, a, scale, of_a, of_b) if needs[0] else a.new_empty(0)
        db = _grad(g, a, b, scale, of_b, of_a) if needs[1] else b.new_empty(0)
    return da, db


def kron_add(w, w1, w2, alpha):
    return kron_add_(w.clone(memory_format=torch.contiguous_format), w1, w2, alpha)


def kron_add_(w, w1, w2, alpha):
    return _sum(w1[None], w2[None], w, alpha, True)
