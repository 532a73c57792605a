"""The Walsh-Hadamard transform and Fastfood in Triton, by products with small Hadamard matrices on tensor cores.

H_n = H_a kron H_b kron H_c: a row is an [a, b, c] array, and each of its dimensions is multiplied by a matrix of +-1
with 16 to 128 rows, made in registers from the parity of i & j. fp32 operands are cut into bf16 parts that add up to
them: products with +-1 are exact then, and only sums round, in fp32. Rows up to 2^14 numbers are one launch. Longer
ones are matrices [lines, 2^14 at most], whose columns are transformed first, into fp32, and then the rows.

The sum of Fastfood's gradient over equal places is a product of matrices, too: with place = high * LOW + low and E the
indicators of `high` and `low`, bins [high, low] = E_high^T (u E_low). Nothing is atomic; parts are added in order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.triton_util import cast, dot, tile
from ..lora.lora_triton import unavailable as unavailable

VERIFIED_ON: frozenset[str] = frozenset()  # compute capabilities with a correct run under benchmarks/results

_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
_MOST_BINS = 1 << 15  # of a gradient: its products cost 2 k flops for each number
_LEVELS = 14  # of a row in one launch
_TILE = 1 << 12  # numbers that a program takes of shorter rows

# -- the kernels ------------------------------------------------------------------------------------------------------


@triton.jit
def hadamard(N: tl.constexpr):
    """H_N in bf16."""
    common = tl.arange(0, N)[:, None] & tl.arange(0, N)[None, :]
    for shift in tl.static_range(3):
        common ^= common >> (4 >> shift)
    return cast((1 - 2 * (common & 1)).to(tl.float32), tl.bfloat16)


@triton.jit
def times(x, N: tl.constexpr, EXACT: tl.constexpr):
    """x [m, N] H_N"""
    return dot(x, hadamard(N), tl.zeros([x.shape[0], N], tl.float32), EXACT)


@triton.jit
def source(x_ptr, pi_ptr, g_ptr, first, at, n, k, GATHER: tl.constexpr):
    """Numbers `at` of a row that begins at x[first]: those below n, or g_i x[pi_i mod k]."""
    mask = at < n
    if GATHER:
        place = tl.load(pi_ptr + at, mask=mask, other=0).to(tl.int32) & (k - 1)
        return tl.load(x_ptr + place, mask=mask, other=0.0) * weight(g_ptr, at, mask)
    else:
        return tl.load(x_ptr + first + at, mask=mask, other=0.0)


@triton.jit
def weight(g_ptr, at, mask):
    g = tl.load(g_ptr + at, mask=mask, other=0).to(tl.float32)
    return g * (2.0**-12) if g_ptr.dtype.element_ty == tl.int16 else g


@triton.jit(do_not_specialize=("rows", "n_in", "n_out", "k", "scale"))
def hadamard_rows_kernel(
    x_ptr, pi_ptr, g_ptr, base_ptr, y_ptr, rows, lines, n_in, n_out, k, scale,
    R: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
    GATHER: tl.constexpr, WEIGHT: tl.constexpr, BASE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """y [., n_out] = base + scale * H x, of R rows [A, B, C]; `lines` of them make one of x [., n_in] and of y."""
    N: tl.constexpr = A * B * C
    q = tl.arange(0, R * A * B)[:, None]
    row = tl.program_id(0).to(tl.int64) * R + q // (A * B)
    at = row % lines * N + q % (A * B) * C + tl.arange(0, C)[None, :]
    v = source(x_ptr, pi_ptr, g_ptr, row // lines * n_in, at, tl.where(row < rows, n_in, 0), k, GATHER)
    v = times(v, C, EXACT)  # [R A B, C]
    if B > 1:
        v = tl.reshape(tl.permute(tl.reshape(v, [R * A, B, C]), [0, 2, 1]), [R * A * C, B])
        v = times(v, B, EXACT)
    if A > 1:
        v = tl.reshape(tl.permute(tl.reshape(v, [R, A, C * B]), [0, 2, 1]), [R * C * B, A])
        v = times(v, A, EXACT)
    # where they are now: [R C B, A], [R C, B] or [R, C]
    if A > 1:
        q = tl.arange(0, R * C * B)[:, None]
        row = tl.program_id(0).to(tl.int64) * R + q // (C * B)
        place = tl.arange(0, A)[None, :] * (B * C) + q % B * C + q // B % C
    elif B > 1:
        q = tl.arange(0, R * C)[:, None]
        row = tl.program_id(0).to(tl.int64) * R + q // C
        place = tl.arange(0, B)[None, :] * C + q % C
    else:
        row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)[:, None]
        place = tl.arange(0, C)[None, :]
    at = row % lines * N + place
    to = row // lines * n_out + at
    mask = (row < rows) & (at < n_out)
    v *= scale
    if WEIGHT:
        v *= weight(g_ptr, at, mask)
    if BASE:
        v += cast(tl.load(base_ptr + to, mask=mask, other=0.0), tl.float32)
    tl.store(y_ptr + to, cast(v, y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=("n_in", "held", "k"))
def hadamard_columns_kernel(
    x_ptr, pi_ptr, g_ptr, y_ptr, n_in, held, size, k,
    A: tl.constexpr, B: tl.constexpr, W: tl.constexpr, GATHER: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """y [., A B, size] = H along the A B lines of x [., n_in], for W columns; of y the first `held` lines."""
    tiles = size // W
    number = tl.program_id(0).to(tl.int64) // tiles
    column = tl.program_id(0) % tiles * W
    q = tl.arange(0, A * W)[:, None]
    line = q // W * B + tl.arange(0, B)[None, :]
    at = line.to(tl.int64) * size + column + q % W
    v = source(x_ptr, pi_ptr, g_ptr, number * n_in, at, n_in, k, GATHER)
    v = times(v, B, EXACT)  # [A W, B]
    if A > 1:
        v = tl.reshape(tl.permute(tl.reshape(v, [A, W, B]), [2, 1, 0]), [B * W, A])
        v = times(v, A, EXACT)
        q = tl.arange(0, B * W)[:, None]
        line = tl.arange(0, A)[None, :] * B + q // W
        at = line.to(tl.int64) * size + column + q % W
    tl.store(y_ptr + number * held * size + at, v, mask=line < held)


@triton.jit
def hadamard_bins_kernel(
    u_ptr, pi_ptr, parts_ptr, n, k, chunk, LOW: tl.constexpr, HIGH: tl.constexpr, BLOCK: tl.constexpr
):
    """parts [., k] = the sums of a chunk of u [n] over equal places, for HIGH * LOW of these."""
    first_high = tl.program_id(1) * HIGH
    acc = tl.zeros([HIGH, LOW], tl.float32)
    begin = tl.program_id(0).to(tl.int64) * chunk
    for step in range(0, chunk, BLOCK):
        at = begin + step + tl.arange(0, BLOCK)
        mask = at < n
        u = tl.load(u_ptr + at, mask=mask, other=0.0)
        place = tl.load(pi_ptr + at, mask=mask, other=0).to(tl.int32) & (k - 1)
        high = (place // LOW)[None, :] == first_high + tl.arange(0, HIGH)[:, None]
        low = (place % LOW)[:, None] == tl.arange(0, LOW)[None, :]
        acc = dot(cast(high.to(tl.float32), tl.bfloat16), tl.where(low, u[:, None], 0.0), acc, True)
    to = (first_high + tl.arange(0, HIGH)[:, None]) * LOW + tl.arange(0, LOW)[None, :]
    tl.store(parts_ptr + tl.program_id(0).to(tl.int64) * k + to, acc, mask=to < k)


# -- launches ---------------------------------------------------------------------------------------------------------


def _levels(n: int) -> int:
    return (n - 1).bit_length()


def _factors(levels: int) -> tuple[int, int, int]:
    """2^levels as a product of matrices for tensor cores, whose least is 16."""
    if levels < 8:
        return 1, 1, 1 << levels
    if levels < 13:
        return 1, 1 << levels // 2, 1 << levels - levels // 2
    return 1 << levels // 3, 1 << (levels + 1) // 3, 1 << (levels + 2) // 3


def _warps(numbers: int) -> int:
    return tile(numbers // 1024, 4, 16)


def _transform(x: Tensor, y: Tensor, scale: float, state=None, base=None, weight=None, levels=None) -> Tensor:
    """y [., n_out] = base + scale * weight * the first of H x. x [., n_in], or with state = (pi, g, k) a table of k."""
    n_in, n_out, k = x.shape[-1], y.shape[-1], 0
    pi, g = x, x if weight is None else weight
    batch = y.numel() // n_out
    exact = y.dtype == torch.float32
    if state is not None:
        pi, g, k = state
        n_in = len(pi)
    levels = max(_levels(max(n_in, n_out)), 4)
    gather, lines = state is not None, 1
    if levels > _LEVELS:
        bits = max(4, levels - _LEVELS)
        lines, size = 1 << bits, 1 << levels - bits
        held = min(lines, triton.cdiv(n_out, size)) if batch == 1 else lines
        _, a, b = _factors(bits)
        wide = min(size, max((1 << _LEVELS - 1) // lines, 4))
        room = torch.empty((batch, held * size), dtype=torch.float32, device=x.device)
        hadamard_columns_kernel[(batch * (size // wide),)](
            x, pi, g, room, n_in, held, size, k,
            A=a, B=b, W=wide, GATHER=gather, EXACT=exact, num_warps=_warps(lines * wide),
        )  # fmt: skip
        x, n_in, gather, levels = room, held * size, False, levels - bits
        lines = held
    rows = batch * lines
    a, b, c = _factors(levels)
    r = max(1, _TILE >> levels)
    hadamard_rows_kernel[(triton.cdiv(rows, r),)](
        x, pi, g, y if base is None else base, y, rows, lines, n_in, n_out, k, scale,
        R=r, A=a, B=b, C=c, GATHER=gather, WEIGHT=weight is not None, BASE=base is not None, EXACT=exact,
        num_warps=_warps(r << levels),
    )  # fmt: skip
    return y


def fwht(x, scale):
    x = x.contiguous()
    y = torch.empty_like(x)
    with torch.cuda.device_of(x):
        return _transform(x, y, scale) if x.numel() else y


def fastfood(theta, sign, pi_mod, g, base, numel, scale):
    k = 1 << _levels(len(theta))
    with torch.cuda.device_of(theta):
        table = torch.empty(k, dtype=torch.float32, device=theta.device)
        _transform(theta.float() * sign, table, 1.0)
        if base is None:
            y = torch.empty(numel, dtype=theta.dtype, device=theta.device)
        else:
            base = base.contiguous()
            y = torch.empty_like(base)
        state = pi_mod.contiguous(), g.contiguous(), k
        _transform(table, y.view(-1), scale, state, None if base is None else base.view(-1))
    return y


def fastfood_backward(dy, sign, pi_mod, g, scale):
    d, n = len(sign), len(g)
    k = 1 << _levels(d)
    pi_mod, g = pi_mod.contiguous(), g.contiguous()
    with torch.cuda.device_of(dy):
        u = torch.empty(n, dtype=torch.float32, device=dy.device)
        _transform(dy.reshape(-1), u, 1.0, weight=g)
        chunk = max(1 << 12, n >> 8)
        parts = torch.empty((triton.cdiv(n, chunk), k), dtype=torch.float32, device=dy.device)
        low = tile(k, 16, 64)
        high = tile(triton.cdiv(k, low), 16, 64)
        hadamard_bins_kernel[(len(parts), triton.cdiv(k, low * high))](
            u, pi_mod, parts, n, k, min(chunk, n), LOW=low, HIGH=high, BLOCK=64, num_warps=4
        )
        dtheta = torch.empty(d, dtype=torch.float32, device=dy.device)
        _transform(parts.sum(0), dtheta, scale)
    return dtheta * sign


# -- refusals ---------------------------------------------------------------------------------------------------------


def _without_kernel(*tensors) -> str:
    return next((f"no kernel for {t.dtype}" for t in tensors if t is not None and t.dtype not in _DTYPES), "")


def _state(sign, g) -> str:
    if len(sign) > _MOST_BINS:
        return f"d is {len(sign)}; the kernels sum into at most {_MOST_BINS} bins"
    return "" if g.dtype in (torch.int16, torch.float32) else f"g is {g.dtype}; the kernels take int16 or float32"


def why_not_fwht(x, scale) -> str:
    return _without_kernel(x)


def why_not_fastfood(theta, sign, pi_mod, g, base, numel, scale) -> str:
    return _without_kernel(theta, base) or _state(sign, g)


def why_not_fastfood_backward(dy, sign, pi_mod, g, scale) -> str:
    return _without_kernel(dy) or _state(sign, g)
