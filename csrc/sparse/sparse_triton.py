"""Sparse deltas in Triton: products with W + D, the gradient of D's values, and single elements of a weight.

W + D is made for a panel of W at a time, in a buffer that torch's GEMM then reads: a copy, in which a kernel adds the
entries. A GEMM that added them to its own tiles would find them by comparing columns, as registers have no addresses,
and do so again for every tile of tokens. For few tokens the product with W is followed by that with D alone.

The gradient is made tile by tile: tensor cores sum a tile of dy^T x in fp32, its entries are gathered from it and
stored, and the rest is dropped. Where a tile's entries begin in each row is found beforehand by binary search, once for
each call; programs of tiles without entries end at once. Of very few entries each is a dot product of its own.

Nothing is atomic; sums that are cut into parts are added in a fixed order.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..common.triton_util import cast, dot, split, tile
from ..lora.lora_triton import _reduce
from ..lora.lora_triton import unavailable as unavailable
from .sparse_select_triton import topk_compact as topk_compact
from .sparse_select_triton import topk_threshold as topk_threshold
from .sparse_select_triton import why_not_topk_compact as why_not_topk_compact
from .sparse_select_triton import why_not_topk_threshold as why_not_topk_threshold
from .sparse_train_triton import fisher_accum as fisher_accum
from .sparse_train_triton import fisher_accum_ as fisher_accum_
from .sparse_train_triton import fisher_linear as fisher_linear
from .sparse_train_triton import fisher_linear_ as fisher_linear_
from .sparse_train_triton import hard_concrete as hard_concrete
from .sparse_train_triton import hard_concrete_backward as hard_concrete_backward
from .sparse_train_triton import places, refuses, spots
from .sparse_train_triton import sparse_adamw as sparse_adamw
from .sparse_train_triton import sparse_adamw_ as sparse_adamw_
from .sparse_train_triton import why_not_fisher_accum as why_not_fisher_accum
from .sparse_train_triton import why_not_fisher_linear as why_not_fisher_linear
from .sparse_train_triton import why_not_hard_concrete as why_not_hard_concrete
from .sparse_train_triton import why_not_hard_concrete_backward as why_not_hard_concrete_backward
from .sparse_train_triton import why_not_sparse_adamw as why_not_sparse_adamw

VERIFIED_ON: frozenset[str] = frozenset()  # compute capabilities with a correct run under benchmarks/results

_PANEL_BYTES = 32 << 20  # of W + D at a time: it should stay in L2 until the GEMM has read it
_PANEL_LEAST = 1024  # rows or columns of W in a panel: fewer give the GEMM too few tiles
_EXACT = {"enable_fp_fusion": False}  # product and sum round separately, as in the reference


# -- a panel of W + D -------------------------------------------------------------------------------------------------


@triton.jit
def row_of(entries, crow_ptr, M, STEPS: tl.constexpr):
    """The rows of the entries: how many of crow[1:] are not beyond them. STEPS: the bits of M."""
    low = tl.zeros_like(entries)
    high = low + M
    for _ in range(STEPS):
        middle = low + (high - low) // 2
        searching = low < high
        before = tl.load(crow_ptr + middle + 1, mask=searching, other=0) <= entries
        low = tl.where(searching & before, middle + 1, low)
        high = tl.where(searching & ~before, middle, high)
    return tl.minimum(low, M - 1)


@triton.jit
def sparse_patch_kernel(
    panel_ptr, vals_ptr, crow_ptr, col_ptr, first_row, rows, first_column, columns, ROWS: tl.constexpr,
    LIST: tl.constexpr,
):  # fmt: skip
    """panel [rows, columns] += the entries of D in its window, each sum rounded once."""
    own = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = own < rows
    begin = tl.load(crow_ptr + first_row + own, mask=there, other=0)
    end = tl.load(crow_ptr + first_row + own + 1, mask=there, other=0)
    row = panel_ptr + own.to(tl.int64)[:, None] * columns
    for step in range(0, tl.max(end - begin), LIST):
        at = begin[:, None] + step + tl.arange(0, LIST)[None, :]
        mask = at < end[:, None]
        column = tl.load(col_ptr + at, mask=mask, other=0).to(tl.int64) - first_column
        mask = mask & (column >= 0) & (column < columns)
        delta = cast(tl.load(vals_ptr + at, mask=mask, other=0.0), tl.float32)
        total = cast(tl.load(row + column, mask=mask, other=0.0), tl.float32) + delta
        tl.store(row + column, cast(total, panel_ptr.dtype.element_ty), mask=mask)


class _Delta(NamedTuple):
    """D [m, n] as the kernels take it."""

    vals: Tensor
    crow: Tensor
    col: Tensor
    m: int
    n: int

    def few(self, tokens: int) -> bool:
        """Do so few tokens meet so few entries that a product with D alone is cheaper than a copy of W?"""
        return 4 * tokens * len(self.col) <= self.m * self.n

    def panel(self, w: Tensor | None, dtype: torch.dtype, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
        """(W + D)[rows, columns], or of D alone, contiguous."""
        (r0, r1), (c0, c1) = rows, columns
        if w is None:
            panel = torch.zeros((r1 - r0, c1 - c0), dtype=dtype, device=self.col.device)
        else:
            panel = w[r0:r1, c0:c1].clone(memory_format=torch.contiguous_format)
        if len(self.col) and panel.numel():
            share, wide = len(self.col) / self.m, 16
            sparse_patch_kernel[(triton.cdiv(r1 - r0, wide),)](
                panel, self.vals, self.crow, self.col, r0, r1 - r0, c0, c1 - c0,
                ROWS=wide, LIST=tile(math.ceil(share), 16, 64), num_warps=4,
            )  # fmt: skip
        return panel

    def panels(self, size: int, other: int, dtype: torch.dtype) -> Iterator[tuple[int, int]]:
        """[begin, end) of the panels that `size` rows are cut into, or columns, with `other` numbers each."""
        wide = max(_PANEL_LEAST, _PANEL_BYTES // max(other * dtype.itemsize, 1) // 256 * 256)
        return ((begin, min(begin + wide, size)) for begin in range(0, size, wide))


def _delta(vals: Tensor, crow: Tensor, col: Tensor, n: int) -> _Delta:
    return _Delta(vals.contiguous(), crow.contiguous(), col.contiguous(), len(crow) - 1, n)


def _tokens(x: Tensor) -> Tensor:
    """x [..., n] as [T, n]."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


