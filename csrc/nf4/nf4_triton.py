"""NF4 in Triton: quantise, dequantise, and linear layers that decode packed weights on their way into the product.

y = x W^T and dx = g W are one kernel: a program decodes tiles of W along the sum, each just before its product. They
are rounded to x's dtype, as dequantize_nf4 rounds them, and go to the tensor cores (fp32: FMA, never TF32). LoRA is
added to the same sums. Where the result alone gives too few programs, the sum is cut into parts, which a second kernel
adds in a fixed order; nothing is atomic.

A byte holds two neighbours of a row if K is even, and is then loaded once for both; if K is odd, once for each. Blocks
are flat, so a row may start within one: GROUP, the largest power of two that divides K, the block and the tile, is how
many columns share a scale wherever they start, and scales are loaded once for each group.

Scales of the second level round twice, product and sum: kernels that read them compile without fused multiply-adds of
separate operations, so they give the bits that expanded scales give. A dot's own FMAs stay.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.triton_util import cast, dot, keep_mask, split, tile
from ..lora.lora_triton import _dropout, _reduce, _shrink, _sum, _wgrad
from ..lora.lora_triton import unavailable as unavailable

VERIFIED_ON: frozenset[str] = frozenset()  # compute capabilities with a correct run under benchmarks/results

_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
_WIDEST = 1 << 14  # the largest block of the second level that a program holds
_EXACT = {"enable_fp_fusion": False}

_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
LEVELS = tl.constexpr(_LEVELS)
MIDPOINTS = tl.constexpr(tuple((low + high) / 2 for low, high in zip(_LEVELS, _LEVELS[1:], strict=False)))
LARGEST = tl.constexpr(torch.finfo(torch.float32).max)

# -- numbers to four bits ---------------------------------------------------------------------------------------------


@triton.jit
def scaled(blocks):
    """(blocks / absmax, absmax) of each row, by the reciprocal; NaN where a row is not finite."""
    largest = tl.max(tl.where(tl.abs(blocks) < float("inf"), tl.abs(blocks), float("inf")), axis=1)
    absmax = tl.where(largest < float("inf"), largest, float("nan"))
    reciprocal = tl.math.div_rn(1.0, absmax)
    reciprocal = tl.where(reciprocal == float("inf"), LARGEST, reciprocal)
    return blocks * reciprocal[:, None], absmax


@triton.jit
def nf4_quantize_kernel(w_ptr, packed_ptr, absmax_ptr, numel, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """Bytes and scales of ROWS blocks of SIZE elements."""
    blocks = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = blocks[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    units, absmax = scaled(cast(tl.load(w_ptr + at, mask=at < numel, other=0.0), tl.float32))
    tl.store(absmax_ptr + blocks, absmax, mask=blocks * SIZE < numel)
    index = tl.full([ROWS, SIZE], 15, tl.int32)  # less one for each midpoint that is not below: NaN has 15
    for i in tl.static_range(15):
        index -= (units <= MIDPOINTS[i]).to(tl.int32)
    high, low = tl.split(tl.reshape(tl.where(at < numel, index, 7), [ROWS, SIZE // 2, 2]))
    place = blocks[:, None] * (SIZE // 2) + tl.arange(0, SIZE // 2)[None, :]
    tl.store(packed_ptr + place, (high * 16 + low).to(tl.uint8), mask=place * 2 < numel)


@triton.jit(do_not_specialize=("chunk",))
def nf4_absmax_sum_kernel(absmax_ptr, sums_ptr, n, chunk, BLOCK: tl.constexpr):
    """(sum, number) of the finite scales of a chunk of steps, fp64."""
    part = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.float64)
    count = tl.zeros([BLOCK], tl.float64)
    for step in range(part * chunk, tl.minimum(part * chunk + chunk, tl.cdiv(n, BLOCK))):
        at = tl.cast(step, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        absmax = tl.load(absmax_ptr + at, mask=at < n, other=float("inf"))
        finite = tl.abs(absmax) < float("inf")
        total += tl.where(finite, absmax, 0.0).to(tl.float64)
        count += finite.to(tl.float64)
    tl.store(sums_ptr + 2 * part, tl.sum(total))
    tl.store(sums_ptr + 2 * part + 1, tl.sum(count))


@triton.jit(do_not_specialize=("splits",))
def nf4_absmax_quantize_kernel(
    absmax_ptr, code_ptr, sums_ptr, q_ptr, absmax2_ptr, offset_ptr, n, splits, block2,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Codes and scales of ROWS blocks of block2 scales, and the offset, which the first program stores."""
    parts = tl.arange(0, 32)
    total = tl.sum(tl.load(sums_ptr + 2 * parts, mask=parts < splits, other=0.0))
    count = tl.sum(tl.load(sums_ptr + 2 * parts + 1, mask=parts < splits, other=0.0))
    offset = (total / tl.maximum(count, 1.0)).to(tl.float32)
    tl.store(offset_ptr, offset, mask=tl.program_id(0) == 0)
    blocks = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = tl.arange(0, WIDTH)[None, :]
    at = blocks[:, None] * block2 + inside
    mask = (inside < block2) & (at < n)
    units, absmax2 = scaled(tl.where(mask, tl.load(absmax_ptr + at, mask=mask, other=0.0) - offset, 0.0))
    tl.store(absmax2_ptr + blocks, absmax2, mask=blocks * block2 < n)
    q = tl.zeros([ROWS, WIDTH], tl.int32)  # how many midpoints of the code are below; of 255, for NaN all
    for i in tl.static_range(8):
        upper = q + (128 >> i)
        low, high = tl.load(code_ptr + upper - 1), tl.load(code_ptr + upper)
        midpoint = ((low.to(tl.float64) + high.to(tl.float64)) * 0.5).to(tl.float32)
        q = tl.where(units <= midpoint, q, upper)
    tl.store(q_ptr + at, q.to(tl.uint8), mask=mask)


