"""LoRA in Triton: y += scale * (drop(x) a^T) b^T and its gradients, for any rank and any mix of fp32, bf16 and fp16.

Forward and backward are the same three products, all bound by memory:

    shrink   t = drop(x) a^T        dt = scale * g b
    expand   y += scale * t b^T     dx += drop'(dt a)
    wgrad    da = dt^T drop(x)      db = scale * g^T t

Sums are fp32 and a result is rounded once. Nothing is atomic: a sum that is split to fill the GPU goes through partial
buffers added in a fixed order, the shrink's inside the expand that follows it. shrink and expand stay two kernels: one
would have only M / BM programs, each with two dependent sweeps, and t and dt have to reach memory anyway.
Dropout's mask is regenerated wherever it is needed; its scale multiplies sums, not x, which is never rounded again.

Of many adapters, a program takes the rows of one line of the plan, and their adapter's part of the factor. Grids follow
from shapes and r_max alone: programs of unused lines and of ranks that an adapter has not end at once. t has a place
for each slot of the plan, so its rows are contiguous; wgrad finds the lines of an adapter by binary search.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.triton_util import cast, dot, interpreting, keep_mask, split, tile
from ._compose import compose, compose_multi, compose_slices, one_by_one
from ._compose import why_not as why_not
from .plan import plan as make_plan

VERIFIED_ON: frozenset[str] = frozenset()  # compute capabilities with a correct run under benchmarks/results


def unavailable(device: str) -> str:
    """ "" if these kernels run on `device` ("cpu": the interpreter), else the reason."""
    return "" if device == "cuda" or interpreting() else "Triton runs on the CPU only with TRITON_INTERPRET=1"


# M moves from batch to batch and the others only steer masks and loops: no recompilation for their values.
_FREE = ("M", "chunk", "splits", "threshold", "adapters", "slice_index")

# -- the plan of many adapters ----------------------------------------------------------------------------------------
# SLOTS is the plan's block_m, or 0 without a plan: then a block is BM rows of x, and all have all R ranks.


@triton.jit
def block_rows(block, plan_ptr, M, BM: tl.constexpr, SLOTS: tl.constexpr):
    """(rows of x [BM], their rows in t [BM], which there are [BM]) of a block: some slots of one line of the plan."""
    if SLOTS == 0:
        rows = block * BM + tl.arange(0, BM)
        return rows, rows, rows < M
    else:
        per_line: tl.constexpr = (SLOTS + BM - 1) // BM
        line = block // per_line
        slots = block % per_line * BM + tl.arange(0, BM)
        rows = tl.load(plan_ptr + line.to(tl.int64) * (SLOTS + 1) + 1 + slots, mask=slots < SLOTS, other=-1)
        return rows, line * SLOTS + slots, rows >= 0


@triton.jit
def block_ranks(block, plan_ptr, indptr_ptr, adapters, R, BM: tl.constexpr, SLOTS: tl.constexpr):
    """(adapter, its first rank in the bank, its ranks) of a block; 0 ranks if its first slot is unused."""
    if SLOTS == 0:
        return 0, 0, R
    else:
        per_line: tl.constexpr = (SLOTS + BM - 1) // BM
        line = plan_ptr + (block // per_line).to(tl.int64) * (SLOTS + 1)
        adapter = tl.load(line)
        used = (adapter < adapters) & (tl.load(line + 1 + block % per_line * BM) >= 0)
        first = tl.load(indptr_ptr + adapter, mask=used, other=0)
        own = tl.load(indptr_ptr + adapter + 1, mask=used, other=0) - first
        return adapter, first.to(tl.int64), own.to(tl.int32)


@triton.jit
def lines_before(adapter, plan_ptr, lines, SLOTS: tl.constexpr):
    """How many lines of the plan belong to adapters of smaller numbers."""
    low = lines * 0
    high = lines
    while low < high:
        middle = (low + high) // 2
        before = tl.load(plan_ptr + middle.to(tl.int64) * (SLOTS + 1)) < adapter
        low = tl.where(before, middle + 1, low)
        high = tl.where(before, high, middle)
    return low


# -- the three products -----------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=_FREE)
def lora_shrink_kernel(
    u_ptr, f_ptr, out_ptr, rng_ptr, plan_ptr, indptr_ptr, scaling_ptr, scale, threshold, M, C, R, stride_fr, stride_fc,
    chunk, adapters, slices,
    BM: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, SLOTS: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """out[s] = scale * drop(u) f^T over the s-th chunk of column steps; f has `slices` rows for each rank."""
    tiles_r = tl.cdiv(R, BR)  # neighbouring programs read the same u, so all but the first find it in L2
    block = tl.program_id(0) // tiles_r
    first_rank = tl.program_id(0) % tiles_r * BR
    ranks = first_rank + tl.arange(0, BR)
    part = tl.program_id(1)
    adapter, first, own = block_ranks(block, plan_ptr, indptr_ptr, adapters, R, BM, SLOTS)
    if SLOTS > 0:
        first, own = first * slices, own * slices
        if first_rank >= own:
            return
        scale = scale * tl.load(scaling_ptr + adapter)
    rows, places, used = block_rows(block, plan_ptr, M, BM, SLOTS)
    u_rows = u_ptr + rows.to(tl.int64)[:, None] * C
    f_ranks = f_ptr + (first + ranks)[None, :] * stride_fr
    acc = tl.zeros([BM, BR], tl.float32)
    for step in range(part * chunk, tl.minimum(part * chunk + chunk, tl.cdiv(C, BC))):
        columns = step * BC + tl.arange(0, BC)  # a multiple of BC that the compiler can see: vector loads
        u = tl.load(u_rows + columns[None, :], mask=used[:, None] & (columns[None, :] < C), other=0.0)  # [BM, BC]
        f = tl.load(
            f_ranks + columns[:, None] * stride_fc, mask=(columns[:, None] < C) & (ranks[None, :] < own), other=0.0
        )  # [BC, BR]
        if DROPOUT:
            u = tl.where(keep_mask(rng_ptr, rows, step * BC, threshold, BC), u, tl.zeros_like(u))
        acc = dot(u, f, acc, True)  # [BM, BR]
    out = out_ptr + (part.to(tl.int64) * M + places)[:, None] * R + ranks[None, :]
    tl.store(out, acc * scale, mask=used[:, None] & (ranks[None, :] < own))


@triton.jit(do_not_specialize=_FREE)
def lora_expand_kernel(
    y_ptr, parts_ptr, f_ptr, sum_ptr, rng_ptr, plan_ptr, indptr_ptr, scale, threshold, M, N, R, stride_y, stride_fr,
    stride_fn, splits, adapters, slice_index,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, SLOTS: tl.constexpr, SUM: tl.constexpr,
    DROPOUT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """y += scale * mask * (v f), v being the sum of the shrink's parts, which the first column of programs stores.

    Of v's columns, those of the slice: an adapter's ranks for slice 0, then those for slice 1, and so on.
    """
    tiles_n = tl.cdiv(N, BN)
    block = tl.program_id(0) // tiles_n
    tile_n = tl.program_id(0) % tiles_n
    _, first, own = block_ranks(block, plan_ptr, indptr_ptr, adapters, R, BM, SLOTS)
    if own == 0:
        return
    rows, places, used = block_rows(block, plan_ptr, M, BM, SLOTS)
    columns = tile_n * BN + tl.arange(0, BN)
    y_ptrs = y_ptr + rows.to(tl.int64)[:, None] * stride_y + columns[None, :]
    y_mask = used[:, None] & (columns[None, :] < N)
    y = tl.load(y_ptrs, mask=y_mask)  # [BM, BN], asked for first: it is what takes long
    f_columns = f_ptr + columns[None, :] * stride_fn
    v_rows = places.to(tl.int64)[:, None] * R
    if SLOTS > 0:
        v_rows += slice_index * own
    stored = tl.where(tile_n == 0, own, 0)
    acc = tl.zeros([BM, BN], tl.float32)
    for rank in range(0, own, BR):
        ranks = rank + tl.arange(0, BR)
        v_offsets = v_rows + ranks[None, :]
        v_mask = used[:, None] & (ranks[None, :] < own)
        v = tl.load(parts_ptr + v_offsets, mask=v_mask, other=0.0)  # [BM, BR]
        if SUM:
            for part in range(1, splits):
                v += tl.load(parts_ptr + tl.cast(part, tl.int64) * M * R + v_offsets, mask=v_mask, other=0.0)
            tl.store(sum_ptr + v_offsets, v, mask=v_mask & (ranks[None, :] < stored))
        f = tl.load(
            f_columns + (first + ranks)[:, None] * stride_fr,
            mask=(ranks[:, None] < own) & (columns[None, :] < N), other=0.0,
        )  # fmt: skip  # [BR, BN]
        acc = dot(v, f, acc, EXACT)
    if DROPOUT:
        acc = tl.where(keep_mask(rng_ptr, rows, tile_n * BN, threshold, BN), acc, 0.0)
    tl.store(y_ptrs, cast(cast(y, tl.float32) + acc * scale, y_ptr.dtype.element_ty), mask=y_mask)


@triton.jit(do_not_specialize=_FREE)
def lora_wgrad_kernel(
    u_ptr, v_ptr, out_ptr, rng_ptr, plan_ptr, indptr_ptr, scale, threshold, M, C, R, stride_or, stride_oc, stride_os,
    chunk,
    BM: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, SLOTS: tl.constexpr, DROPOUT: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """out[s] = scale * v^T drop(u) over the s-th chunk of row steps, in either orientation, for each adapter."""
    tiles_r = tl.cdiv(R, BR)
    tiles = tiles_r * tl.cdiv(C, BC)
    first_column = tl.program_id(0) % tiles // tiles_r * BC
    first_rank = tl.program_id(0) % tiles_r * BR
    columns = first_column + tl.arange(0, BC)
    ranks = first_rank + tl.arange(0, BR)
    part = tl.program_id(1)
    begin, end = part * chunk, tl.minimum(part * chunk + chunk, tl.cdiv(M, BM))
    first, own = 0, R
    if SLOTS > 0:
        adapter = tl.program_id(0) // tiles
        first = tl.load(indptr_ptr + adapter).to(tl.int64)
        own = (tl.load(indptr_ptr + adapter + 1) - first).to(tl.int32)
        if first_rank >= own:
            return
        per_line: tl.constexpr = (SLOTS + BM - 1) // BM
        begin = tl.maximum(begin, lines_before(adapter, plan_ptr, M // SLOTS, SLOTS) * per_line)
        end = tl.minimum(part * chunk + chunk, lines_before(adapter + 1, plan_ptr, M // SLOTS, SLOTS) * per_line)
    acc = tl.zeros([BC, BR], tl.float32)  # the long side first, as the tensor cores like it
    for step in range(begin, end):
        rows, places, used = block_rows(step, plan_ptr, M, BM, SLOTS)
        u = tl.load(
            u_ptr + rows.to(tl.int64)[:, None] * C + columns[None, :], mask=used[:, None] & (columns[None, :] < C),
            other=0.0,
        )  # fmt: skip  # [BM, BC]
        v = tl.load(
            v_ptr + places.to(tl.int64)[:, None] * R + ranks[None, :], mask=used[:, None] & (ranks[None, :] < own),
            other=0.0,
        )  # fmt: skip  # [BM, BR]
        if DROPOUT:
            u = tl.where(keep_mask(rng_ptr, rows, first_column, threshold, BC), u, tl.zeros_like(u))
        acc = dot(tl.trans(u), v, acc, EXACT)  # [BC, BR]
    out = out_ptr + part.to(tl.int64) * stride_os + columns[:, None] * stride_oc + (first + ranks)[None, :] * stride_or
    out_mask = (columns[:, None] < C) & (ranks[None, :] < own)
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


class _Rows(NamedTuple):
    """Which rows of x meet which ranks of a factor: those of the plan, or all meet all."""

    plan: Tensor | None = None
    r_indptr: Tensor | None = None
    scaling: Tensor | None = None
    r_max: int = 0

    @property
    def slots(self) -> int:
        return 0 if self.plan is None else self.plan.shape[1] - 1

    @property
    def adapters(self) -> int:
        return 0 if self.scaling is None else len(self.scaling)

    def sizes(self, m: int, r: int) -> tuple[int, int]:
        """Rows and columns of t, where x has m rows and the factor r."""
        return (m, r) if self.plan is None else (len(self.plan) * self.slots, self.r_max)

    def blocks(self, m: int, bm: int) -> int:
        """How many blocks of bm rows there are."""
        return triton.cdiv(m, bm) if self.plan is None else len(self.plan) * triton.cdiv(self.slots, bm)


_ALL = _Rows()


def _shrink(
    u: Tensor, f: Tensor, scale: float, threshold: int, rng: Tensor | None, by: _Rows = _ALL, slices: int = 1
) -> Tensor:
    """The parts [splits, rows of t, ranks] of scale * drop(u) f^T; f is [r, C], any strides."""
    c = u.shape[1]
    m, r = by.sizes(len(u), len(f))
    r = r * slices if by.slots else r
    bc = 64 if u.dtype == f.dtype != torch.float32 else 32
    bm, br = tile(by.slots or m, 16, 64), tile(r, 16, 64)
    tiles = by.blocks(m, bm) * triton.cdiv(r, br)
    splits, chunk = split(triton.cdiv(c, bc), tiles)
    parts = torch.empty((splits, m, r), dtype=torch.float32, device=u.device)
    if m:
        lora_shrink_kernel[(tiles, splits)](
            u, f, parts, rng, by.plan, by.r_indptr, by.scaling, scale, threshold, m, c, r, *f.stride(), chunk,
            by.adapters, slices,
            BM=bm, BC=bc, BR=br, SLOTS=by.slots, DROPOUT=threshold > 0, num_warps=4, num_stages=4,
        )  # fmt: skip
    return parts


def _expand_(
    y: Tensor, parts: Tensor, f: Tensor, scale: float, threshold: int, rng: Tensor | None, by: _Rows = _ALL,
    slice_index: int = 0,
) -> Tensor:  # fmt: skip
    """y [M, N] += scale * mask * (v f); v, the sum of the parts, is returned. f is [r, N], any strides."""
    (splits, m, r), n = parts.shape, y.shape[1]
    bm, bn, br = tile(by.slots or m, 16, 64), tile(n, 16, 64), tile(by.r_max or r, 16, 32)
    v = parts[0] if splits == 1 else torch.empty_like(parts[0])
    if m:
        lora_expand_kernel[(by.blocks(m, bm) * triton.cdiv(n, bn),)](
            y, parts, f, v, rng, by.plan, by.r_indptr, scale, threshold, m, n, r, y.stride(0), *f.stride(), splits,
            by.adapters, slice_index,
            BM=bm, BN=bn, BR=br, SLOTS=by.slots, SUM=splits > 1, DROPOUT=threshold > 0,
            EXACT=y.dtype == torch.float32, num_warps=4, num_stages=2,
        )  # fmt: skip
    return v


def _sum(parts: Tensor) -> Tensor:
    return parts[0] if len(parts) == 1 else _reduce(parts, torch.empty_like(parts[0]))


def _wgrad(
    u: Tensor, v: Tensor, out: Tensor, scale: float, threshold: int, rng: Tensor | None, by: _Rows = _ALL
) -> None:
    """out [C, r], contiguous either way round, = scale * drop(u)^T v in out's dtype."""
    c, (m, r) = u.shape[1], v.shape
    bm, bc, br = tile(by.slots or 32, 16, 32), tile(c, 16, 64), tile(r, 16, 64)
    share, steps = max(by.adapters, 1), by.blocks(m, bm)
    tiles = triton.cdiv(c, bc) * triton.cdiv(r, br) * share
    splits, _ = split(triton.cdiv(steps, share), tiles)  # as if all adapters had as many rows
    chunk = triton.cdiv(steps, splits)
    parts = out if splits == 1 else torch.empty((splits, out.numel()), dtype=torch.float32, device=out.device)
    lora_wgrad_kernel[(tiles, splits)](
        u, v, parts, rng, by.plan, by.r_indptr, scale, threshold, m, c, r, out.stride(1), out.stride(0), out.numel(),
        chunk,
        BM=bm, BC=bc, BR=br, SLOTS=by.slots, DROPOUT=threshold > 0, EXACT=out.dtype == torch.float32, num_warps=4,
        num_stages=4,
    )  # fmt: skip
    if splits > 1:
        _reduce(parts, out)


