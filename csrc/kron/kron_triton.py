"""Kronecker products in Triton: y = acc + scale * x (a kron b) + bias and its gradients, and sums of products.

A row of x is a matrix X_m [p, r], of y Y_m [q, s], and Y_m = a^T X_m b: a program multiplies the X of some rows by b as
one tall matrix, turns Z = X b so that they lie side by side, and multiplies by a^T. Z never reaches memory, which binds
these products where p .. s are 16 .. 64. The other order, a first, is the same kernel with the strides of X and Y
swapped. The backward reads x and g once, where the factors fit into a program whole: V = a g is in dx and db, Z in da.
Larger ones take the first kernel for dx and one pass for each factor.

Sums are fp32. What 16-bit x and factors leave between two products is rounded to 16 bits, as two GEMMs would; with fp32
factors it is not. Gradients of factors are partial sums of programs, added in a fixed order; nothing is atomic.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.triton_util import cast, dot, tile
from ..lora.lora_triton import unavailable as unavailable
from .kron_weight_triton import kron_add as kron_add
from .kron_weight_triton import kron_add_ as kron_add_
from .kron_weight_triton import kron_sum_weight as kron_sum_weight
from .kron_weight_triton import kron_sum_weight_backward as kron_sum_weight_backward

VERIFIED_ON: frozenset[str] = frozenset()  # compute capabilities with a correct run under benchmarks/results

_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
_FREE = ("M", "chunk")  # from batch to batch
_GEMM = 256  # README.md says why
_PROGRAMS = 264  # two for each SM of an H100: a constant, for sums are cut by it

# -- x (a kron b) -----------------------------------------------------------------------------------------------------


@triton.jit
def beside(z, BM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[BM * ROWS, COLUMNS], matrices one below the other, as [ROWS, BM * COLUMNS]."""
    if BM > 1:
        z = tl.reshape(tl.permute(tl.reshape(z, [BM, ROWS, COLUMNS]), (1, 0, 2)), [ROWS, BM * COLUMNS])
    return z


@triton.jit
def below(z, BM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, BM * COLUMNS], matrices side by side, as [BM * ROWS, COLUMNS]."""
    if BM > 1:
        z = tl.reshape(tl.permute(tl.reshape(z, [ROWS, BM, COLUMNS]), (1, 0, 2)), [BM * ROWS, COLUMNS])
    return z


@triton.jit
def matrix(ptr, i, j, rows, columns, stride_i, stride_j):
    """Elements [i, j], zeros outside of [rows, columns]."""
    mask = (i[:, None] < rows) & (j[None, :] < columns)
    return tl.load(ptr + i[:, None] * stride_i + j[None, :] * stride_j, mask=mask, other=0.0)


@triton.jit
def rounded(z, factor_ptr):
    """z as an operand beside what has the factor's dtype: of its 16 bits, or as it is."""
    if factor_ptr.dtype.element_ty != tl.float32:
        z = cast(z, factor_ptr.dtype.element_ty)
    return z


@triton.jit
def upright(ptr, first, i, k, M, P, R, stride_p, stride_r, BM: tl.constexpr, BP: tl.constexpr):
    """Rows i [BP] and columns k of the matrices [P, R] of BM rows of x, one below the other."""
    at = tl.arange(0, BM * BP)
    row = first + at // BP
    under = tl.reshape(tl.broadcast_to(i[None, :], [BM, BP]), [BM * BP])
    mask = ((row < M) & (under < P))[:, None] & (k[None, :] < R)
    start = row.to(tl.int64) * (P * R) + under * stride_p
    return tl.load(ptr + start[:, None] + k[None, :] * stride_r, mask=mask, other=0.0)  # [BM * BP, len(k)]


@triton.jit
def lying(j, column, Q, S, stride_q, stride_s, BM: tl.constexpr, BS: tl.constexpr):
    """(offsets, mask) [len(j), BM * BS] of rows j and columns [BS] within each of BM matrices [Q, S], side by side."""
    across = tl.reshape(tl.broadcast_to(column[None, :], [BM, BS]), [BM * BS])
    return j[:, None] * stride_q + across[None, :] * stride_s, (j[:, None] < Q) & (across[None, :] < S)


@triton.jit
def starts(first, M, size, BM: tl.constexpr, BS: tl.constexpr):
    """(offsets, mask) [1, BM * BS] of these matrices, of `size` elements each."""
    row = first + tl.arange(0, BM * BS) // BS
    return (row.to(tl.int64) * size)[None, :], (row < M)[None, :]