# -- products ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=("T",))
def sparse_spmm_kernel(
    y_ptr, xt_ptr, vals_ptr, crow_ptr, col_ptr, T, M, ROWS: tl.constexpr, LIST: tl.constexpr, BT: tl.constexpr
):
    """y [T, M] += x D^T; xt [N, T], so that the tokens of a column are neighbours."""
    tiles_t = tl.cdiv(T, BT)  # neighbouring programs read the same entries
    rows = tl.program_id(0) // tiles_t * ROWS + tl.arange(0, ROWS)
    tokens = tl.program_id(0) % tiles_t * BT + tl.arange(0, BT)
    begin = tl.load(crow_ptr + rows, mask=rows < M, other=0)
    end = tl.load(crow_ptr + rows + 1, mask=rows < M, other=0)
    longest = tl.max(end - begin)
    if longest == 0:
        return
    acc = tl.zeros([ROWS, BT], tl.float32)
    for step in range(0, longest, LIST):
        at = begin[:, None] + step + tl.arange(0, LIST)[None, :]
        mask = at < end[:, None]
        column = tl.load(col_ptr + at, mask=mask, other=0).to(tl.int64)
        val = cast(tl.load(vals_ptr + at, mask=mask, other=0.0), tl.float32)
        x = tl.load(
            xt_ptr + column[:, :, None] * T + tokens[None, None, :],
            mask=mask[:, :, None] & (tokens < T)[None, None, :], other=0.0,
        )  # fmt: skip  # [ROWS, LIST, BT]
        acc += tl.sum(cast(x, tl.float32) * val[:, :, None], axis=1)
    out = y_ptr + tokens.to(tl.int64)[None, :] * M + rows[:, None]
    mask = (rows < M)[:, None] & (tokens < T)[None, :]
    y = cast(tl.load(out, mask=mask, other=0.0), tl.float32) + acc
    tl.store(out, cast(y, y_ptr.dtype.element_ty), mask=mask)