# -- one adapter ------------------------------------------------------------------------------------------------------


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
            dt = _sum(parts) if dx is None else _expand_(dx.view(-1, k), parts, a, keep_scale, threshold, rng)
            if need_da:
                _wgrad(x, dt, da.T, keep_scale, threshold, rng)
        if need_db:
            _wgrad(g, t.view(-1, r), db, scale, 0, None)
    return da, db


# -- many adapters ----------------------------------------------------------------------------------------------------


def _rows(r_indptr: Tensor, scaling: Tensor, ids: Tensor, plan: Tensor | None, r_max: int) -> _Rows:
    """By the plan that is given, or by one for the rows that an adapter has if all have as many."""
    if plan is None:
        plan = make_plan(ids, r_indptr, tile(triton.cdiv(len(ids), max(len(scaling), 1)), 16, 64))
    return _Rows(plan, r_indptr, scaling, r_max)


def multi_add_(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    bt: Tensor,
    r_indptr: Tensor,
    scaling: Tensor,
    ids: Tensor,
    plan: Tensor | None,
    r_max: int,
    p: float,
    rng: Tensor | None,
) -> None:
    """y [..., N] += t_i bt_l in place, t_i = scaling[l] * drop(x_i) a_l^T; l = ids[i]. All contiguous."""
    if r_max == 0 or y.numel() == 0:
        return
    threshold, keep_scale = _dropout(p)
    with torch.cuda.device_of(x):
        by = _rows(r_indptr, scaling, ids, plan, r_max)
        parts = _shrink(x.view(-1, a.shape[1]), a, keep_scale, threshold, rng, by)
        _expand_(y.view(-1, bt.shape[1]), parts, bt, 1.0, 0, None, by)