@triton.jit(do_not_specialize=_FREE)
def kron_linear_kernel(
    x_ptr, a_ptr, b_ptr, acc_ptr, bias_ptr, y_ptr, scale, M, P, Q, R, S, stride_xp, stride_xr, stride_ap, stride_aq,
    stride_br, stride_bs, stride_yq, stride_ys, chunk,
    BM: tl.constexpr, BP: tl.constexpr, BQ: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr, WHOLE: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """A tile [BQ, BS] of the Y of `chunk` times BM rows. WHOLE: a and b are one tile along p and r, which stays."""
    tiles_s = tl.cdiv(S, BS)
    tiles = tiles_s * tl.cdiv(Q, BQ)  # neighbouring programs read the same x
    block = tl.program_id(0) // tiles
    tile_of = tl.program_id(0) % tiles
    j = tile_of // tiles_s * BQ + tl.arange(0, BQ)
    columns = tile_of % tiles_s * BS + tl.arange(0, BS)
    i = tl.arange(0, BP)
    k = tl.arange(0, BR)
    if WHOLE:
        a = matrix(a_ptr, j, i, Q, P, stride_aq, stride_ap)  # [BQ, BP]
        b = matrix(b_ptr, k, columns, R, S, stride_br, stride_bs)  # [BR, BS]
    for step in range(block * chunk, tl.minimum(block * chunk + chunk, tl.cdiv(M, BM))):
        first = step * BM
        total = tl.zeros([BQ, BM * BS], tl.float32)
        if WHOLE:
            x = upright(x_ptr, first, i, k, M, P, R, stride_xp, stride_xr, BM, BP)
            z = dot(x, b, tl.zeros([BM * BP, BS], tl.float32), EXACT)
            total = dot(a, rounded(beside(z, BM, BP, BS), a_ptr), total, EXACT)
        else:
            for i0 in range(0, P, BP):
                z = tl.zeros([BM * BP, BS], tl.float32)
                for k0 in range(0, R, BR):
                    x = upright(x_ptr, first, i0 + i, k0 + k, M, P, R, stride_xp, stride_xr, BM, BP)
                    b = matrix(b_ptr, k0 + k, columns, R, S, stride_br, stride_bs)
                    z = dot(x, b, z, EXACT)
                a = matrix(a_ptr, j, i0 + i, Q, P, stride_aq, stride_ap)
                total = dot(a, rounded(beside(z, BM, BP, BS), a_ptr), total, EXACT)
        total *= scale
        at, inside = lying(j, columns, Q, S, stride_yq, stride_ys, BM, BS)
        if bias_ptr is not None:
            total += cast(tl.load(bias_ptr + at, mask=inside, other=0.0), tl.float32)
        start, there = starts(first, M, Q * S, BM, BS)
        if acc_ptr is not None:
            total += cast(tl.load(acc_ptr + start + at, mask=inside & there, other=0.0), tl.float32)
        tl.store(y_ptr + start + at, cast(total, y_ptr.dtype.element_ty), mask=inside & there)


# -- its backward -----------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=_FREE)
def kron_backward_kernel(
    g_ptr, x_ptr, a_ptr, b_ptr, dx_ptr, da_ptr, db_ptr, scale, M, P, Q, R, S, stride_ap, stride_aq, stride_br,
    stride_bs, chunk,
    BM: tl.constexpr, BP: tl.constexpr, BQ: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr, EXACT: tl.constexpr,
    EXACT_FACTORS: tl.constexpr,
):  # fmt: skip
    """dx of `chunk` times BM rows, and what they add to da and db, as the program's part; what is not wanted is None.

    V = a g [p, s], dx = V b^T, db = x^T V; Z = x b, da = Z g^T.
    """
    part = tl.program_id(0)
    i = tl.arange(0, BP)
    j = tl.arange(0, BQ)
    k = tl.arange(0, BR)
    columns = tl.arange(0, BS)
    a = matrix(a_ptr, i, j, P, Q, stride_ap, stride_aq)  # [BP, BQ]
    b = matrix(b_ptr, k, columns, R, S, stride_br, stride_bs)  # [BR, BS]
    da = tl.zeros([BP, BQ], tl.float32)
    db = tl.zeros([BR, BS], tl.float32)
    for step in range(part * chunk, tl.minimum(part * chunk + chunk, tl.cdiv(M, BM))):
        first = step * BM
        at, inside = lying(j, columns, Q, S, S, 1, BM, BS)
        start, there = starts(first, M, Q * S, BM, BS)
        g = tl.load(g_ptr + start + at, mask=inside & there, other=0.0)  # [BQ, BM * BS]
        if (da_ptr is not None) or (db_ptr is not None):
            x = upright(x_ptr, first, i, k, M, P, R, R, 1, BM, BP)  # [BM * BP, BR]
        if (dx_ptr is not None) or (db_ptr is not None):
            v = dot(a, g, tl.zeros([BP, BM * BS], tl.float32), EXACT_FACTORS)
            v = rounded(below(v, BM, BP, BS), a_ptr)  # [BM * BP, BS]
            if dx_ptr is not None:
                dx = dot(v, tl.trans(b), tl.zeros([BM * BP, BR], tl.float32), EXACT) * scale
                at = tl.arange(0, BM * BP)
                row, under = first + at // BP, at % BP
                to = dx_ptr + (row.to(tl.int64) * P + under)[:, None] * R + k[None, :]
                inside = ((row < M) & (under < P))[:, None] & (k[None, :] < R)
                tl.store(to, cast(dx, dx_ptr.dtype.element_ty), mask=inside)
            if db_ptr is not None:
                db = dot(tl.trans(x), v, db, EXACT_FACTORS)
        if da_ptr is not None:
            z = dot(x, b, tl.zeros([BM * BP, BS], tl.float32), EXACT_FACTORS)
            da = dot(rounded(beside(z, BM, BP, BS), b_ptr), tl.trans(g), da, EXACT_FACTORS)
    if da_ptr is not None:
        to = da_ptr + part.to(tl.int64) * (P * Q) + i[:, None] * Q + j[None, :]
        tl.store(to, cast(da * scale, da_ptr.dtype.element_ty), mask=(i[:, None] < P) & (j[None, :] < Q))
    if db_ptr is not None:
        to = db_ptr + part.to(tl.int64) * (R * S) + k[:, None] * S + columns[None, :]
        tl.store(to, cast(db * scale, db_ptr.dtype.element_ty), mask=(k[:, None] < R) & (columns[None, :] < S))


@triton.jit(do_not_specialize=_FREE)
def kron_factor_kernel(
    g_ptr, x_ptr, b_ptr, da_ptr, scale, M, P, Q, R, S, stride_xp, stride_xr, stride_br, stride_bs, stride_gq, stride_gs,
    chunk,
    BM: tl.constexpr, BP: tl.constexpr, BQ: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """A tile [BP, BQ] of da = sum of (x b) g^T over `chunk` times BM rows, as the part of program_id(1)."""
    tiles_q = tl.cdiv(Q, BQ)
    i = tl.program_id(0) // tiles_q * BP + tl.arange(0, BP)
    j = tl.program_id(0) % tiles_q * BQ + tl.arange(0, BQ)
    part = tl.program_id(1)
    da = tl.zeros([BP, BQ], tl.float32)
    for step in range(part * chunk, tl.minimum(part * chunk + chunk, tl.cdiv(M, BM))):
        first = step * BM
        for l0 in range(0, S, BS):
            columns = l0 + tl.arange(0, BS)
            z = tl.zeros([BM * BP, BS], tl.float32)
            for k0 in range(0, R, BR):
                k = k0 + tl.arange(0, BR)
                x = upright(x_ptr, first, i, k, M, P, R, stride_xp, stride_xr, BM, BP)
                b = matrix(b_ptr, k, columns, R, S, stride_br, stride_bs)
                z = dot(x, b, z, EXACT)
            at, inside = lying(j, columns, Q, S, stride_gq, stride_gs, BM, BS)
            start, there = starts(first, M, Q * S, BM, BS)
            g = tl.load(g_ptr + start + at, mask=inside & there, other=0.0)  # [BQ, BM * BS]
            da = dot(rounded(beside(z, BM, BP, BS), b_ptr), tl.trans(g), da, EXACT)
    to = da_ptr + part.to(tl.int64) * (P * Q) + i[:, None] * Q + j[None, :]
    tl.store(to, cast(da * scale, da_ptr.dtype.element_ty), mask=(i[:, None] < P) & (j[None, :] < Q))


@triton.jit(do_not_specialize=("splits",))
def kron_reduce_kernel(parts_ptr, out_ptr, size, splits, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """out = the sum of the parts, PARTS at a time."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, splits, PARTS):
        part = start + tl.arange(0, PARTS)
        mask = (part < splits)[:, None] & (index < size)[None, :]
        own = tl.load(parts_ptr + part.to(tl.int64)[:, None] * size + index[None, :], mask=mask, other=0.0)
        total += tl.sum(own, 0)
    tl.store(out_ptr + index, cast(total, out_ptr.dtype.element_ty), mask=index < size)


# -- launching --------------------------------------------------------------------------------------------------------


def why_not(*args) -> str:
    """The reason why these kernels cannot serve the arguments of an op, or ""."""
    return next((f"no kernel for {a.dtype}" for a in args if isinstance(a, Tensor) and a.dtype not in _DTYPES), "")


def _large(x: Tensor, a: Tensor, b: Tensor) -> str:
    """Why torch's GEMMs are faster, or ""."""
    most = max(*a.shape, *b.shape)
    if x.dtype == a.dtype != torch.float32 and most > _GEMM:
        return f"a and b have sides of up to {most}; two GEMMs should be faster from {_GEMM} on"
    return ""


def why_not_kron_linear(x, a, b, bias, scale) -> str:
    return why_not(x, a, b, bias) or _large(x, a, b)


def why_not_kron_linear_add(acc, x, a, b, bias, scale) -> str:
    return why_not(acc, x, a, b, bias) or _large(x, a, b)


def why_not_kron_linear_backward(g, x, a, b, scale, needs) -> str:
    return why_not(g, x, a, b) or _large(x, a, b)


def _parts(steps: int, tiles: int) -> tuple[int, int]:
    """(programs for each tile, steps of each) for about so many programs; a constant of the shapes, as sums are."""
    chunk = max(triton.cdiv(steps * tiles, _PROGRAMS), 1)
    return max(triton.cdiv(steps, chunk), 1), chunk


def _sides(x: Tensor, factor: Tensor) -> tuple[int, int]:
    """The most that a tile has along the sum of the first product, and along other sides."""
    return (64 if x.dtype == factor.dtype else 32, 64) if x.dtype != torch.float32 else (32, 32)


def _warps(x: Tensor, factor: Tensor, size: int) -> int:
    """Twice as many where the sums of a program, or operands cut into parts, leave a thread too few registers."""
    return 4 if x.dtype == factor.dtype and size < 64 * 128 else 8


def _block(rows: int, columns: int, side: int) -> int:
    """How many matrices stand in one tile."""
    return max(side // max(rows, columns), 1)


def _linear(x, a, b, acc, bias, scale: float, y: Tensor) -> Tensor:
    """y = acc + scale * x (a kron b) + bias; x, acc, bias and y contiguous, y may be acc."""
    (p, q), (r, s) = a.shape, b.shape
    m = math.prod(x.shape[:-1])
    if y.numel() == 0:
        return y
    strides_x, strides_y = (r, 1), (s, 1)
    if q * r * (p + s) < p * s * (r + q):  # y^T = b^T x^T a takes fewer operations
        (p, q, a), (r, s, b) = (r, s, b), (p, q, a)
        strides_x, strides_y = strides_x[::-1], strides_y[::-1]
    depth, side = _sides(x, a)
    bp, bq, br, bs = tile(p, 16, side), tile(q, 16, 2 * side), tile(r, 16, depth), tile(s, 16, side)
    bm = _block(bp, bs, side)
    tiles = triton.cdiv(q, bq) * triton.cdiv(s, bs)
    blocks, chunk = _parts(triton.cdiv(m, bm), tiles)
    with torch.cuda.device_of(x):
        kron_linear_kernel[(blocks * tiles,)](
            x, a, b, acc, bias, y, scale, m, p, q, r, s, *strides_x, *a.stride(), *b.stride(), *strides_y, chunk,
            BM=bm, BP=bp, BQ=bq, BR=br, BS=bs, WHOLE=p <= bp and r <= br, EXACT=y.dtype == torch.float32,
            num_warps=_warps(x, a, bq * bs), num_stages=3,
        )  # fmt: skip
    return y


def _reduced(parts: Tensor, out: Tensor) -> Tensor:
    if parts is not out:
        size = out.numel()
        kron_reduce_kernel[(triton.cdiv(size, 32),)](parts, out, size, len(parts), PARTS=32, BLOCK=32, num_warps=4)
    return out


def _room(out: Tensor, splits: int) -> Tensor:
    """Where the programs put their parts of `out`."""
    return out if splits == 1 else torch.empty((splits, *out.shape), dtype=torch.float32, device=out.device)


def _factor(g, x, b, da: Tensor, scale: float, m: int, sizes, strides_x, strides_g) -> Tensor:
    """da [p, q] = scale * sum over m of (X b) G^T; sizes are p, q, r, s."""
    p, q, r, s = sizes
    depth, side = _sides(x, b)
    bp, bq, br, bs = tile(p, 16, side), tile(q, 16, side), tile(r, 16, depth), tile(s, 16, depth)
    bm = _block(bp, bs, side)
    tiles = triton.cdiv(p, bp) * triton.cdiv(q, bq)
    splits, chunk = _parts(triton.cdiv(m, bm), tiles)
    parts = _room(da, splits)
    kron_factor_kernel[(tiles, splits)](
        g, x, b, parts, scale, m, p, q, r, s, *strides_x, *b.stride(), *strides_g, chunk,
        BM=bm, BP=bp, BQ=bq, BR=br, BS=bs, EXACT=da.dtype == torch.float32, num_warps=_warps(x, b, bp * bq),
        num_stages=3,
    )  # fmt: skip
    return _reduced(parts, da)


# -- the ops ----------------------------------------------------------------------------------------------------------


def _whole(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def kron_linear(x, a, b, bias, scale):
    y = x.new_empty(*x.shape[:-1], a.shape[1] * b.shape[1])
    return _linear(x.contiguous(), a, b, None, _whole(bias), scale, y)


def kron_linear_add(acc, x, a, b, bias, scale):
    y = torch.empty_like(acc, memory_format=torch.contiguous_format)
    return _linear(x.contiguous(), a, b, acc.contiguous(), _whole(bias), scale, y)


def kron_linear_add_(acc, x, a, b, bias, scale):
    if not acc.is_contiguous():
        return kron_linear_add(acc, x, a, b, bias, scale)
    return _linear(x.contiguous(), a, b, acc, _whole(bias), scale, acc)


def kron_linear_backward(g, x, a, b, scale, needs):
    (p, q), (r, s) = a.shape, b.shape
    m, g, x = math.prod(x.shape[:-1]), g.contiguous(), x.contiguous()
    dx = torch.empty_like(x) if needs[0] else None
    da = torch.zeros_like(a, memory_format=torch.contiguous_format) if needs[1] else None
    db = torch.zeros_like(b, memory_format=torch.contiguous_format) if needs[2] else None
    if g.numel() and x.numel():
        with torch.cuda.device_of(x):
            if max(p, q, r, s) <= _sides(x, a)[1]:  # which one program sums whole
                _backward(g, x, a, b, scale, m, dx, da, db)
            else:
                if dx is not None:
                    _linear(g, a.T, b.T, None, None, scale, dx)
                if da is not None:
                    _factor(g, x, b, da, scale, m, (p, q, r, s), (r, 1), (s, 1))
                if db is not None:
                    _factor(g, x, a, db, scale, m, (r, s, p, q), (1, r), (1, s))
    outs = zip((dx, da, db), (x, a, b), strict=True)
    return tuple(like.new_empty(0) if out is None else out for out, like in outs)


def _backward(g, x, a, b, scale: float, m: int, dx, da, db) -> None:
    """Writes those of the gradients that are not None, of factors that fit into a program."""
    (p, q), (r, s) = a.shape, b.shape
    _, side = _sides(x, a)
    bp, bq, br, bs = (tile(size, 16, side) for size in (p, q, r, s))
    bm = _block(bp, bs, side)
    splits, chunk = _parts(triton.cdiv(m, bm), 1)
    parts = [None if out is None else _room(out, splits) for out in (da, db)]
    kron_backward_kernel[(splits,)](
        g, x, a, b, dx, *parts, scale, m, p, q, r, s, *a.stride(), *b.stride(), chunk,
        BM=bm, BP=bp, BQ=bq, BR=br, BS=bs, EXACT=x.dtype == torch.float32, EXACT_FACTORS=a.dtype == torch.float32,
        num_warps=_warps(x, a, bp * bq + br * bs), num_stages=2,
    )  # fmt: skip
    for out, own in zip((da, db), parts, strict=True):
        if out is not None and own is not None:
            _reduced(own, out)
