"""Bottleneck adapters in Triton: y = residual + c (drop(act(LN(x) wd^T + bd)) wu^T + bu) and its gradients.

Forward and backward are two thin products with something between them, and two gradients of weights:

    down     parts of x wd^T (g wu)            middle   z, a (u, c a, dgate), [M, m] numbers
    up       y = residual + c (a wu^T + bu)    wgrad    n^T u (g^T c a) and sums over rows, n = x normalised
             dx = g + LN'(u wd)                reduce   their parts; what LN makes of n^T u

LayerNorm costs no pass of its own. down multiplies (x - s) * w, s being the mean of some columns of the row, and sums
both moments of x - s on the way; fold gives S = wd w and T = wd b, by which middle moves the product to the row's mean:

    z = rstd (sum of (x - s) w wd - (mean - s) S) + T + bd

The mean of j of K numbers is at most sqrt(K / j) deviations from that of all, so nothing cancels, however large it is.
The two sums over a row that LN' needs are sums over m: u . S and u . (z - T - bd). The gradients of LN's parameters are
sums over m as well, of wd times n^T u and wd times dbd.

Sums are fp32 and a result is rounded once. What 16-bit x and weights leave between two products is rounded to 16 bits;
with fp32 weights it is not. Nothing is atomic: parts of a sum are added in a fixed order.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.triton_util import cast, dot, keep_mask, split, tile
from ..lora.lora_triton import _dropout
from ..lora.lora_triton import unavailable as unavailable

VERIFIED_ON: frozenset[str] = frozenset()  # compute capabilities with a correct run under benchmarks/results

_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
_FREE = ("M", "chunk", "splits", "threshold")  # from batch to batch
_GEMM = 256, 1 << 22  # README.md says why

# -- activations, by their place in the contract ----------------------------------------------------------------------


@triton.jit
def tanh(z):
    """(tanh(z), 1 - its square), neither by a difference of close numbers."""
    e = tl.exp(-2.0 * tl.abs(z))
    large = tl.where(z < 0, e - 1.0, 1.0 - e) / (1.0 + e)
    s = z * z
    small = z * (1 + s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835)))))
    return tl.where(s < 0.09, small, large), 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def activation(z, ACT: tl.constexpr):
    """(act(z), act'(z)) in fp32; NaN stays NaN."""
    if ACT == 0:  # relu
        return tl.where(z <= 0, 0.0, z), tl.where(z <= 0, 0.0, 1.0)
    elif ACT == 1:  # gelu
        cdf = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        return z * cdf, cdf + z * (0.3989422804014327 * tl.exp(-0.5 * z * z))
    elif ACT == 2:  # gelu_tanh
        t, slope = tanh(0.7978845608028654 * (z + 0.044715 * z * z * z))
        half = 0.5 * (1.0 + t)
        return z * half, half + z * slope * (0.3989422804014327 + 0.05351611220165558 * z * z)
    elif ACT == 3:  # silu
        s = tl.sigmoid(z)
        return z * s, s * (1.0 + z * (1.0 - s))
    elif ACT == 4:
        return tanh(z)
    elif ACT == 5:  # leaky_relu
        return tl.where(z > 0, z, 0.01 * z), tl.where(z > 0, 1.0, 0.01)
    else:
        return z, tl.full(z.shape, 1.0, tl.float32)


# -- the products -----------------------------------------------------------------------------------------------------


@triton.jit
def vector(ptr, index, mask, DEFAULT: tl.constexpr):
    """Elements of a vector in fp32, or DEFAULT each if there is none."""
    if ptr is None:
        return tl.full(index.shape, DEFAULT, tl.float32)
    else:
        return cast(tl.load(ptr + index, mask=mask, other=0.0), tl.float32)


@triton.jit
def bottleneck_fold_kernel(
    f_ptr, ln_w_ptr, ln_b_ptr, fold_ptr, C, R, stride_fr, stride_fc, width,
    BC: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """S and T of the part program_id(1), `width` columns: fold[0, part] = f w, fold[1, part] = f b."""
    ranks = tl.program_id(0) * BR + tl.arange(0, BR)
    part = tl.program_id(1)
    s = tl.zeros([BR, BC], tl.float32)
    t = tl.zeros([BR, BC], tl.float32)
    end = tl.minimum(part * width + width, C)
    for begin in range(part * width, end, BC):
        columns = begin + tl.arange(0, BC)
        mask = (ranks[:, None] < R) & (columns[None, :] < end)
        f = tl.load(f_ptr + ranks[:, None] * stride_fr + columns[None, :] * stride_fc, mask=mask, other=0.0)
        f = cast(f, tl.float32)
        s += f * vector(ln_w_ptr, columns, columns < end, 1.0)[None, :]
        t += f * vector(ln_b_ptr, columns, columns < end, 0.0)[None, :]
    at = fold_ptr + part * R + ranks
    tl.store(at, tl.sum(s, 1), mask=ranks < R)
    tl.store(at + tl.num_programs(1) * R, tl.sum(t, 1), mask=ranks < R)


@triton.jit(do_not_specialize=_FREE)
def bottleneck_down_kernel(
    u_ptr, f_ptr, ln_w_ptr, fold_ptr, bias_ptr, parts_ptr, rows_ptr, M, C, R, stride_fr, stride_fc, chunk,
    BM: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, LN: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """parts[s] = u f^T over the s-th chunk of column steps; with LN of (u - its mean there) * w.

    rows[s] is with LN that mean [M] and the sum of the squares of u less it [M], with a bias u . bias [M].
    """
    tiles_r = tl.cdiv(R, BR)  # neighbouring programs read the same u
    first_rank = tl.program_id(0) % tiles_r * BR
    part = tl.program_id(1)
    rows = tl.program_id(0) // tiles_r * BM + tl.arange(0, BM)
    ranks = first_rank + tl.arange(0, BR)
    used = rows < M
    begin, end = part * chunk, tl.minimum(part * chunk + chunk, tl.cdiv(C, BC))
    u_rows = u_ptr + rows.to(tl.int64)[:, None] * C
    f_ranks = f_ptr + ranks[None, :] * stride_fr
    acc = tl.zeros([BM, BR], tl.float32)
    first = tl.zeros([BM], tl.float32)  # moments of u - shift, or u . bias
    second = tl.zeros([BM], tl.float32)
    if LN:
        columns = begin * BC + tl.arange(0, BC)
        some = tl.load(u_rows + columns[None, :], mask=used[:, None] & (columns[None, :] < C), other=0.0)
        shift = tl.sum(cast(some, tl.float32), 1) / tl.minimum(C - begin * BC, BC).to(tl.float32)
    for step in range(begin, end):
        columns = step * BC + tl.arange(0, BC)
        inside = used[:, None] & (columns[None, :] < C)
        u = tl.load(u_rows + columns[None, :], mask=inside, other=0.0)  # [BM, BC]
        f = tl.load(
            f_ranks + columns[:, None] * stride_fc, mask=(columns[:, None] < C) & (ranks[None, :] < R), other=0.0
        )  # [BC, BR]
        if LN:
            d = tl.where(inside, cast(u, tl.float32) - shift[:, None], 0.0)
            first += tl.sum(d, 1)
            second += tl.sum(d * d, 1)
            u = d * vector(ln_w_ptr, columns, columns < C, 1.0)[None, :]
            if not EXACT:
                u = cast(u, f_ptr.dtype.element_ty)
        elif bias_ptr is not None:
            first += tl.sum(cast(u, tl.float32) * vector(bias_ptr, columns, columns < C, 0.0)[None, :], 1)
        acc = dot(u, f, acc, EXACT, u_ptr.dtype.element_ty != tl.float32)
    stored = rows < tl.where(first_rank == 0, M, 0)
    if LN:
        mean = first / tl.minimum((end - begin) * BC, C - begin * BC).to(tl.float32)
        acc -= mean[:, None] * vector(fold_ptr, part * R + ranks, ranks < R, 0.0)[None, :]
        at = rows_ptr + part.to(tl.int64) * 2 * M + rows
        tl.store(at, shift + mean, mask=stored)
        tl.store(at + M, tl.maximum(second - first * mean, 0.0), mask=stored)
    elif bias_ptr is not None:
        tl.store(rows_ptr + part.to(tl.int64) * M + rows, first, mask=stored)
    at = parts_ptr + (part.to(tl.int64) * M + rows)[:, None] * R + ranks[None, :]
    tl.store(at, acc, mask=used[:, None] & (ranks[None, :] < R))


@triton.jit(do_not_specialize=_FREE)
def bottleneck_middle_kernel(
    parts_ptr, rows_ptr, fold_ptr, bd_ptr, z_ptr, a_ptr, stats_ptr, rng_ptr, eps, threshold, keep, M, C, R, splits,
    width,
    BM: tl.constexpr, BR: tl.constexpr, ACT: tl.constexpr, LN: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """z and a = drop(act(z)) from the parts of down, of `width` columns each; with LN its stats, mean and rstd."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    used = rows < M
    if LN:
        mean = tl.load(rows_ptr + rows, mask=used, other=0.0)
        squares = tl.load(rows_ptr + M + rows, mask=used, other=0.0)
        for part in range(1, splits):
            at = rows_ptr + tl.cast(part, tl.int64) * 2 * M + rows
            before = tl.cast(part * width, tl.float32)
            own = tl.cast(tl.minimum(width, C - part * width), tl.float32)
            d = tl.load(at, mask=used, other=0.0) - mean
            mean += d * (own / (before + own))
            squares += tl.load(at + M, mask=used, other=0.0) + d * d * (before * own / (before + own))
        rstd = tl.div_rn(1.0, tl.sqrt_rn(squares / C + eps))
        tl.store(stats_ptr + rows, mean, mask=used)
        tl.store(stats_ptr + M + rows, rstd, mask=used)
    for first_rank in range(0, R, BR):
        ranks = first_rank + tl.arange(0, BR)
        there = ranks < R
        mask = used[:, None] & there[None, :]
        z = tl.zeros([BM, BR], tl.float32)
        bias = tl.zeros([BR], tl.float32)
        for part in range(splits):
            start = tl.cast(part, tl.int64) * M
            own = tl.load(parts_ptr + (start + rows)[:, None] * R + ranks[None, :], mask=mask, other=0.0)
            if LN:
                d = mean - tl.load(rows_ptr + start * 2 + rows, mask=used, other=0.0)
                own -= d[:, None] * vector(fold_ptr, part * R + ranks, there, 0.0)[None, :]
                bias += vector(fold_ptr, (splits + part) * R + ranks, there, 0.0)
            z += own
        if LN:
            z *= rstd[:, None]
        z += (bias + vector(bd_ptr, ranks, there, 0.0))[None, :]
        z = cast(z, z_ptr.dtype.element_ty)
        at = rows.to(tl.int64)[:, None] * R + ranks[None, :]
        tl.store(z_ptr + at, z, mask=mask)
        a, _ = activation(cast(z, tl.float32), ACT)
        if DROPOUT:
            a = tl.where(keep_mask(rng_ptr, rows, first_rank, threshold, BR), a * keep, 0.0)
        tl.store(a_ptr + at, cast(a, a_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_FREE)
def bottleneck_middle_backward_kernel(
    parts_ptr, rows_ptr, fold_ptr, bd_ptr, z_ptr, gate_ptr, u_ptr, a_ptr, sums_ptr, dgate_ptr, rng_ptr, scale,
    threshold, keep, M, C, R, splits,
    BM: tl.constexpr, BR: tl.constexpr, ACT: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """u and c a, c = scale * gate, from the parts of g wu and z; sums [2, M] of LN', over C, and dgate where wanted."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    used = rows < M
    c = scale * vector(gate_ptr, rows, used, 1.0)
    dgate = tl.zeros([BM], tl.float32)
    first = tl.zeros([BM], tl.float32)
    second = tl.zeros([BM], tl.float32)
    for first_rank in range(0, R, BR):
        ranks = first_rank + tl.arange(0, BR)
        there = ranks < R
        mask = used[:, None] & there[None, :]
        at = rows.to(tl.int64)[:, None] * R + ranks[None, :]
        back = tl.zeros([BM, BR], tl.float32)
        for part in range(splits):
            back += tl.load(parts_ptr + tl.cast(part, tl.int64) * M * R + at, mask=mask, other=0.0)
        z = cast(tl.load(z_ptr + at, mask=mask, other=0.0), tl.float32)
        a, slope = activation(z, ACT)
        u = back * c[:, None]
        if DROPOUT:
            kept = keep_mask(rng_ptr, rows, first_rank, threshold, BR)
            a = tl.where(kept, a * keep, 0.0)
            u = tl.where(kept, u * keep, 0.0)
            slope = tl.where(kept, slope, 0.0)
        if dgate_ptr is not None:
            dgate += tl.sum(tl.where(mask, a * back, 0.0), 1)
        u = cast(u * slope, u_ptr.dtype.element_ty)
        tl.store(u_ptr + at, u, mask=mask)
        tl.store(a_ptr + at, cast(a * c[:, None], a_ptr.dtype.element_ty), mask=mask)
        if sums_ptr is not None:
            u = tl.where(mask, cast(u, tl.float32), 0.0)
            bias = vector(fold_ptr, R + ranks, there, 0.0) + vector(bd_ptr, ranks, there, 0.0)
            first += tl.sum(u * vector(fold_ptr, ranks, there, 0.0)[None, :], 1)
            second += tl.sum(u * (z - bias[None, :]), 1)
    if sums_ptr is not None:
        tl.store(sums_ptr + rows, first / C, mask=used)
        tl.store(sums_ptr + M + rows, second / C, mask=used)
    if dgate_ptr is not None:
        if rows_ptr is not None:
            for part in range(splits):
                dgate += tl.load(rows_ptr + tl.cast(part, tl.int64) * M + rows, mask=used, other=0.0)
        tl.store(dgate_ptr + rows, dgate * scale, mask=used)


@triton.jit(do_not_specialize=_FREE)
def bottleneck_up_kernel(
    y_ptr, residual_ptr, v_ptr, f_ptr, bias_ptr, gate_ptr, x_ptr, ln_w_ptr, stats_ptr, sums_ptr, scale, M, N, R,
    stride_fr, stride_fn,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, LN: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """y = residual + scale * gate * (v f + bias); with LN residual + LN'(v f) for x instead. y may be the residual."""
    tiles_n = tl.cdiv(N, BN)
    rows = tl.program_id(0) // tiles_n * BM + tl.arange(0, BM)
    columns = tl.program_id(0) % tiles_n * BN + tl.arange(0, BN)
    used, there = rows < M, columns < N
    at = rows.to(tl.int64)[:, None] * N + columns[None, :]
    mask = used[:, None] & there[None, :]
    if residual_ptr is not None:
        y = tl.load(residual_ptr + at, mask=mask)  # asked for first: it is what takes long
    if LN:
        x = tl.load(x_ptr + at, mask=mask)
    acc = tl.zeros([BM, BN], tl.float32)
    for first_rank in range(0, R, BR):
        ranks = first_rank + tl.arange(0, BR)
        v = tl.load(
            v_ptr + rows.to(tl.int64)[:, None] * R + ranks[None, :], mask=used[:, None] & (ranks[None, :] < R),
            other=0.0,
        )  # fmt: skip  # [BM, BR]
        f = tl.load(
            f_ptr + ranks[:, None] * stride_fr + columns[None, :] * stride_fn,
            mask=(ranks[:, None] < R) & there[None, :], other=0.0,
        )  # fmt: skip  # [BR, BN]
        acc = dot(v, f, acc, EXACT)
    if LN:
        rstd = vector(stats_ptr, M + rows, used, 0.0)[:, None]
        unit = (cast(x, tl.float32) - vector(stats_ptr, rows, used, 0.0)[:, None]) * rstd
        acc *= vector(ln_w_ptr, columns, there, 1.0)[None, :]
        acc -= vector(sums_ptr, rows, used, 0.0)[:, None] + unit * vector(sums_ptr, M + rows, used, 0.0)[:, None]
        acc *= rstd
    else:
        acc += vector(bias_ptr, columns, there, 0.0)[None, :]
        acc *= scale * vector(gate_ptr, rows, used, 1.0)[:, None]
    if residual_ptr is not None:
        acc += cast(y, tl.float32)
    tl.store(y_ptr + at, cast(acc, y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_FREE)
def bottleneck_wgrad_kernel(
    u_ptr, v_ptr, stats_ptr, gate_ptr, out_ptr, u_sum_ptr, v_sum_ptr, scale, M, C, R, stride_oc, stride_or, chunk,
    BM: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, LN: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """out[s] = u^T v over the s-th chunk of row steps, u normalised if LN; and where wanted the sums over these rows of
    scale * gate * u [C] and of v [R]."""
    tiles_r = tl.cdiv(R, BR)
    first_column, first_rank = tl.program_id(0) // tiles_r * BC, tl.program_id(0) % tiles_r * BR
    columns = first_column + tl.arange(0, BC)
    ranks = first_rank + tl.arange(0, BR)
    part = tl.program_id(1)
    acc = tl.zeros([BC, BR], tl.float32)  # the long side first, as the tensor cores like it
    u_sum = tl.zeros([BM, BC], tl.float32)
    v_sum = tl.zeros([BM, BR], tl.float32)
    for step in range(part * chunk, tl.minimum(part * chunk + chunk, tl.cdiv(M, BM))):
        rows = step * BM + tl.arange(0, BM)
        used = rows < M
        at = rows.to(tl.int64)[:, None]
        u = tl.load(u_ptr + at * C + columns[None, :], mask=used[:, None] & (columns[None, :] < C), other=0.0)
        v = tl.load(v_ptr + at * R + ranks[None, :], mask=used[:, None] & (ranks[None, :] < R), other=0.0)  # [BM, BR]
        if LN:
            u = cast(u, tl.float32) - vector(stats_ptr, rows, used, 0.0)[:, None]
            u = cast(u * vector(stats_ptr, M + rows, used, 0.0)[:, None], v_ptr.dtype.element_ty)
        if u_sum_ptr is not None:
            u_sum += cast(u, tl.float32) * vector(gate_ptr, rows, used, 1.0)[:, None]
        if v_sum_ptr is not None:
            v_sum += cast(v, tl.float32)
        acc = dot(tl.trans(u), v, acc, EXACT, u_ptr.dtype.element_ty != tl.float32)  # [BC, BR]
    at = out_ptr + part.to(tl.int64) * C * R + columns[:, None] * stride_oc + ranks[None, :] * stride_or
    tl.store(at, cast(acc, out_ptr.dtype.element_ty), mask=(columns[:, None] < C) & (ranks[None, :] < R))
    if u_sum_ptr is not None:
        stored = columns < tl.where(first_rank == 0, C, 0)
        tl.store(
            u_sum_ptr + part * C + columns, cast(tl.sum(u_sum, 0) * scale, u_sum_ptr.dtype.element_ty), mask=stored
        )
    if v_sum_ptr is not None:
        stored = ranks < tl.where(first_column == 0, R, 0)
        tl.store(v_sum_ptr + part * R + ranks, cast(tl.sum(v_sum, 0), v_sum_ptr.dtype.element_ty), mask=stored)


@triton.jit
def summed(ptr, index, mask, size, splits):
    """The sum of parts of so many elements, first to last."""
    total = tl.zeros(index.shape, tl.float32)
    for part in range(splits):
        total += tl.load(ptr + tl.cast(part, tl.int64) * size + index, mask=mask, other=0.0)
    return total


@triton.jit(do_not_specialize=("splits",))
def bottleneck_reduce_kernel(
    parts_ptr, u_sum_ptr, v_sum_ptr, w_ptr, ln_w_ptr, ln_b_ptr, dw_ptr, du_sum_ptr, dv_sum_ptr, dln_w_ptr, dln_b_ptr,
    C, R, stride_oc, stride_or, stride_wr, stride_wc, splits,
    BC: tl.constexpr, BR: tl.constexpr, LN: tl.constexpr,
):  # fmt: skip
    """The sums of the parts; with LN, where they are G = n^T u: dw = G w + dbd b, dln_w = sum over m of wd G, and
    dln_b = sum over m of wd dbd. What is not wanted is None."""
    columns = tl.program_id(0) * BC + tl.arange(0, BC)
    there = columns < C
    ln_w = vector(ln_w_ptr, columns, there, 1.0)
    ln_b = vector(ln_b_ptr, columns, there, 0.0)
    dln_w = tl.zeros([BC], tl.float32)
    dln_b = tl.zeros([BC], tl.float32)
    for first_rank in range(0, R, BR):
        ranks = first_rank + tl.arange(0, BR)
        mask = (ranks[:, None] < R) & there[None, :]
        at = columns[None, :] * stride_oc + ranks[:, None] * stride_or
        total = summed(parts_ptr, at, mask, C * R, splits)  # [BR, BC]
        if v_sum_ptr is not None:
            v_sum = summed(v_sum_ptr, ranks, ranks < R, R, splits)
            if dv_sum_ptr is not None:
                stored = ranks < tl.where(tl.program_id(0) == 0, R, 0)
                tl.store(dv_sum_ptr + ranks, cast(v_sum, dv_sum_ptr.dtype.element_ty), mask=stored)
        if LN:
            w = tl.load(w_ptr + columns[None, :] * stride_wc + ranks[:, None] * stride_wr, mask=mask, other=0.0)
            w = cast(w, tl.float32)
            dln_w += tl.sum(w * total, 0)
            dln_b += tl.sum(w * v_sum[:, None], 0)
            total = total * ln_w[None, :] + v_sum[:, None] * ln_b[None, :]
        if dw_ptr is not None:
            tl.store(dw_ptr + at, cast(total, dw_ptr.dtype.element_ty), mask=mask)
    if dln_w_ptr is not None:
        tl.store(dln_w_ptr + columns, cast(dln_w, dln_w_ptr.dtype.element_ty), mask=there)
    if dln_b_ptr is not None:
        tl.store(dln_b_ptr + columns, cast(dln_b, dln_b_ptr.dtype.element_ty), mask=there)
    if du_sum_ptr is not None:
        u_sum = summed(u_sum_ptr, columns, there, C, splits)
        tl.store(du_sum_ptr + columns, cast(u_sum, du_sum_ptr.dtype.element_ty), mask=there)


# -- launching --------------------------------------------------------------------------------------------------------


def why_not(*args) -> str:
    """The reason why these kernels cannot serve the arguments of an op, or ""."""
    tensors = (a for a in args if isinstance(a, Tensor) and a.is_floating_point())
    return next((f"no kernel for {t.dtype}" for t in tensors if t.dtype not in _DTYPES), "")


def _unfit(x: Tensor, wd: Tensor, wu: Tensor) -> str:
    """Why torch's GEMMs serve this better, or ""."""
    (m, k), (most, product) = wd.shape, _GEMM
    if x.dtype == wd.dtype and (m >= most or k * m > product):
        return f"wd is [{m}, {k}]; two GEMMs should be faster from m = {most} or {product} numbers on"
    return "" if wd.numel() and wu.numel() else "the bottleneck or one of its sides has no width"


def why_not_bottleneck(x, ln_w, ln_b, wd, bd, wu, *args) -> str:
    return why_not(x, ln_w, ln_b, wd, bd, wu, *args) or _unfit(x, wd, wu)


def why_not_bottleneck_add(residual, *args) -> str:
    return why_not(residual) or why_not_bottleneck(*args)


def why_not_bottleneck_backward(g, x, ln_w, ln_b, wd, bd, wu, bu, gate, z, stats, act, scale, eps, *args) -> str:
    if z is None or (eps is not None and stats is None):
        return "z and stats are those of the reference's own recomputation"
    return why_not(g, ln_w, ln_b, bd, bu, gate, z) or why_not_bottleneck(x, None, None, wd, None, wu)


def _whole(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def _fold(f: Tensor, ln_w: Tensor | None, ln_b: Tensor | None, splits: int, width: int) -> Tensor:
    """S and T [2, splits, R] of each `width` columns of f [R, C]."""
    r, c = f.shape
    fold = torch.empty((2, splits, r), dtype=torch.float32, device=f.device)
    bc = tile(width, 64, 1024)
    bottleneck_fold_kernel[(triton.cdiv(r, 4096 // bc), splits)](
        f, ln_w, ln_b, fold, c, r, *f.stride(), width, BC=bc, BR=4096 // bc, num_warps=4
    )
    return fold


def _down(
    u: Tensor, f: Tensor, exact: bool, ln: tuple[Tensor | None, Tensor | None] | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None, int]:
    """(parts [splits, M, R] of u f^T, what rows have beside it, fold, columns of a part); f [R, C] has any strides."""
    (m, c), r = u.shape, len(f)
    bc = 64 if u.dtype == f.dtype != torch.float32 else 32
    bm, br = 128 if ln is None and m >= 1 << 14 else tile(m, 16, 64), tile(r, 16, 64)
    tiles = triton.cdiv(m, bm) * triton.cdiv(r, br)
    splits, chunk = split(triton.cdiv(c, bc), tiles)
    parts = torch.empty((splits, m, r), dtype=torch.float32, device=u.device)
    rows = None if ln is None and bias is None else parts.new_empty((splits, 1 if ln is None else 2, m))
    fold = None if ln is None else _fold(f, *ln, splits, chunk * bc)
    bottleneck_down_kernel[(tiles, splits)](
        u, f, None if ln is None else ln[0], fold, bias, parts, rows, m, c, r, *f.stride(), chunk,
        BM=bm, BC=bc, BR=br, LN=ln is not None, EXACT=exact, num_warps=8 if bm > 64 else 4, num_stages=4,
    )  # fmt: skip
    return parts, rows, fold, chunk * bc


def _up_(
    y: Tensor, residual: Tensor | None, v: Tensor, f: Tensor, bias: Tensor | None = None, gate: Tensor | None = None,
    scale: float = 1.0, x: Tensor | None = None, ln_w: Tensor | None = None, stats: Tensor | None = None,
    sums: Tensor | None = None,
) -> None:  # fmt: skip
    """y [M, N] = residual + scale * gate * (v f + bias), or with stats residual + LN'(v f); f [R, N], any strides."""
    (m, r), n = v.shape, y.shape[1]
    large = v.dtype == f.dtype != torch.float32 and m * n >= 1 << 22  # 512 programs
    most, deep = (32, 16) if y.dtype == torch.float32 else (128 if large else 64, 32)
    bm, bn, br = tile(m, 16, most), tile(n, 16, 64), tile(r, 16, deep)
    bottleneck_up_kernel[(triton.cdiv(m, bm) * triton.cdiv(n, bn),)](
        y, residual, v, f, bias, gate, x, ln_w, stats, sums, scale, m, n, r, *f.stride(),
        BM=bm, BN=bn, BR=br, LN=stats is not None, EXACT=y.dtype == torch.float32,
        num_warps=8 if bm > 64 else 4, num_stages=2,
    )  # fmt: skip


def _forward(y, residual, x, ln_w, ln_b, wd, bd, wu, bu, gate, act, scale, eps, p, rng):
    """(y, z, stats); y, which is written, may be the residual."""
    (r, k), n = wd.shape, len(wu)
    m = math.prod(x.shape[:-1])
    residual, x, ln_w, ln_b, bd, bu, gate = _whole(residual, x, ln_w, ln_b, bd, bu, gate)
    z = torch.empty((m, r), dtype=torch.promote_types(x.dtype, wd.dtype), device=x.device)
    stats = torch.empty((2, m) if eps is not None else 0, dtype=torch.float32, device=x.device)
    if y.numel():
        threshold, keep = _dropout(p)
        with torch.cuda.device_of(x):
            ln = None if eps is None else (ln_w, ln_b)
            parts, rows, fold, width = _down(x.view(m, k), wd, z.dtype == torch.float32, ln)
            a, bm = torch.empty_like(z), tile(m, 16, 32)
            bottleneck_middle_kernel[(triton.cdiv(m, bm),)](
                parts, rows, fold, bd, z, a, stats, rng, eps or 0.0, threshold, keep, m, k, r, len(parts), width,
                BM=bm, BR=tile(r, 16, 64), ACT=act, LN=ln is not None, DROPOUT=threshold > 0, num_warps=4,
            )  # fmt: skip
            _up_(y.view(m, n), residual.view(m, n), a, wu.T, bu, gate, scale)
    return y, z, stats


def _weight(
    u: Tensor, v: Tensor, strides: tuple[int, int], dw: Tensor | None, *, gate: Tensor | None = None,
    scale: float = 1.0, du_sum: Tensor | None = None, dv_sum: Tensor | None = None, stats: Tensor | None = None,
    w: Tensor | None = None, ln_w: Tensor | None = None, ln_b: Tensor | None = None, dln_w: Tensor | None = None,
    dln_b: Tensor | None = None,
) -> None:  # fmt: skip
    """Writes what is not None of dw = u^T v, by strides of u's columns and v's, and what comes with it."""
    (m, c), r = u.shape, v.shape[1]
    bm, bc, br = 32, tile(c, 16, 128 if u.dtype == v.dtype != torch.float32 else 64), tile(r, 16, 64)
    tiles = triton.cdiv(c, bc) * triton.cdiv(r, br)
    splits, chunk = split(triton.cdiv(m, bm), tiles)
    ln, out, sums = stats is not None, dw, (du_sum, dv_sum)
    if ln or dw is None or splits > 1:
        out = torch.empty((splits, c * r), dtype=torch.float32, device=u.device)
        sums = None if du_sum is None else out.new_empty(splits, c), out.new_empty(splits, r)
    bottleneck_wgrad_kernel[(tiles, splits)](
        u, v, stats, gate, out, *sums, scale, m, c, r, *strides, chunk,
        BM=bm, BC=bc, BR=br, LN=ln, EXACT=v.dtype == torch.float32,
        num_warps=8 if u.dtype == torch.float32 else 4, num_stages=4,
    )  # fmt: skip
    if out is not dw:
        wr, wc = (0, 0) if w is None else w.stride()
        bottleneck_reduce_kernel[(triton.cdiv(c, 32),)](
            out, *sums, w, ln_w, ln_b, dw, du_sum, dv_sum, dln_w, dln_b, c, r, *strides, wr, wc, splits,
            BC=32, BR=br, LN=ln, num_warps=4,
        )  # fmt: skip


# -- the ops ----------------------------------------------------------------------------------------------------------


def bottleneck(x, *args):
    return bottleneck_add(x, x, *args)


def bottleneck_add(residual, *args):
    return _forward(torch.empty_like(residual, memory_format=torch.contiguous_format), residual, *args)


def bottleneck_add_(residual, *args):
    return _forward(residual, residual, *args) if residual.is_contiguous() else bottleneck_add(residual, *args)


def bottleneck_backward(g, x, ln_w, ln_b, wd, bd, wu, bu, gate, z, stats, act, scale, eps, p, rng, own, needs):
    inputs = x, ln_w, ln_b, wd, bd, wu, bu, gate
    outs = [
        torch.zeros_like(t, memory_format=torch.contiguous_format) if need else None
        for t, need in zip(inputs, needs, strict=True)
    ]
    dx, dln_w, dln_b, dwd, dbd, dwu, dbu, dgate = outs
    m, (r, k), n = math.prod(x.shape[:-1]), wd.shape, len(wu)
    if m and any(needs):
        g, x, ln_w, ln_b, bd, bu, gate, z, stats = _whole(g, x, ln_w, ln_b, bd, bu, gate, z, stats)
        g, x = g.view(m, n), x.view(m, k)
        stats = None if eps is None else stats
        threshold, keep = _dropout(p)
        with torch.cuda.device_of(x):
            parts, rows, _, _ = _down(g, wu.T, z.dtype == torch.float32, bias=bu if needs[7] else None)
            u, a, bm = torch.empty_like(z), torch.empty_like(z), tile(m, 16, 32)
            sums = torch.empty_like(stats) if needs[0] and stats is not None else None
            fold = None if sums is None else _fold(wd, ln_w, ln_b, 1, k)
            bottleneck_middle_backward_kernel[(triton.cdiv(m, bm),)](
                parts, rows, fold, bd, z, gate, u, a, sums, dgate, rng, scale, threshold, keep, m, k, r, len(parts),
                BM=bm, BR=tile(r, 16, 64), ACT=act, DROPOUT=threshold > 0, num_warps=4,
            )  # fmt: skip
            if dx is not None:
                _up_(dx.view(m, k), g if own else None, u, wd, x=x, ln_w=ln_w, stats=stats, sums=sums)
            if any(needs[1:5]):
                _weight(
                    x, u, (1, k), dwd, dv_sum=dbd, stats=stats, w=wd, ln_w=ln_w, ln_b=ln_b, dln_w=dln_w, dln_b=dln_b
                )
            if any(needs[5:7]):
                _weight(g, a, (r, 1), dwu, gate=gate, scale=scale, du_sum=dbu)
    return tuple(x.new_empty(0) if out is None else out for out in outs)