# -- and back ---------------------------------------------------------------------------------------------------------
# BLOCK2 is the block of the second level, or 0 where the scales themselves are given.


@triton.jit
def scales(blocks, mask, absmax_ptr, q_ptr, code_ptr, offset_ptr, BLOCK2: tl.constexpr):
    """The scales of the blocks, 0 where there are none."""
    if BLOCK2 == 0:
        return tl.load(absmax_ptr + blocks, mask=mask, other=0.0)
    else:
        code = tl.load(code_ptr + tl.load(q_ptr + blocks, mask=mask, other=0).to(tl.int32))
        absmax2 = tl.load(absmax_ptr + blocks // BLOCK2, mask=mask, other=0.0)
        return tl.where(mask, code * absmax2 + tl.load(offset_ptr), 0.0)


@triton.jit
def level_table():
    """The 16 levels [16]."""
    at = tl.arange(0, 16)
    table = tl.zeros([16], tl.float32)
    for i in tl.static_range(16):
        table = tl.where(at == i, LEVELS[i], table)
    return table


@triton.jit
def weights(
    table, rows, first_column, N, K, row_bytes, packed_ptr, absmax_ptr, q_ptr, code_ptr, offset_ptr,
    COLUMNS: tl.constexpr, GROUP: tl.constexpr, SHIFT: tl.constexpr, BLOCK2: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """W [N, K] in fp32, COLUMNS from `first_column` on of each of the rows; 0 outside of W.

    PAIRS: no byte is of two rows, which have row_bytes each.   SHIFT: log2 of the block
    """
    ROWS: tl.constexpr = rows.shape[0]
    long_rows = rows.to(tl.int64)[:, None]
    groups = first_column + tl.arange(0, COLUMNS // GROUP)[None, :] * GROUP
    there = (rows[:, None] < N) & (groups < K)
    scale = scales((long_rows * K + groups) >> SHIFT, there, absmax_ptr, q_ptr, code_ptr, offset_ptr, BLOCK2)
    if PAIRS:
        pairs = first_column // 2 + tl.arange(0, COLUMNS // 2)[None, :]
        mask = (rows[:, None] < N) & (pairs < row_bytes)
        two = tl.load(packed_ptr + long_rows * row_bytes + pairs, mask=mask, other=0)
        index = tl.join(two >> 4, two & 15)  # [ROWS, COLUMNS // 2, 2]
    else:
        columns = first_column + tl.arange(0, COLUMNS)[None, :]
        at = long_rows * K + columns
        two = tl.load(packed_ptr + (at >> 1), mask=(rows[:, None] < N) & (columns < K), other=0)
        index = tl.where((at & 1) == 0, two >> 4, two & 15)
    level = tl.gather(table, tl.reshape(index.to(tl.int32), [ROWS * COLUMNS]), 0)
    return tl.reshape(tl.reshape(level, [ROWS, COLUMNS // GROUP, GROUP]) * scale[:, :, None], [ROWS, COLUMNS])


@triton.jit
def nf4_dequantize_kernel(
    out_ptr, packed_ptr, absmax_ptr, q_ptr, code_ptr, offset_ptr, numel, held,
    SIZE: tl.constexpr, GROUP: tl.constexpr, SHIFT: tl.constexpr, BLOCK2: tl.constexpr,
):  # fmt: skip
    """SIZE elements, as if all, in `held` bytes, were one row."""
    first = tl.program_id(0).to(tl.int64) * SIZE
    w = weights(
        level_table(), tl.arange(0, 1), first, 1, numel, held, packed_ptr, absmax_ptr, q_ptr, code_ptr, offset_ptr,
        SIZE, GROUP, SHIFT, BLOCK2, True,
    )  # fmt: skip
    at = first + tl.arange(0, SIZE)[None, :]
    tl.store(out_ptr + at, cast(w, out_ptr.dtype.element_ty), mask=at < numel)


@triton.jit
def nf4_absmax_dequantize_kernel(
    out_ptr, absmax_ptr, q_ptr, code_ptr, offset_ptr, n, BLOCK: tl.constexpr, BLOCK2: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, scales(at, at < n, absmax_ptr, q_ptr, code_ptr, offset_ptr, BLOCK2), mask=at < n)


# -- the product ------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=("M", "chunk", "threshold", "t_splits"))
def nf4_product_kernel(
    u_ptr, out_ptr, bias_ptr, packed_ptr, absmax_ptr, q_ptr, code_ptr, offset_ptr, parts_ptr, f_ptr, sum_ptr, rng_ptr,
    scale, threshold, M, N, K, R, stride_fr, stride_fd, chunk, t_splits,
    BM: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr, SHIFT: tl.constexpr,
    BLOCK2: tl.constexpr, PAIRS: tl.constexpr, BACK: tl.constexpr, BIAS: tl.constexpr, LORA: tl.constexpr,
    SUM: tl.constexpr, DROPOUT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """out[s] [M, D] = u W^T or, if BACK, u W, over the s-th chunk of steps along the sum; W [N, K].

    To part 0 goes the bias, and with LORA scale * mask * (v f) of v [M, R], the sum of the shrink's parts, which the
    first column of programs stores, and f [R, D].
    """
    C = N if BACK else K
    D = K if BACK else N
    tiles_m = tl.cdiv(M, BM)  # neighbouring programs read the same weights, so all but the first find them in L2
    first = tl.program_id(0) // tiles_m * BD
    part = tl.program_id(1)
    rows = tl.program_id(0) % tiles_m * BM + tl.arange(0, BM)
    columns = first + tl.arange(0, BD)
    u_rows = u_ptr + rows.to(tl.int64)[:, None] * C
    table = level_table()
    acc = tl.zeros([BD, BM], tl.float32)  # the weights' side first, which is long: few rows waste nothing
    for step in range(part * chunk, tl.minimum(part * chunk + chunk, tl.cdiv(C, BC))):
        depth = step * BC + tl.arange(0, BC)
        u = tl.load(u_rows + depth[None, :], mask=(rows[:, None] < M) & (depth[None, :] < C), other=0.0)  # [BM, BC]
        if BACK:
            w = weights(
                table, depth, first, N, K, K // 2, packed_ptr, absmax_ptr, q_ptr, code_ptr, offset_ptr,
                BD, GROUP, SHIFT, BLOCK2, PAIRS,
            )  # fmt: skip
            w = tl.trans(cast(w, u_ptr.dtype.element_ty))
        else:
            w = weights(
                table, columns, step * BC, N, K, K // 2, packed_ptr, absmax_ptr, q_ptr, code_ptr, offset_ptr,
                BC, GROUP, SHIFT, BLOCK2, PAIRS,
            )  # fmt: skip
            w = cast(w, u_ptr.dtype.element_ty)
        acc = dot(w, tl.trans(u), acc, True)  # [BD, BM]
    if LORA:
        own = tl.where(part == 0, R, 0)
        stored = tl.where(first == 0, own, 0)
        delta = tl.zeros([BD, BM], tl.float32)
        for rank in range(0, own, BR):
            ranks = rank + tl.arange(0, BR)
            v_offsets = rows.to(tl.int64)[:, None] * R + ranks[None, :]
            v_mask = (rows[:, None] < M) & (ranks[None, :] < R)
            v = tl.load(parts_ptr + v_offsets, mask=v_mask, other=0.0)  # [BM, BR]
            if SUM:
                for t_part in range(1, t_splits):
                    v += tl.load(parts_ptr + tl.cast(t_part, tl.int64) * M * R + v_offsets, mask=v_mask, other=0.0)
                tl.store(sum_ptr + v_offsets, v, mask=v_mask & (ranks[None, :] < stored))
            f = tl.load(
                f_ptr + columns[:, None] * stride_fd + ranks[None, :] * stride_fr,
                mask=(columns[:, None] < D) & (ranks[None, :] < R), other=0.0,
            )  # fmt: skip  # [BD, BR]
            delta = dot(f, tl.trans(v), delta, EXACT)
        if DROPOUT:
            delta = tl.where(tl.trans(keep_mask(rng_ptr, rows, first, threshold, BD)), delta, 0.0)
        acc += delta * scale
    if BIAS:
        bias = tl.load(bias_ptr + columns, mask=columns < tl.where(part == 0, D, 0), other=0.0)
        acc += cast(bias, tl.float32)[:, None]
    out = out_ptr + (part.to(tl.int64) * M + rows)[None, :] * D + columns[:, None]
    tl.store(out, cast(acc, out_ptr.dtype.element_ty), mask=(rows[None, :] < M) & (columns[:, None] < D))


class _Weights(NamedTuple):
    """Packed weights as the kernels take them; the scales' own codes are None and block2 0 if there are none."""

    packed: Tensor
    absmax: Tensor
    q: Tensor | None
    code: Tensor | None
    offset: Tensor | None
    block2: int
    blocksize: int

    @property
    def tensors(self) -> tuple:
        return self[:5]

    @property
    def shift(self) -> int:
        return self.blocksize.bit_length() - 1


def _weights(packed, absmax, blocksize, q, code, offset, block2) -> _Weights:
    whole = (t if t is None else t.contiguous() for t in (absmax, q, code, offset))
    return _Weights(packed.contiguous().view(torch.uint8), *whole, 0 if q is None else block2, blocksize)


class _Update(NamedTuple):
    """scale * mask * (v f) of the parts of v [splits, M, R] and f [R, D], any strides."""

    parts: Tensor
    f: Tensor
    scale: float
    threshold: int
    rng: Tensor | None


def _product(
    u: Tensor, w: _Weights, n: int, k: int, back: bool, bias: Tensor | None = None, update: _Update | None = None
) -> tuple[Tensor, Tensor | None]:
    """(u W, or u W^T + bias, in u's dtype, + the update; the sum of the update's parts). u is contiguous."""
    (m, c), d = u.shape, k if back else n
    out = torch.empty((m, d), dtype=u.dtype, device=u.device)
    parts, f, scale, threshold, rng = update or (None, None, 0.0, 0, None)
    if out.numel() == 0:
        return out, None if parts is None else _sum(parts)
    t_splits, r = (1, 0) if parts is None else (parts.shape[0], parts.shape[2])
    v = parts if parts is None else parts[0] if t_splits == 1 else torch.empty_like(parts[0])
    bm, bd, bc, br = tile(m, 16, 128), tile(d, 16, 64), 32 if u.dtype == torch.float32 else 64, tile(r or 1, 16, 32)
    tiles = triton.cdiv(m, bm) * triton.cdiv(d, bd)
    splits, chunk = split(triton.cdiv(c, bc), tiles)
    sums = out if splits == 1 else torch.empty((splits, m, d), dtype=torch.float32, device=u.device)
    nf4_product_kernel[(tiles, splits)](
        u, sums, bias, *w.tensors, parts, f, v, rng, scale, threshold, m, n, k, r,
        *((0, 0) if f is None else f.stride()), chunk, t_splits,
        BM=bm, BD=bd, BC=bc, BR=br, GROUP=math.gcd(k, w.blocksize, bd if back else bc), SHIFT=w.shift,
        BLOCK2=w.block2, PAIRS=k % 2 == 0, BACK=back, BIAS=bias is not None, LORA=update is not None,
        SUM=t_splits > 1, DROPOUT=threshold > 0, EXACT=u.dtype == torch.float32,
        num_warps=8 if bm > 64 else 4, num_stages=3, **_EXACT,
    )  # fmt: skip
    return out if splits == 1 else _reduce(sums, out), v


# -- the ops ----------------------------------------------------------------------------------------------------------


def _refuses(*positions: int) -> Callable[..., str]:
    """A why_not that asks for kernels of the dtypes at these positions."""

    def why_not(*args) -> str:
        for a in (args[i] for i in positions):
            dtype = a.dtype if isinstance(a, Tensor) else a
            if dtype is not None and dtype not in _DTYPES:
                return f"no kernel for {dtype}"
        return ""

    return why_not


why_not_quantize_nf4 = _refuses(0)
why_not_dequantize_nf4 = _refuses(4)
why_not_dequantize_absmax = _refuses(1, 2, 3)
why_not_nf4_linear = _refuses(0, 5)
why_not_nf4_linear_dgrad = _refuses(0)
why_not_nf4_lora_linear = _refuses(0, 5, 6, 8)
why_not_nf4_lora_linear_backward = _refuses(0, 1, 5, 6)


def why_not_quantize_absmax(absmax, code, blocksize2) -> str:
    if blocksize2 > _WIDEST:
        return f"no kernel for a blocksize2 over {_WIDEST}"
    return _refuses(0, 1)(absmax, code)


def quantize_nf4(w, blocksize):
    w, numel = w.contiguous(), w.numel()
    blocks = triton.cdiv(numel, blocksize)
    packed = torch.empty(((numel + 1) // 2, 1), dtype=torch.uint8, device=w.device)
    absmax = torch.empty(blocks, dtype=torch.float32, device=w.device)
    if numel:
        rows = max(1, 2048 // blocksize)
        with torch.cuda.device_of(w):
            nf4_quantize_kernel[(triton.cdiv(blocks, rows),)](
                w, packed, absmax, numel, ROWS=rows, SIZE=blocksize, num_warps=4, **_EXACT
            )
    return packed, absmax


def dequantize_nf4(packed, absmax, shape, blocksize, dtype, *nested):
    w = _weights(packed, absmax, blocksize, *nested)
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    numel, size = out.numel(), 2048
    if numel:
        with torch.cuda.device_of(packed):
            nf4_dequantize_kernel[(triton.cdiv(numel, size),)](
                out, *w.tensors, numel, (numel + 1) // 2, SIZE=size, GROUP=min(size, blocksize), SHIFT=w.shift,
                BLOCK2=w.block2, num_warps=4, **_EXACT,
            )  # fmt: skip
    return out


def quantize_absmax(absmax, code, blocksize2):
    absmax, code, n = absmax.contiguous(), code.contiguous(), absmax.numel()
    blocks, width = triton.cdiv(n, blocksize2), triton.next_power_of_2(blocksize2)
    rows, block = max(1, 1024 // width), 1024
    splits, chunk = split(triton.cdiv(n, block), 1)
    sums = torch.empty((splits, 2), dtype=torch.float64, device=absmax.device)
    q = torch.empty(n, dtype=torch.uint8, device=absmax.device)
    absmax2 = torch.empty(blocks, dtype=torch.float32, device=absmax.device)
    offset = torch.empty((), dtype=torch.float32, device=absmax.device)
    with torch.cuda.device_of(absmax):
        nf4_absmax_sum_kernel[(splits,)](absmax, sums, n, chunk, BLOCK=block, num_warps=4, **_EXACT)
        nf4_absmax_quantize_kernel[(max(1, triton.cdiv(blocks, rows)),)](
            absmax, code, sums, q, absmax2, offset, n, splits, blocksize2, ROWS=rows, WIDTH=width,
            num_warps=8 if width > 2048 else 4, **_EXACT,
        )  # fmt: skip
    return q, absmax2, offset


def dequantize_absmax(q, absmax2, code, offset, blocksize2):
    q, absmax2, code, offset = (t.contiguous() for t in (q, absmax2, code, offset))
    n, block = q.numel(), 1024
    out = torch.empty(n, dtype=torch.float32, device=q.device)
    if n:
        with torch.cuda.device_of(q):
            nf4_absmax_dequantize_kernel[(triton.cdiv(n, block),)](
                out, absmax2, q, code, offset, n, BLOCK=block, BLOCK2=blocksize2, num_warps=4, **_EXACT
            )
    return out


def _flat(x: Tensor) -> Tensor:
    """x [..., C] as contiguous [M, C]."""
    return x.contiguous().view(math.prod(x.shape[:-1]), x.shape[-1])


def _linear(x, w, n, bias, update=None):
    """(x W^T + bias + the update [..., N], the sum of the update's parts)"""
    y, t = _product(_flat(x), w, n, x.shape[-1], False, None if bias is None else bias.contiguous(), update)
    return y.view(*x.shape[:-1], n), t


def nf4_linear(x, packed, absmax, n, blocksize, bias, *nested):
    with torch.cuda.device_of(x):
        return _linear(x, _weights(packed, absmax, blocksize, *nested), n, bias)[0]


def nf4_linear_dgrad(g, packed, absmax, k, blocksize, *nested):
    with torch.cuda.device_of(g):
        dx, _ = _product(_flat(g), _weights(packed, absmax, blocksize, *nested), g.shape[-1], k, True)
    return dx.view(*g.shape[:-1], k)


def nf4_lora_linear(x, packed, absmax, n, blocksize, a, b, scale, bias, p, rng, *nested):
    w = _weights(packed, absmax, blocksize, *nested)
    threshold, keep_scale = _dropout(p)
    with torch.cuda.device_of(x):
        if a.shape[0] == 0:
            return _linear(x, w, n, bias)[0], torch.empty((math.prod(x.shape[:-1]), 0), device=x.device)
        parts = _shrink(_flat(x), a, keep_scale, threshold, rng)
        return _linear(x, w, n, bias, _Update(parts, b.T, scale, 0, None))


def nf4_lora_linear_backward(g, x, packed, absmax, blocksize, a, b, t, scale, p, rng, *rest):
    *nested, needs = rest
    w, (n, r), k, shape = _weights(packed, absmax, blocksize, *nested), b.shape, x.shape[-1], x.shape
    threshold, keep_scale = _dropout(p)
    g, x, t = _flat(g), _flat(x), t.contiguous()
    dx = x.new_empty(0)
    wanted = zip((a, b), needs[1:], strict=True)
    da, db = (torch.empty(f.shape if need else 0, dtype=f.dtype, device=f.device) for f, need in wanted)
    with torch.cuda.device_of(x):
        parts = _shrink(g, b.T, scale, 0, None) if r and (needs[0] or needs[1]) else None
        if needs[0]:
            update = None if parts is None else _Update(parts, a, keep_scale, threshold, rng)
            dx, dt = _product(g, w, n, k, True, None, update)
            dx = dx.view(shape)
        elif needs[1] and r:
            dt = _sum(parts)
        if needs[1] and r:
            _wgrad(x, dt, da.T, keep_scale, threshold, rng)
        if needs[2] and r:
            _wgrad(g, t, db, scale, 0, None)
    return dx, da, db