def _spmm_(y: Tensor, x: Tensor, delta: _Delta) -> Tensor:
    """y [T, m] += x D^T, contiguous; x [T, n]."""
    t = len(x)
    if y.numel() and len(delta.col):
        rows, bt = 16, tile(t, 1, 64)
        sparse_spmm_kernel[(triton.cdiv(delta.m, rows) * triton.cdiv(t, bt),)](
            y, x.T.contiguous(), delta.vals, delta.crow, delta.col, t, delta.m,
            ROWS=rows, LIST=4 if bt > 8 else 16, BT=bt, num_warps=4,
        )  # fmt: skip
    return y


def sparse_linear(x, w, vals, crow, col, bias):
    (m, n), flat, delta = w.shape, _tokens(x), _delta(vals, crow, col, w.shape[1])
    with torch.cuda.device_of(x):
        if delta.few(len(flat)):
            return _spmm_(F.linear(flat, w, bias).contiguous(), flat, delta).view(*x.shape[:-1], m)
        y = torch.empty((len(flat), m), dtype=x.dtype, device=x.device)
        for begin, end in delta.panels(m, n, w.dtype):
            panel = delta.panel(w, w.dtype, (begin, end), (0, n)).T
            if bias is None:
                torch.mm(flat, panel, out=y[:, begin:end])
            else:
                torch.addmm(bias[begin:end], flat, panel, out=y[:, begin:end])
    return y.view(*x.shape[:-1], m)


def sparse_linear_dx(g, w, vals, crow, col, n):
    flat, delta = _tokens(g), _delta(vals, crow, col, n)
    dx = torch.empty((len(flat), n), dtype=g.dtype, device=g.device)
    with torch.cuda.device_of(g):
        for begin, end in delta.panels(n, delta.m, g.dtype):
            torch.mm(flat, delta.panel(w, g.dtype, (0, delta.m), (begin, end)), out=dx[:, begin:end])
    return dx.view(*g.shape[:-1], n)


def sparse_add(y, x, vals, crow, col):
    return sparse_add_(y.clone(memory_format=torch.contiguous_format), x, vals, crow, col)


def sparse_add_(y, x, vals, crow, col):
    if not y.is_contiguous():
        return sparse_add(y, x, vals, crow, col)
    out, flat, delta = y.view(math.prod(y.shape[:-1]), y.shape[-1]), _tokens(x), _delta(vals, crow, col, x.shape[-1])
    with torch.cuda.device_of(y):
        if delta.few(len(flat)) or x.dtype != y.dtype:
            _spmm_(out, flat, delta)
        else:
            for begin, end in delta.panels(delta.m, delta.n, x.dtype):
                panel = delta.panel(None, x.dtype, (begin, end), (0, delta.n))
                out[:, begin:end].addmm_(flat, panel.T)
    return y


# -- the gradient of the values ---------------------------------------------------------------------------------------