def apply_(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    bt: Tensor,
    r_indptr: Tensor,
    scaling: Tensor,
    ids: Tensor,
    plan: Tensor | None,
    r_max: int,
    slice_n: list[int],
) -> None:
    """As multi_add_ without dropout, where y [..., N] is outputs of the widths slice_n, side by side.

    a [S * R, K] has for each adapter the ranks of slice 0, then those of slice 1, and so on: one shrink for all.
    """
    if r_max == 0 or y.numel() == 0:
        return
    x, y = x.view(-1, a.shape[1]), y.view(-1, bt.shape[1])
    with torch.cuda.device_of(x):
        by = _rows(r_indptr, scaling, ids, plan, r_max)
        parts = _shrink(x, a, 1.0, 0, None, by, slices=len(slice_n))
        for i, (own, f) in enumerate(zip(y.split(slice_n, 1), bt.split(slice_n, 1), strict=True)):
            _expand_(own, parts, f, 1.0, 0, None, by, slice_index=i)


def multi_backward_(
    dx: Tensor | None,
    g: Tensor,
    x: Tensor,
    a: Tensor,
    bt: Tensor,
    r_indptr: Tensor,
    scaling: Tensor,
    ids: Tensor,
    plan: Tensor | None,
    r_max: int,
    p: float,
    rng: Tensor | None,
    need_da: bool,
    need_dbt: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """dx [..., K] += drop'(dt_i a_l) in place unless dx is None, dt_i = scaling[l] * g_i bt_l^T; returns (da, dbt).

    da [R, K] = dt^T drop(x) and dbt [R, N] = t^T g over the rows of each adapter, in the factors' dtype, None if not
    needed; t is computed again. All contiguous.
    """
    da = torch.empty_like(a) if need_da else None
    dbt = torch.empty_like(bt) if need_dbt else None
    if r_max == 0:
        return da, dbt
    x, g = x.view(-1, a.shape[1]), g.view(-1, bt.shape[1])
    threshold, keep_scale = _dropout(p)
    with torch.cuda.device_of(x):
        by = _rows(r_indptr, scaling, ids, plan, r_max)
        if dx is not None or da is not None:
            parts = _shrink(g, bt, keep_scale, 0, None, by)
            dt = _sum(parts) if dx is None else _expand_(dx.view(x.shape), parts, a, 1.0, threshold, rng, by)
            if da is not None:
                _wgrad(x, dt, da.T, 1.0, threshold, rng, by)
        if dbt is not None:
            _wgrad(g, _sum(_shrink(x, a, keep_scale, threshold, rng, by)), dbt.T, 1.0, 0, None, by)
    return da, dbt


lora_add, lora_add_, lora_add_backward, lora_linear, lora_linear_backward = compose(add_, backward_)
(
    multi_lora_add,
    multi_lora_add_,
    multi_lora_add_backward,
    multi_lora_linear,
    multi_lora_linear_backward,
    lora_apply,
    lora_apply_,
) = compose_multi(multi_add_, multi_backward_, apply_)
lora_linear_slices, lora_linear_slices_backward = compose_slices(*one_by_one(add_, backward_))
