"""What trains a sparse delta, in Triton: Fisher statistics, AdamW on its values, hard-concrete gates.

Sums are fp32, results rounded once, and nothing is atomic: a program owns its elements, of the Fisher matrix its tile,
and the sum for a group's gate goes through one number for each program, added in a fixed order.
"""

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.triton_util import cast, dot, tile

_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))


def refuses(*positions: int) -> Callable[..., str]:
    """A why_not that asks for kernels of the dtypes at these positions."""

    def why_not(*args) -> str:
        for a in (args[i] for i in positions):
            if a is not None and a.dtype not in _DTYPES:
                return f"no kernel for {a.dtype}"
        return ""

    return why_not


# -- places in a weight -----------------------------------------------------------------------------------------------


@triton.jit
def spots(idx_ptr, at, n, numel, columns, stride_r, stride_c):
    """(where the idx[at] are in memory, which there are): those outside of the weight are left out."""
    flat = tl.load(idx_ptr + at, mask=at < n, other=-1).to(tl.int64)
    return flat // columns * stride_r + flat % columns * stride_c, (flat >= 0) & (flat < numel)


def places(w: Tensor) -> tuple[int, int, int] | None:
    """(columns, strides of rows and columns) by which flat indices of w are found in place; None if they are not."""
    if w.is_contiguous():
        return 1, 1, 0
    if w.dim() == 2 and all(stride or size == 1 for size, stride in zip(w.shape, w.stride(), strict=True)):
        return w.shape[1], w.stride(0), w.stride(1)
    return None


# -- Fisher -----------------------------------------------------------------------------------------------------------