@triton.jit
def sparse_starts_kernel(
    starts_ptr, crow_ptr, col_ptr, M, tiles, WIDTH: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """starts [tiles + 1, M]: the first entry of each row that is not left of the tile. STEPS: the bits of N."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[None, :]
    number = tl.program_id(1) * TILES + tl.arange(0, TILES)[:, None]
    there = (rows < M) & (number <= tiles)
    low = tl.load(crow_ptr + rows + number * 0, mask=there, other=0)
    high = tl.load(crow_ptr + rows + number * 0 + 1, mask=there, other=0)
    for _ in range(STEPS):
        middle = low + (high - low) // 2
        searching = low < high
        before = tl.load(col_ptr + middle, mask=searching, other=0) < number * WIDTH
        low = tl.where(searching & before, middle + 1, low)
        high = tl.where(searching & ~before, middle, high)
    tl.store(starts_ptr + number.to(tl.int64) * M + rows, low, mask=there)


@triton.jit(do_not_specialize=("T", "chunk"))
def sparse_sddmm_kernel(
    dy_ptr, x_ptr, out_ptr, starts_ptr, col_ptr, T, M, N, nnz, chunk,
    BT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    """out[s] [nnz] = the entries in a tile of dy^T x, over the s-th chunk of token steps; LIST of each row at once."""
    tiles_m = tl.cdiv(M, BM)  # neighbouring programs read the same columns of x, so all but the first find them in L2
    rows = tl.program_id(0) % tiles_m * BM + tl.arange(0, BM)
    number = tl.program_id(0) // tiles_m
    columns = number * BN + tl.arange(0, BN)
    part = tl.program_id(1)
    start = starts_ptr + number.to(tl.int64) * M + rows
    begin = tl.load(start, mask=rows < M, other=0)
    end = tl.load(start + M, mask=rows < M, other=0)
    longest = tl.max(end - begin)
    if longest == 0:
        return
    acc = tl.zeros([BM, BN], tl.float32)
    for step in range(part * chunk, tl.minimum(part * chunk + chunk, tl.cdiv(T, BT))):
        tokens = step * BT + tl.arange(0, BT)
        dy = tl.load(
            dy_ptr + tokens.to(tl.int64)[:, None] * M + rows[None, :],
            mask=(tokens[:, None] < T) & (rows[None, :] < M), other=0.0,
        )  # fmt: skip  # [BT, BM]
        x = tl.load(
            x_ptr + tokens.to(tl.int64)[:, None] * N + columns[None, :],
            mask=(tokens[:, None] < T) & (columns[None, :] < N), other=0.0,
        )  # fmt: skip  # [BT, BN]
        acc = dot(tl.trans(dy), x, acc, True)
    out_ptr += part.to(tl.int64) * nnz
    for first in range(0, longest, LIST):
        at = begin[:, None] + first + tl.arange(0, LIST)[None, :]
        mask = at < end[:, None]
        column = tl.load(col_ptr + at, mask=mask, other=0) - number * BN
        tl.store(out_ptr + at, tl.gather(acc, tl.where(mask, column, 0).to(tl.int32), 1), mask=mask)


@triton.jit(do_not_specialize=("T",))
def sparse_dots_kernel(
    dyt_ptr, xt_ptr, out_ptr, crow_ptr, col_ptr, T, M, nnz, STEPS: tl.constexpr, ENTRIES: tl.constexpr,
    BT: tl.constexpr,
):  # fmt: skip
    """out [nnz] = the dot products of rows of dyt [M, T] and xt [N, T]."""
    entries = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    there = entries < nnz
    row = row_of(entries, crow_ptr, M, STEPS)
    column = tl.load(col_ptr + entries, mask=there, other=0).to(tl.int64)
    acc = tl.zeros([ENTRIES, BT], tl.float32)
    for step in range(0, T, BT):
        tokens = step + tl.arange(0, BT)
        mask = there[:, None] & (tokens < T)[None, :]
        dy = cast(tl.load(dyt_ptr + row[:, None] * T + tokens[None, :], mask=mask, other=0.0), tl.float32)
        acc += dy * cast(tl.load(xt_ptr + column[:, None] * T + tokens[None, :], mask=mask, other=0.0), tl.float32)
    tl.store(out_ptr + entries, tl.sum(acc, axis=1), mask=there)


def sddmm(dy, x, crow, col):
    g, x, crow, col = _tokens(dy), _tokens(x), crow.contiguous(), col.contiguous()
    (t, m), n, nnz = g.shape, x.shape[1], len(col)
    out = torch.empty(nnz, dtype=torch.float32, device=x.device)
    if nnz == 0:
        return out
    full = torch.float32 in (x.dtype, g.dtype)  # a tile costs more there, as tensor cores do not serve it
    with torch.cuda.device_of(x):
        if nnz * (64 if full else 512) <= m * n:
            wide, bt = 16, tile(t, 16, 128)
            sparse_dots_kernel[(triton.cdiv(nnz, wide),)](
                g.T.contiguous(), x.T.contiguous(), out, crow, col, t, m, nnz,
                STEPS=m.bit_length(), ENTRIES=wide, BT=bt, num_warps=4,
            )  # fmt: skip
            return out
        g, x = g.contiguous(), x.contiguous()
        bt, bm, bn = 32 if full else 64, tile(m, 16, 128), tile(n, 16, 128)
        tiles_m, tiles_n = triton.cdiv(m, bm), triton.cdiv(n, bn)
        starts = torch.empty((tiles_n + 1, m), dtype=crow.dtype, device=x.device)
        high = tile(tiles_n + 1, 1, 16)
        sparse_starts_kernel[(triton.cdiv(m, 64), triton.cdiv(tiles_n + 1, high))](
            starts, crow, col, m, tiles_n, WIDTH=bn, ROWS=64, TILES=high, STEPS=n.bit_length(), num_warps=4
        )
        splits, chunk = split(triton.cdiv(t, bt), tiles_m * tiles_n)
        sums = out if splits == 1 else torch.empty((splits, nnz), dtype=torch.float32, device=x.device)
        sparse_sddmm_kernel[(tiles_m * tiles_n, splits)](
            g, x, sums, starts, col, t, m, n, nnz, chunk,
            BT=bt, BM=bm, BN=bn, LIST=tile(triton.cdiv(2 * nnz, m * tiles_n), 8, 32),
            num_warps=8 if bm * bn > 8192 else 4, num_stages=3,
        )  # fmt: skip
        return out if splits == 1 else _reduce(sums, out)


# -- single elements --------------------------------------------------------------------------------------------------


@triton.jit
def sparse_scatter_kernel(
    w_ptr, idx_ptr, vals_ptr, n, numel, columns, stride_r, stride_c, alpha, BLOCK: tl.constexpr, ADD: tl.constexpr
):
    """w[idx] = alpha * vals, or w[idx] + alpha * vals."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place, mask = spots(idx_ptr, at, n, numel, columns, stride_r, stride_c)
    new = cast(tl.load(vals_ptr + at, mask=mask, other=0.0), tl.float32) * alpha
    if ADD:
        new = cast(tl.load(w_ptr + place, mask=mask, other=0.0), tl.float32) + new
    tl.store(w_ptr + place, cast(new, w_ptr.dtype.element_ty), mask=mask)


@triton.jit
def sparse_swap_kernel(w_ptr, idx_ptr, stash_ptr, old_ptr, n, numel, columns, stride_r, stride_c, BLOCK: tl.constexpr):
    """old, w[idx] = w[idx], stash, of any bits."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place, mask = spots(idx_ptr, at, n, numel, columns, stride_r, stride_c)
    old = tl.load(w_ptr + place, mask=mask, other=0)
    tl.store(w_ptr + place, tl.load(stash_ptr + at, mask=mask, other=0), mask=mask)
    tl.store(old_ptr + at, old, mask=mask)


def sparse_scatter(w, idx, vals, alpha, add):
    return sparse_scatter_(w.clone(memory_format=torch.contiguous_format), idx, vals, alpha, add)


def sparse_scatter_(w, idx, vals, alpha, add):
    at, n, block = places(w), len(idx), 512
    if at is None:
        return sparse_scatter(w, idx, vals, alpha, add)
    if n:
        with torch.cuda.device_of(w):
            sparse_scatter_kernel[(triton.cdiv(n, block),)](
                w, idx.contiguous(), vals.contiguous(), n, w.numel(), *at, alpha, BLOCK=block, ADD=add, num_warps=4,
                **_EXACT,
            )  # fmt: skip
    return w


def sparse_swap(w, idx, stash):
    return sparse_swap_(w.clone(memory_format=torch.contiguous_format), idx, stash)


def sparse_swap_(w, idx, stash):
    at, n, block = places(w), len(idx), 512
    if at is None:
        return sparse_swap(w, idx, stash)
    bits = torch.int32 if w.dtype == torch.float32 else torch.int16
    old = torch.empty(n, dtype=w.dtype, device=w.device)
    if n:
        with torch.cuda.device_of(w):
            sparse_swap_kernel[(triton.cdiv(n, block),)](
                w.view(bits), idx.contiguous(), stash.contiguous().view(bits), old.view(bits), n, w.numel(), *at,
                BLOCK=block, num_warps=4,
            )  # fmt: skip
    return w, old


# -- what they refuse -------------------------------------------------------------------------------------------------


why_not_sparse_linear = refuses(0, 1, 2, 5)
why_not_sparse_linear_dx = refuses(0, 1, 2)
why_not_sparse_add = refuses(0, 1, 2)
why_not_sddmm = refuses(0, 1)
why_not_sparse_scatter = refuses(0, 2)
why_not_sparse_swap = refuses(0, 2)
