"""Sparse fine-tuning on the C++ launchers of the ops library, CPU and CUDA."""

from __future__ import annotations

import torch

from ..common.library import unavailable as unavailable

VERIFIED_ON: frozenset[str] = frozenset()  # compute capabilities with a correct run under benchmarks/results

ON_CUDA: frozenset[str] = frozenset()  # the ops with CUDA launchers; all have CPU ones

_ops = torch.ops._peft_kernels
_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))

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
