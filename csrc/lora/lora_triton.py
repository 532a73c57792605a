"""LoRA in Triton: y += scale * (drop(x) a^T) b^T and its gradients, for any rank and any mix of fp32, bf16 and fp16.

Forward and backward are the same three products, all bound by memory:

    shrink   t = drop(x) a^T        dt = scale * g b
    expand   y += scale * t b^T     dx += drop'(dt a)
    wgrad    da = dt^T drop(x)      db = scale * g^T t

Sums are fp32 and a result is rounded once. Nothing is atomic: a sum that is split to fill the GPU goes through partial
buffers added in a fixed order, the shrink's inside the expand that follows it. shrink and expand stay two kernels: one
would have only M / BM programs, each with two dependent sweeps, and t and dt have to reach memory anyway.
Dropout's mask is regenerated wherever it is needed; its scale multiplies sums, not x, which is never rounded again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.triton_util import cast, dot, interpreting, keep_mask, split, tile
from ._compose import compose, compose_slices, one_by_one
from ._compose import why_not as why_not

VERIFIED_ON: frozenset[str] = frozenset()  # compute capabilities with a correct run under benchmarks/results


def unavailable(device: str) -> str:
    """ "" if these kernels run on `device` ("cpu": the interpreter), else the reason."""
    return "" if device == "cuda" or interpreting() else "Triton runs on the CPU only with TRITON_INTERPRET=1"


# M moves from batch to batch and the others only steer masks and loops: no recompilation for their values.
_FREE = ("M", "chunk", "splits", "threshold")


@triton.jit(do_not_specialize=_FREE)
def lora_shrink_kernel(
    u_ptr, f_ptr, out_ptr, rng_ptr, scale, threshold, M, C, R, stride_fr, stride_fc, chunk,
    BM: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """out[s] = scale * drop(u) f^T over the s-th chunk of column steps."""
    tiles_r = tl.cdiv(R, BR)  # neighbouring programs read the same u, so all but the first find it in L2
    rows = tl.program_id(0) // tiles_r * BM + tl.arange(0, BM)
    ranks = tl.program_id(0) % tiles_r * BR + tl.arange(0, BR)
    part = tl.program_id(1)
    u_rows = u_ptr + rows.to(tl.int64)[:, None] * C
    f_ranks = f_ptr + ranks[None, :] * stride_fr
    acc = tl.zeros([BM, BR], tl.float32)
    for step in range(part * chunk, tl.minimum(part * chunk + chunk, tl.cdiv(C, BC))):
        columns = step * BC + tl.arange(0, BC)  # a multiple of BC that the compiler can see: vector loads
        u = tl.load(u_rows + columns[None, :], mask=(rows[:, None] < M) & (columns[None, :] < C), other=0.0)  # [BM, BC]
        f = tl.load(
            f_ranks + columns[:, None] * stride_fc, mask=(columns[:, None] < C) & (ranks[None, :] < R), other=0.0
        )  # [BC, BR]
        if DROPOUT:
            u = tl.where(keep_mask(rng_ptr, rows, step * BC, threshold, BC), u, tl.zeros_like(u))
        acc = dot(u, f, acc, True)  # [BM, BR]
    out = out_ptr + (part.to(tl.int64) * M + rows)[:, None] * R + ranks[None, :]
    tl.store(out, acc * scale, mask=(rows[:, None] < M) & (ranks[None, :] < R))


@triton.jit(do_not_specialize=_FREE)
def lora_expand_kernel(
    y_ptr, parts_ptr, f_ptr, sum_ptr, rng_ptr, scale, threshold, M, N, R, stride_fr, stride_fn, splits,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, SUM: tl.constexpr, DROPOUT: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """y += scale * mask * (v f), v being the sum of the shrink's parts, which the first column of programs stores."""
    tiles_n = tl.cdiv(N, BN)
    tile_n = tl.program_id(0) % tiles_n
    rows = tl.program_id(0) // tiles_n * BM + tl.arange(0, BM)
    columns = tile_n * BN + tl.arange(0, BN)
    y_ptrs = y_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :]
    y_mask = (rows[:, None] < M) & (columns[None, :] < N)
    y = tl.load(y_ptrs, mask=y_mask)  # [BM, BN], asked for first: it is what takes long
    f_columns = f_ptr + columns[None, :] * stride_fn
    acc = tl.zeros([BM, BN], tl.float32)
    for first in range(0, R, BR):
        ranks = first + tl.arange(0, BR)
        v_offsets = rows.to(tl.int64)[:, None] * R + ranks[None, :]
        v_mask = (rows[:, None] < M) & (ranks[None, :] < R)
        v = tl.load(parts_ptr + v_offsets, mask=v_mask, other=0.0)  # [BM, BR]
        if SUM:
            for part in range(1, splits):
                v += tl.load(parts_ptr + tl.cast(part, tl.int64) * M * R + v_offsets, mask=v_mask, other=0.0)
            tl.store(sum_ptr + v_offsets, v, mask=v_mask & (tile_n == 0))
        f = tl.load(
            f_columns + ranks[:, None] * stride_fr, mask=(ranks[:, None] < R) & (columns[None, :] < N), other=0.0
        )  # [BR, BN]
        acc = dot(v, f, acc, EXACT)
    if DROPOUT:
        acc = tl.where(keep_mask(rng_ptr, rows, tile_n * BN, threshold, BN), acc, 0.0)
    tl.store(y_ptrs, cast(cast(y, tl.float32) + acc * scale, y_ptr.dtype.element_ty), mask=y_mask)