@triton.jit
def sparse_fisher_accum_kernel(f_ptr, g_ptr, out_ptr, numel, weight, BLOCK: tl.constexpr, ABSOLUTE: tl.constexpr):
    """out = f + weight * g^2, or weight * |g|."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    f = cast(tl.load(f_ptr + at, mask=at < numel, other=0.0), tl.float32)
    g = cast(tl.load(g_ptr + at, mask=at < numel, other=0.0), tl.float32)
    f += weight * (tl.abs(g) if ABSOLUTE else g * g)
    tl.store(out_ptr + at, cast(f, out_ptr.dtype.element_ty), mask=at < numel)


@triton.jit(do_not_specialize=("T", "samples"))
def sparse_fisher_linear_kernel(
    f_ptr, dy_ptr, x_ptr, cu_ptr, weight_ptr, out_ptr, T, M, N, samples,
    BT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, WEIGHT: tl.constexpr,
):  # fmt: skip
    """A tile of out = f + the sum over samples of weight * (dy^T x)^2, sample by sample."""
    tiles_m = tl.cdiv(M, BM)  # neighbouring programs read the same columns of x, so all but the first find them in L2
    rows = tl.program_id(0) % tiles_m * BM + tl.arange(0, BM)
    columns = tl.program_id(0) // tiles_m * BN + tl.arange(0, BN)
    total = tl.zeros([BM, BN], tl.float32)
    for sample in range(samples):
        begin = tl.maximum(tl.load(cu_ptr + sample), 0).to(tl.int32)
        end = tl.minimum(tl.load(cu_ptr + sample + 1), T).to(tl.int32)
        acc = tl.zeros([BM, BN], tl.float32)
        for step in range(begin, end, BT):
            tokens = step + tl.arange(0, BT)
            dy = tl.load(
                dy_ptr + tokens.to(tl.int64)[:, None] * M + rows[None, :],
                mask=(tokens[:, None] < end) & (rows[None, :] < M), other=0.0,
            )  # fmt: skip  # [BT, BM]
            x = tl.load(
                x_ptr + tokens.to(tl.int64)[:, None] * N + columns[None, :],
                mask=(tokens[:, None] < end) & (columns[None, :] < N), other=0.0,
            )  # fmt: skip  # [BT, BN]
            acc = dot(tl.trans(dy), x, acc, True)
        if WEIGHT:
            total += cast(tl.load(weight_ptr + sample), tl.float32) * (acc * acc)
        else:
            total += acc * acc
    at = rows.to(tl.int64)[:, None] * N + columns[None, :]
    mask = (rows[:, None] < M) & (columns[None, :] < N)
    total += cast(tl.load(f_ptr + at, mask=mask, other=0.0), tl.float32)
    tl.store(out_ptr + at, cast(total, out_ptr.dtype.element_ty), mask=mask)


def _fisher_accum(f: Tensor, g: Tensor, weight: float, absolute: bool, out: Tensor) -> Tensor:
    numel, block = f.numel(), 1024
    if numel:
        with torch.cuda.device_of(f):
            sparse_fisher_accum_kernel[(triton.cdiv(numel, block),)](
                f, g.contiguous(), out, numel, weight, BLOCK=block, ABSOLUTE=absolute, num_warps=4
            )
    return out


def fisher_accum(f, g, weight, absolute):
    f = f.contiguous()
    return _fisher_accum(f, g, weight, absolute, torch.empty_like(f))


def fisher_accum_(f, g, weight, absolute):
    return _fisher_accum(f, g, weight, absolute, f) if f.is_contiguous() else fisher_accum(f, g, weight, absolute)


def _fisher_linear(f: Tensor, dy: Tensor, x: Tensor, cu: Tensor, weight: Tensor | None, out: Tensor) -> Tensor:
    (m, n), t = f.shape, math.prod(x.shape[:-1])
    if out.numel():
        bt, bm, bn = 32, tile(m, 16, 64), tile(n, 16, 128)
        weight = None if weight is None else weight.contiguous()
        with torch.cuda.device_of(f):
            sparse_fisher_linear_kernel[(triton.cdiv(m, bm) * triton.cdiv(n, bn),)](
                f, dy.contiguous(), x.contiguous(), cu.contiguous(), weight, out, t, m, n, len(cu) - 1,
                BT=bt, BM=bm, BN=bn, WEIGHT=weight is not None, num_warps=8 if bm * bn > 4096 else 4, num_stages=3,
            )  # fmt: skip
    return out


def fisher_linear(f, dy, x, cu_samples, weight):
    f = f.contiguous()
    return _fisher_linear(f, dy, x, cu_samples, weight, torch.empty_like(f))


def fisher_linear_(f, dy, x, cu_samples, weight):
    if not f.is_contiguous():
        return fisher_linear(f, dy, x, cu_samples, weight)
    return _fisher_linear(f, dy, x, cu_samples, weight, f)


why_not_fisher_accum = refuses(0, 1)
why_not_fisher_linear = refuses(0, 1, 2, 4)


# -- the optimizer ----------------------------------------------------------------------------------------------------


@triton.jit
def sparse_adamw_kernel(
    vals_ptr, m_ptr, v_ptr, grad_ptr, step_ptr, w_ptr, idx_ptr, new_ptr, new_m_ptr, new_v_ptr,
    n, numel, columns, stride_r, stride_c, lr, decay, keep1, take1, keep2, take2, eps,
    LOG1: tl.constexpr, LOG2: tl.constexpr, BASE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One step; LOG1 and LOG2 are the binary logarithms of the betas, keep and take these and 1 less these."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < n
    step = tl.load(step_ptr).to(tl.float64)  # the corrections are differences of numbers close to 1
    rate = (lr / (1.0 - tl.exp2(step * LOG1))).to(tl.float32)
    correction = (1.0 - tl.exp2(step * LOG2)).to(tl.float32)
    p = tl.load(vals_ptr + at, mask=there, other=0.0)
    g = cast(tl.load(grad_ptr + at, mask=there, other=0.0), tl.float32)
    mean = keep1 * tl.load(m_ptr + at, mask=there, other=0.0) + take1 * g
    square = keep2 * tl.load(v_ptr + at, mask=there, other=0.0) + take2 * g * g
    decayed = p
    if BASE:
        place, inside = spots(idx_ptr, at, n, numel, columns, stride_r, stride_c)
        decayed = p + cast(tl.load(w_ptr + place, mask=inside, other=0.0), tl.float32)
    p = p - decay * decayed - mean / (tl.sqrt_rn(square / correction) + eps) * rate
    tl.store(new_ptr + at, p, mask=there)
    tl.store(new_m_ptr + at, mean, mask=there)
    tl.store(new_v_ptr + at, square, mask=there)


def _adamw(state, grad, step, w, idx, lr, beta1, beta2, eps, weight_decay, outs):
    n, block, at = len(grad), 512, (1, 1, 0)
    if w is not None:
        at = places(w)
        if at is None:
            w, at = w.contiguous(), (1, 1, 0)
        idx = idx.contiguous()
    logs = (math.log2(beta) if beta > 0 else -math.inf for beta in (beta1, beta2))
    if n:
        with torch.cuda.device_of(grad):
            sparse_adamw_kernel[(triton.cdiv(n, block),)](
                *state, grad.contiguous(), step.to(grad.device), w, idx, *outs, n, 0 if w is None else w.numel(), *at,
                lr, lr * weight_decay, beta1, 1 - beta1, beta2, 1 - beta2, eps,
                *logs, BASE=w is not None, BLOCK=block, num_warps=4,
            )  # fmt: skip
    return outs


def sparse_adamw(vals, m, v, grad, *rest):
    state = tuple(t.contiguous() for t in (vals, m, v))
    return _adamw(state, grad, *rest, tuple(torch.empty_like(t) for t in state))


def sparse_adamw_(vals, m, v, grad, *rest):
    if not all(t.is_contiguous() for t in (vals, m, v)):
        return sparse_adamw(vals, m, v, grad, *rest)
    return _adamw((vals, m, v), grad, *rest, (vals, m, v))


def why_not_sparse_adamw(vals, m, v, grad, step, w, *rest) -> str:
    for t in (vals, m, v):
        if t.dtype != torch.float32:
            return f"no kernel for values of {t.dtype}"
    return refuses(0, 1)(grad, w)


# -- gates ------------------------------------------------------------------------------------------------------------

LEFT, RIGHT = tl.constexpr(-1.5), tl.constexpr(1.5)
MARGIN = tl.constexpr(1e-4)


@triton.jit
def sigmoid(alpha, words, RANDOM: tl.constexpr):
    """s = u / (u + (1 - u) exp(-alpha)), which is sigmoid(log(u / (1 - u)) + alpha), with u of Philox words."""
    decay = tl.exp(-alpha)
    if RANDOM:
        uniform = (words >> 8).to(tl.int32).to(alpha.dtype) * (1.0 / 16777216.0)
        scale: tl.constexpr = 1 - 2 * MARGIN
        u = uniform * scale + MARGIN
        return u / (u + ((1.0 - uniform) * scale + MARGIN) * decay)
    else:
        return 1.0 / (1.0 + decay)


@triton.jit
def gate(s):
    """z of s."""
    return tl.minimum(tl.maximum(s * (RIGHT - LEFT) + LEFT, 0.0), 1.0)


@triton.jit
def slope(s):
    """dz / dalpha of s."""
    stretched = s * (RIGHT - LEFT) + LEFT
    return tl.where((stretched > 0.0) & (stretched < 1.0), (RIGHT - LEFT) * s * (1.0 - s), 0.0)


@triton.jit
def element_sigmoid(alpha, first, rng_ptr, BLOCK: tl.constexpr, RANDOM: tl.constexpr):
    """s of BLOCK elements from `first` on, a multiple of 4: four share a counter, (element // 4, 0, offset)."""
    words = tl.zeros([BLOCK], tl.uint32)
    if RANDOM:
        seed = tl.load(rng_ptr)
        offset = tl.load(rng_ptr + 1)
        c0 = (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
        c1 = tl.zeros_like(c0)
        w0, w1, w2, w3 = tl.philox(seed, c0, c1, offset.to(tl.uint32), (offset >> 32).to(tl.uint32))
        words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [BLOCK])  # join adds the fastest axis
    return sigmoid(alpha, words, RANDOM)


@triton.jit
def group_sigmoid(group_ptr, rng_ptr, RANDOM: tl.constexpr):
    """s of the group, whose counter is (0, 1, offset), in fp64: one number, of which all others get the error."""
    words = tl.zeros([1], tl.uint32)
    if RANDOM:
        seed = tl.load(rng_ptr)
        offset = tl.load(rng_ptr + 1)
        words, _, _, _ = tl.philox(seed, words, words + 1, offset.to(tl.uint32), (offset >> 32).to(tl.uint32))
    alpha = cast(tl.load(group_ptr + tl.zeros([1], tl.int32)), tl.float32)
    return tl.sum(sigmoid(alpha.to(tl.float64), words, RANDOM))


@triton.jit
def sparse_hard_concrete_kernel(
    w0_ptr, w_ptr, alpha_ptr, group_ptr, rng_ptr, out_ptr, numel,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, RANDOM: tl.constexpr,
):  # fmt: skip
    """out = w0 + w z(alpha) z(group)."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    at = first + tl.arange(0, BLOCK)
    mask = at < numel
    w0 = cast(tl.load(w0_ptr + at, mask=mask, other=0.0), tl.float32)
    change = cast(tl.load(w_ptr + at, mask=mask, other=0.0), tl.float32)
    alpha = cast(tl.load(alpha_ptr + at, mask=mask, other=0.0), tl.float32)
    change *= gate(element_sigmoid(alpha, first, rng_ptr, BLOCK, RANDOM))
    if GROUP:
        change *= gate(group_sigmoid(group_ptr, rng_ptr, RANDOM)).to(tl.float32)
    tl.store(out_ptr + at, cast(w0 + change, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def sparse_hard_concrete_backward_kernel(
    g_ptr, w_ptr, alpha_ptr, group_ptr, rng_ptr, dw_ptr, dalpha_ptr, parts_ptr, numel,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, RANDOM: tl.constexpr, DW: tl.constexpr, DALPHA: tl.constexpr,
    SUM: tl.constexpr,
):  # fmt: skip
    """dw and dalpha, and for each program its part of the sum of g w z."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    at = first + tl.arange(0, BLOCK)
    mask = at < numel
    g = cast(tl.load(g_ptr + at, mask=mask, other=0.0), tl.float32)
    s = element_sigmoid(cast(tl.load(alpha_ptr + at, mask=mask, other=0.0), tl.float32), first, rng_ptr, BLOCK, RANDOM)
    whole = 1.0
    if GROUP:
        whole = gate(group_sigmoid(group_ptr, rng_ptr, RANDOM)).to(tl.float32)
    if DW:
        tl.store(dw_ptr + at, cast(g * gate(s) * whole, dw_ptr.dtype.element_ty), mask=mask)
    if DALPHA or SUM:
        gw = g * cast(tl.load(w_ptr + at, mask=mask, other=0.0), tl.float32)
        if DALPHA:
            tl.store(dalpha_ptr + at, cast(gw * whole * slope(s), dalpha_ptr.dtype.element_ty), mask=mask)
        if SUM:
            tl.store(parts_ptr + tl.program_id(0), tl.sum(tl.where(mask, gw.to(tl.float64) * gate(s), 0.0)))


@triton.jit
def sparse_hard_concrete_group_kernel(
    parts_ptr, group_ptr, rng_ptr, out_ptr, parts, BLOCK: tl.constexpr, RANDOM: tl.constexpr
):
    """dalpha_group from the parts of the sum, which one program adds."""
    total = tl.zeros([BLOCK], tl.float64)
    for step in range(0, parts, BLOCK):
        at = step + tl.arange(0, BLOCK)
        total += tl.load(parts_ptr + at, mask=at < parts, other=0.0)
    out = tl.sum(total) * slope(group_sigmoid(group_ptr, rng_ptr, RANDOM))
    tl.store(out_ptr, cast(out.to(tl.float32), out_ptr.dtype.element_ty))


def hard_concrete(w0, w, alpha, alpha_group, rng):
    w0, numel, block = w0.contiguous(), w0.numel(), 1024
    out = torch.empty_like(w0)
    if numel:
        with torch.cuda.device_of(w0):
            sparse_hard_concrete_kernel[(triton.cdiv(numel, block),)](
                w0, w.contiguous(), alpha.contiguous(), alpha_group, None if rng is None else rng.contiguous(), out,
                numel, BLOCK=block, GROUP=alpha_group is not None, RANDOM=rng is not None, num_warps=4,
            )  # fmt: skip
    return out


def hard_concrete_backward(g, w, alpha, alpha_group, rng, needs):
    grouped = alpha_group is not None
    need_w, need_alpha, need_group = needs[0], needs[1], needs[2] and grouped
    g, numel, block = g.contiguous(), g.numel(), 1024
    rng = None if rng is None else rng.contiguous()
    programs = triton.cdiv(numel, block)
    dw = torch.empty(w.shape if need_w else 0, dtype=w.dtype, device=w.device)
    dalpha = torch.empty(alpha.shape if need_alpha else 0, dtype=alpha.dtype, device=alpha.device)
    dgroup = torch.empty((), dtype=alpha_group.dtype, device=alpha.device) if need_group else alpha.new_empty(0)
    parts = torch.empty(programs if need_group else 0, dtype=torch.float64, device=g.device)
    with torch.cuda.device_of(g):
        if numel and (need_w or need_alpha or need_group):
            sparse_hard_concrete_backward_kernel[(programs,)](
                g, w.contiguous(), alpha.contiguous(), alpha_group, rng, dw, dalpha, parts, numel,
                BLOCK=block, GROUP=grouped, RANDOM=rng is not None, DW=need_w, DALPHA=need_alpha, SUM=need_group,
                num_warps=4,
            )  # fmt: skip
        if need_group:
            sparse_hard_concrete_group_kernel[(1,)](
                parts, alpha_group, rng, dgroup, programs, BLOCK=1024, RANDOM=rng is not None, num_warps=4
            )
    return dw, dalpha, dgroup


why_not_hard_concrete = refuses(0, 1, 2, 3)
why_not_hard_concrete_backward = refuses(0, 1, 2, 3)
