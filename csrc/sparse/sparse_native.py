"""Sparse fine-tuning on the C++ launchers of the ops library, CPU and CUDA."""

from __future__ import annotations

import math

import torch

from ..common import panels
from ..common.library import unavailable as unavailable

VERIFIED_ON: frozenset[str] = frozenset()  # compute capabilities with a correct run under benchmarks/results

ON_CUDA = frozenset(("sddmm", "topk_threshold", "topk_compact", "sparse_adamw"))  # all ops have CPU launchers

_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
_PANEL_BYTES = 8 << 20  # of W + D: it stays in the last-level cache
_APART = {torch.float32: 2.0, torch.bfloat16: 0.7, torch.float16: 0.7}  # of the elements of W: see _add_apart
_ops = torch.ops._peft_kernels


def _of_cuda(t):
    """Whether the launchers are CUDA's: on a GPU, or in their emulation."""
    return t.is_cuda or _ops is not torch.ops._peft_kernels


def _refused(*tensors) -> str:
    """Why tensors that are computed with, of which some may be None, have no kernel, or ""."""
    dtypes = {t.dtype for t in tensors if t is not None}
    for dtype in dtypes:
        if dtype not in _DTYPES:
            return f"no kernel for {dtype}"
    return "" if len(dtypes) == 1 else f"one dtype is expected, not {' and '.join(sorted(map(str, dtypes)))}"


def _refused_with(vals, *tensors) -> str:
    reason = _refused(*tensors)
    if not reason and vals.dtype not in (tensors[0].dtype, torch.float32):
        reason = f"vals is {vals.dtype}; the kernels take {tensors[0].dtype} or float32"
    return reason


def _rows(x):
    """x [..., n] as [T, n], contiguous"""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).contiguous()


def _mask(crow, col, m, n):
    """(crow, col), contiguous and, on the CPU, looked through: its kernels go by them unasked, CUDA's doubt them."""
    crow, col = crow.contiguous(), col.contiguous()
    if not _of_cuda(col) and not _ops.sparse_is_mask.default(crow, col, m, n):
        raise ValueError(
            f"crow and col are no mask [{m}, {n}] in CSR; expected crow to ascend from 0 to nnz, and within each row "
            "columns that ascend strictly"
        )
    return crow, col


# -- products with W + D ----------------------------------------------------------------------------------------------


