"""Rescaling in Triton: y = x * l, and in one pass over g and x both dx = g * l and dl = sum over rows of g * x.

Products and sums are fp32. dl is partial sums of chunks of rows, whose size the shape alone decides, added in a fixed
order; nothing is atomic.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.triton_util import cast, split, tile
from ..lora.lora_triton import unavailable as unavailable

VERIFIED_ON: frozenset[str] = frozenset()  # compute capabilities with a correct run under benchmarks/results

_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))


@triton.jit(do_not_specialize=("M",))
def rescale_kernel(x_ptr, l_ptr, y_ptr, M, N, BM: tl.constexpr, BN: tl.constexpr):
    """A tile [BM, BN] of y = x * l, which may be x."""
    tiles = tl.cdiv(N, BN)
    rows = tl.program_id(0) // tiles * BM + tl.arange(0, BM)
    columns = tl.program_id(0) % tiles * BN + tl.arange(0, BN)
    l = cast(tl.load(l_ptr + columns, mask=columns < N, other=0.0), tl.float32)
    at = rows.to(tl.int64)[:, None] * N + columns[None, :]
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    x = cast(tl.load(x_ptr + at, mask=mask, other=0.0), tl.float32)
    tl.store(y_ptr + at, cast(x * l[None, :], y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=("M", "chunk"))
def rescale_backward_kernel(
    g_ptr, x_ptr, l_ptr, dx_ptr, part_ptr, M, N, chunk, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """dx, unless it is None, and the part of dl that `chunk` times BM rows of BN columns make."""
    tiles = tl.cdiv(N, BN)
    part = tl.program_id(0) // tiles
    columns = tl.program_id(0) % tiles * BN + tl.arange(0, BN)
    l = cast(tl.load(l_ptr + columns, mask=columns < N, other=0.0), tl.float32)
    total = tl.zeros([BM, BN], tl.float32)
    for step in range(part * chunk, tl.minimum(part * chunk + chunk, tl.cdiv(M, BM))):
        rows = step * BM + tl.arange(0, BM)
        at = rows.to(tl.int64)[:, None] * N + columns[None, :]
        mask = (rows < M)[:, None] & (columns < N)[None, :]
        g = cast(tl.load(g_ptr + at, mask=mask, other=0.0), tl.float32)
        total += g * cast(tl.load(x_ptr + at, mask=mask, other=0.0), tl.float32)
        if dx_ptr is not None:
            tl.store(dx_ptr + at, cast(g * l[None, :], dx_ptr.dtype.element_ty), mask=mask)
    tl.store(part_ptr + part.to(tl.int64) * N + columns, tl.sum(total, 0), mask=columns < N)


# -- launches ---------------------------------------------------------------------------------------------------------


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1] if x.numel() else 0


def _into(y: Tensor, x: Tensor, l: Tensor) -> Tensor:
    """y = x * l, both contiguous."""
    m, n = _rows(x), x.shape[-1]
    if m:
        bn = tile(n, 16, 512)
        bm = tile(m, 1, 4096 // bn)
        with torch.cuda.device_of(x):
            grid = (triton.cdiv(m, bm) * triton.cdiv(n, bn),)
            rescale_kernel[grid](x, l.contiguous(), y, m, n, BM=bm, BN=bn, num_warps=4)
    return y


def rescale(x, l):
    x = x.contiguous()
    return _into(torch.empty_like(x), x, l)


def rescale_(x, l):
    return _into(x, x, l) if x.is_contiguous() else x.copy_(rescale(x, l))


def rescale_backward(g, x, l, needs):
    need_dx, need_dl = needs
    g, x, l = g.contiguous(), x.contiguous(), l.contiguous()
    dx = torch.empty_like(x) if need_dx else None
    if not need_dl:
        return x.new_empty(0) if dx is None else _into(dx, g, l), l.new_empty(0)
    m, n = _rows(x), x.shape[-1]
    bn = tile(n, 16, 256)
    bm = tile(m, 1, 2048 // bn)
    tiles = triton.cdiv(n, bn)
    parts, chunk = split(triton.cdiv(m, bm), tiles, programs=1024)  # memory binds: all SMs read
    partial = torch.empty((parts, n), dtype=torch.float32, device=x.device)
    if n:
        with torch.cuda.device_of(x):
            rescale_backward_kernel[(parts * tiles,)](
                g, x, l, dx, partial, m, n, chunk, BM=bm, BN=bn, num_warps=4, num_stages=3
            )
    dl = (partial[0] if parts == 1 else partial.sum(0)).to(l.dtype)
    return x.new_empty(0) if dx is None else dx, dl


# -- refusals ---------------------------------------------------------------------------------------------------------


def why_not_rescale(x, l) -> str:
    return next((f"no kernel for {t.dtype}" for t in (x, l) if t.dtype not in _DTYPES), "")


def why_not_rescale_backward(g, x, l, needs) -> str:
    return why_not_rescale(x, l) or why_not_rescale(g, l)