@triton.jit(do_not_specialize=_FREE)
def lora_wgrad_kernel(
    u_ptr, v_ptr, out_ptr, rng_ptr, scale, threshold, M, C, R, stride_or, stride_oc, chunk,
    BM: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, DROPOUT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """out[s] = scale * v^T drop(u) over the s-th chunk of row steps, in either orientation."""
    tiles_r = tl.cdiv(R, BR)
    first_column = tl.program_id(0) // tiles_r * BC
    columns = first_column + tl.arange(0, BC)
    ranks = tl.program_id(0) % tiles_r * BR + tl.arange(0, BR)
    part = tl.program_id(1)
    acc = tl.zeros([BC, BR], tl.float32)  # the long side first, as the tensor cores like it
    for step in range(part * chunk, tl.minimum(part * chunk + chunk, tl.cdiv(M, BM))):
        rows = step * BM + tl.arange(0, BM)
        wide = rows.to(tl.int64)[:, None]
        u = tl.load(
            u_ptr + wide * C + columns[None, :], mask=(rows[:, None] < M) & (columns[None, :] < C), other=0.0
        )  # [BM, BC]
        v = tl.load(
            v_ptr + wide * R + ranks[None, :], mask=(rows[:, None] < M) & (ranks[None, :] < R), other=0.0
        )  # [BM, BR]
        if DROPOUT:
            u = tl.where(keep_mask(rng_ptr, rows, first_column, threshold, BC), u, tl.zeros_like(u))
        acc = dot(tl.trans(u), v, acc, EXACT)  # [BC, BR]
    out = out_ptr + part.to(tl.int64) * C * R + columns[:, None] * stride_oc + ranks[None, :] * stride_or
    out_mask = (columns[:, None] < C) & (ranks[None, :] < R)
    tl.store(out, cast(acc * scale, out_ptr.dtype.element_ty), mask=out_mask)


@triton.jit(do_not_specialize=("splits",))
def lora_reduce_kernel(parts_ptr, out_ptr, size, splits, BLOCK: tl.constexpr):
    """out = the sum of the parts, first to last."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(splits):
        total += tl.load(parts_ptr + tl.cast(part, tl.int64) * size + index, mask=index < size, other=0.0)
    tl.store(out_ptr + index, cast(total, out_ptr.dtype.element_ty), mask=index < size)


def _dropout(p: float) -> tuple[int, float]:
    """(threshold, scale): p in 1/65536, and the factor of what is kept (0 when nothing is)."""
    threshold = round(p * 65536)
    return threshold, 65536 / (65536 - threshold) if threshold < 65536 else 0.0


def _reduce(parts: Tensor, out: Tensor) -> Tensor:
    size = out.numel()
    lora_reduce_kernel[(triton.cdiv(size, 1024),)](parts, out, size, parts.shape[0], BLOCK=1024, num_warps=4)
    return out


def _shrink(u: Tensor, f: Tensor, scale: float, threshold: int, rng: Tensor | None) -> Tensor:
    """The parts [splits, M, r] of scale * drop(u) f^T; f is [r, C], any strides."""
    (m, c), r = u.shape, f.shape[0]
    bc = 64 if u.dtype == f.dtype != torch.float32 else 32
    bm, br = tile(m, 16, 64), tile(r, 16, 64)
    tiles = triton.cdiv(m, bm) * triton.cdiv(r, br)
    splits, chunk = split(triton.cdiv(c, bc), tiles)
    parts = torch.empty((splits, m, r), dtype=torch.float32, device=u.device)
    if m:
        lora_shrink_kernel[(tiles, splits)](
            u, f, parts, rng, scale, threshold, m, c, r, *f.stride(), chunk,
            BM=bm, BC=bc, BR=br, DROPOUT=threshold > 0, num_warps=4, num_stages=4,
        )  # fmt: skip
    return parts


def _expand_(y: Tensor, parts: Tensor, f: Tensor, scale: float, threshold: int, rng: Tensor | None) -> Tensor:
    """y [M, N] += scale * mask * (v f); v [M, r], the sum of the parts, is returned. f is [r, N], any strides."""
    (splits, m, r), n = parts.shape, y.shape[1]
    bm, bn, br = tile(m, 16, 64), tile(n, 16, 64), tile(r, 16, 32)
    v = parts[0] if splits == 1 else torch.empty_like(parts[0])
    if m:
        lora_expand_kernel[(triton.cdiv(m, bm) * triton.cdiv(n, bn),)](
            y, parts, f, v, rng, scale, threshold, m, n, r, *f.stride(), splits,
            BM=bm, BN=bn, BR=br, SUM=splits > 1, DROPOUT=threshold > 0, EXACT=y.dtype == torch.float32,
            num_warps=4, num_stages=2,
        )  # fmt: skip
    return v


def _wgrad(u: Tensor, v: Tensor, out: Tensor, scale: float, threshold: int, rng: Tensor | None) -> None:
    """out [C, r], contiguous either way round, = scale * drop(u)^T v in out's dtype."""
    (m, c), r = u.shape, v.shape[1]
    bm, bc, br = 32, tile(c, 16, 64), tile(r, 16, 64)
    tiles = triton.cdiv(c, bc) * triton.cdiv(r, br)
    splits, chunk = split(triton.cdiv(m, bm), tiles)
    parts = out if splits == 1 else torch.empty((splits, out.numel()), dtype=torch.float32, device=out.device)
    lora_wgrad_kernel[(tiles, splits)](
        u, v, parts, rng, scale, threshold, m, c, r, out.stride(1), out.stride(0), chunk,
        BM=bm, BC=bc, BR=br, DROPOUT=threshold > 0, EXACT=out.dtype == torch.float32, num_warps=4, num_stages=4,
    )  # fmt: skip
    if splits > 1:
        _reduce(parts, out)


def add_(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, p: float, rng: Tensor | None) -> Tensor:
    """y [..., N] += scale * t b^T in place; returns t = drop(x) a^T, fp32 [M, r]. All contiguous; scale is a float."""
    (r, k), n = a.shape, b.shape[0]
    x, y = x.view(-1, k), y.view(-1, n)
    if r == 0:
        return torch.empty((x.shape[0], 0), dtype=torch.float32, device=x.device)
    threshold, keep_scale = _dropout(p)
    with torch.cuda.device_of(x):
        return _expand_(y, _shrink(x, a, keep_scale, threshold, rng), b.T, scale, 0, None)


def backward_(
    dx: Tensor | None,
    g: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    t: Tensor,
    scale: float,
    p: float,
    rng: Tensor | None,
    need_da: bool,
    need_db: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """dx [..., K] += drop'(dt a) in place unless dx is None, dt = scale * g b; returns (da, db), None if not needed.

    da [r, K] = dt^T drop(x) in a's dtype, db [N, r] = scale * g^T t in b's. All contiguous; t as `add_` returned it.
    """
    (r, k), n = a.shape, b.shape[0]
    x, g = x.view(-1, k), g.view(-1, n)
    da = torch.empty_like(a) if need_da else None
    db = torch.empty_like(b) if need_db else None
    if r == 0:
        return da, db
    threshold, keep_scale = _dropout(p)
    with torch.cuda.device_of(x):
        if dx is not None or need_da:
            parts = _shrink(g, b.T, scale, 0, None)
            if dx is not None:
                dt = _expand_(dx.view(-1, k), parts, a, keep_scale, threshold, rng)
            else:
                dt = parts[0] if parts.shape[0] == 1 else _reduce(parts, torch.empty_like(parts[0]))
            if need_da:
                _wgrad(x, dt, da.T, keep_scale, threshold, rng)
        if need_db:
            _wgrad(g, t.view(-1, r), db, scale, 0, None)
    return da, db


lora_add, lora_add_, lora_add_backward, lora_linear, lora_linear_backward = compose(add_, backward_)
lora_linear_slices, lora_linear_slices_backward = compose_slices(*one_by_one(add_, backward_))