def _add_apart(tokens, w, nnz):
    """Is the product with D, 16 tokens at a time, beside that with W, less than copying W to take up D?"""
    return -(-tokens // 16) * nnz <= _APART[w.dtype] * w.numel()


def why_not_sparse_linear(x, w, vals, crow, col, bias) -> str:
    return _refused_with(vals, x, w, bias)


def sparse_linear(x, w, vals, crow, col, bias):
    crow, col = _mask(crow, col, *w.shape)
    rows, vals = _rows(x), vals.float().contiguous()
    if _add_apart(len(rows), w, len(col)):
        y = torch.nn.functional.linear(rows, w, bias)
        _ops.sparse_add_.default(y, rows, vals, crow, col)
    else:
        n = w.shape[1]
        y = panels.linear(
            rows, w, bias, lambda p, i: _ops.sparse_patch_.default(p, i, 0, vals, crow, col, n), _PANEL_BYTES
        )
    return y.view(*x.shape[:-1], w.shape[0])


def why_not_sparse_linear_dx(g, w, vals, crow, col, n) -> str:
    return _refused_with(vals, g, w)


def sparse_linear_dx(g, w, vals, crow, col, n):
    crow, col = _mask(crow, col, g.shape[-1], n)
    rows, vals = _rows(g), vals.float().contiguous()
    if w is None or _add_apart(len(rows), w, len(col)):
        dx = rows.new_zeros(len(rows), n) if w is None else rows @ w
        _ops.sparse_dx_add_.default(dx, rows, vals, crow, col)
    else:
        dx = panels.product(rows, w, lambda p, i: _ops.sparse_patch_.default(p, 0, i, vals, crow, col, n), _PANEL_BYTES)
    return dx.view(*g.shape[:-1], n)


def why_not_sparse_add(y, x, vals, crow, col) -> str:
    return _refused_with(vals, x, y)


def sparse_add(y, x, vals, crow, col):
    return sparse_add_(y.clone(memory_format=torch.contiguous_format), x, vals, crow, col)


def sparse_add_(y, x, vals, crow, col):
    if not y.is_contiguous():
        return sparse_add(y, x, vals, crow, col)
    crow, col = _mask(crow, col, y.shape[-1], x.shape[-1])
    _ops.sparse_add_.default(_rows(y), _rows(x), vals.float().contiguous(), crow, col)
    return y


def why_not_sddmm(dy, x, crow, col) -> str:
    return _refused(dy, x)


def sddmm(dy, x, crow, col):
    return _ops.sddmm.default(_rows(dy), _rows(x), *_mask(crow, col, dy.shape[-1], x.shape[-1]))


# -- single elements of W ---------------------------------------------------------------------------------------------


def _refused_place(w) -> str:
    return "" if w.is_contiguous() or w.dim() == 2 else "w is neither contiguous nor a matrix"


def why_not_sparse_scatter(w, idx, vals, alpha, add) -> str:
    return _refused_with(vals, w) or _refused_place(w)


def sparse_scatter(w, idx, vals, alpha, add):
    return sparse_scatter_(w.clone(memory_format=torch.contiguous_format), idx, vals, alpha, add)


def sparse_scatter_(w, idx, vals, alpha, add):
    _ops.sparse_scatter_.default(w, idx.contiguous(), vals.float().contiguous(), alpha, add)
    return w


def why_not_sparse_swap(w, idx, stash) -> str:
    if w.itemsize not in (2, 4) or stash.dtype != w.dtype:
        return f"no kernel for {w.dtype} and {stash.dtype}; 16 or 32 bits are expected, and one dtype"
    return _refused_place(w)


def sparse_swap(w, idx, stash):
    return sparse_swap_(w.clone(memory_format=torch.contiguous_format), idx, stash)


def sparse_swap_(w, idx, stash):
    return w, _ops.sparse_swap_.default(w, idx.contiguous(), stash.contiguous())


# -- selection, statistics, gates, optimizer --------------------------------------------------------------------------


def _no_kernel(*tensors) -> str:
    """The first dtype that no kernel takes."""
    return next((f"no kernel for {t.dtype}" for t in tensors if t is not None and t.dtype not in _DTYPES), "")


def _whole(*tensors):
    return [None if t is None else t.contiguous() for t in tensors]


def why_not_topk_threshold(k, use_abs, *scores) -> str:
    return _no_kernel(*scores)


def topk_threshold(k, use_abs, *scores):
    return _ops.topk_threshold.default(_whole(*scores), k, use_abs)


def why_not_topk_compact(threshold, k, use_abs, *scores) -> str:
    return _no_kernel(*scores) or ("" if threshold.dtype == torch.float32 else f"the threshold is {threshold.dtype}")


def topk_compact(threshold, k, use_abs, *scores):
    return _ops.topk_compact.default(_whole(*scores), threshold, k, use_abs)


def why_not_fisher_accum(f, g, weight, absolute) -> str:
    return _no_kernel(f, g)


def fisher_accum_(f, g, weight, absolute):
    f = f.contiguous()
    _ops.fisher_accum_.default(f, g.contiguous(), weight, absolute)
    return f


def fisher_accum(f, *args):
    return fisher_accum_(f.clone(memory_format=torch.contiguous_format), *args)


def why_not_fisher_linear(f, dy, x, cu_samples, weight) -> str:
    return _no_kernel(f, x) or ("" if dy.dtype == x.dtype else f"dy is {dy.dtype} and x {x.dtype}")


def fisher_linear_(f, dy, x, cu_samples, weight):
    total = f.float().contiguous()
    rows = (t.reshape(t.shape[:-1].numel(), t.shape[-1]).contiguous() for t in (dy, x))
    weight = None if weight is None else weight.float().contiguous()
    _ops.fisher_linear_.default(total, *rows, cu_samples.long().contiguous(), weight)
    return total.to(f.dtype)


def fisher_linear(f, *args):
    return fisher_linear_(f.clone(memory_format=torch.contiguous_format), *args)


def why_not_sparse_adamw(vals, m, v, grad, step, w, idx, *rest) -> str:
    return _no_kernel(grad, w) or ("" if vals.dtype == torch.float32 else f"no kernel for {vals.dtype}")


def sparse_adamw_(vals, m, v, grad, step, w, idx, *rest):
    own = _whole(vals, m, v)
    if _of_cuda(vals):  # which reads a step on its device itself
        at = (step.float(), 0.0) if step.device == vals.device else (None, step.item())
        if w is not None and not w.is_contiguous():  # the numbers that count, not a copy of all
            w, idx = w[torch.unravel_index(idx, w.shape)], None
        _ops.sparse_adamw_cuda_.default(*own, grad.contiguous(), *at, *_whole(w, idx), *rest)
        return tuple(own)
    _ops.sparse_adamw_.default(*own, grad.float().contiguous(), step.item(), *_whole(w, idx), *rest)
    return tuple(own)


def sparse_adamw(vals, m, v, *rest):
    return sparse_adamw_(*(t.clone(memory_format=torch.contiguous_format) for t in (vals, m, v)), *rest)


def why_not_hard_concrete(w0, w, alpha, alpha_group, rng) -> str:
    reason = _no_kernel(w0, w, alpha, alpha_group)
    if not reason and (w.dtype != alpha.dtype or w.dtype not in (w0.dtype, torch.float32)):
        reason = f"w is {w.dtype} and alpha {alpha.dtype}; the kernels take both of {w0.dtype} or float32"
    return reason


def _gates(first, w, alpha, alpha_group, rng):
    group = None if alpha_group is None else alpha_group.float()
    return *_whole(first, w, alpha), group, rng


def hard_concrete(w0, w, alpha, alpha_group, rng):
    return _ops.hard_concrete.default(*_gates(w0, w, alpha, alpha_group, rng))


def why_not_hard_concrete_backward(g, w, alpha, alpha_group, rng, needs) -> str:
    return why_not_hard_concrete(g, w, alpha, alpha_group, rng)


def hard_concrete_backward(g, w, alpha, alpha_group, rng, needs):
    needs = (*needs[:2], needs[2] and alpha_group is not None)
    dw, dalpha, dgroup = _ops.hard_concrete_backward.default(*_gates(g, w, alpha, alpha_group, rng), *needs)
    return dw, dalpha, dgroup.to(alpha.dtype if alpha_group is None else alpha_group.dtype)
