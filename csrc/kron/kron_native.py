"""Kronecker products on the C++ launchers of the ops library."""

from __future__ import annotations

import functools

import torch

from ..common.library import unavailable as unavailable
from . import _cuda

VERIFIED_ON: frozenset[str] = frozenset()  # compute capabilities with a correct run under benchmarks/results

ON_CUDA = _cuda.OPS  # the ops with CUDA launchers; all have CPU ones

_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
_FEW = 1 << 22  # multiply-adds of a product of bfloat16 for which calling torch twice takes longer
_LARGE = 1 << 18  # numbers of a factor: more are neither packed in no time nor kept in the cache
_ops = torch.ops._peft_kernels


def _of_cuda(t):
    """Whether the launchers are CUDA's: on a GPU, or in their emulation."""
    return t.is_cuda or _ops is not torch.ops._peft_kernels


def why_not(*args) -> str:
    """The first dtype that no kernel takes."""
    for a in args:
        if isinstance(a, torch.Tensor) and a.dtype not in _DTYPES:
            return f"no kernel for {a.dtype}"
    return ""


@functools.cache
def _torch_multiplies(dtype) -> bool:
    """Does torch have instructions for products of this dtype, which the kernels, who sum in fp32 ones, have not?"""
    return dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported()


def _slower(x, a, b) -> str:
    if a.dtype == torch.float16:
        return ""
    if max(a.numel(), b.numel()) > _LARGE:
        return f"torch's own products are faster with a factor of more than {_LARGE} numbers"
    if x.dtype == a.dtype and _torch_multiplies(x.dtype):
        (p, q), (r, s) = a.shape, b.shape
        if x.shape[:-1].numel() * min(p * s * (r + q), q * r * (p + s)) > _FEW:
            return "torch's own products of bfloat16 are faster on this CPU"
    return ""


def why_not_kron_linear(x, a, b, bias, scale) -> str:
    return why_not(x, a, b, bias) or (_cuda.why_not_linear if _of_cuda(x) else _slower)(x, a, b)


def why_not_kron_linear_add(acc, x, a, b, bias, scale) -> str:
    return why_not(acc) or why_not_kron_linear(x, a, b, bias, scale)


def why_not_kron_linear_backward(g, x, a, b, scale, needs) -> str:
    return why_not(g, x, a, b) or (_cuda.why_not_backward if _of_cuda(x) else _slower)(x, a, b)


def _empty(*tensors) -> bool:
    return not all(map(torch.Tensor.numel, tensors))


# -- x (a kron b) -----------------------------------------------------------------------------------------------------


def kron_linear(x, a, b, bias, scale):
    y = x.new_empty((*x.shape[:-1], a.shape[1] * b.shape[1]))
    return _into(y, None, x, a, b, bias, scale)


def kron_linear_add(acc, x, a, b, bias, scale):
    return _into(acc.new_empty(acc.shape), acc.contiguous(), x, a, b, bias, scale)


def kron_linear_add_(acc, x, a, b, bias, scale):
    if not acc.is_contiguous():
        return kron_linear_add(acc, x, a, b, bias, scale)
    return _into(acc, acc, x, a, b, bias, scale)


def _into(y, acc, x, a, b, bias, scale):
    if _empty(x, a, b):
        y = y.zero_() if acc is None else y.copy_(acc)
        return y if bias is None else y.add_(bias)
    bias = None if bias is None else bias.float().contiguous()
    if _of_cuda(x):
        return _cuda.linear(_ops, y, acc, x.contiguous(), a, b, bias, scale)
    _ops.kron_linear_.default(y, acc, x.contiguous(), a, b, bias, scale)
    return y


def kron_linear_backward(g, x, a, b, scale, needs):
    if _empty(x, a, b):
        return tuple(t.new_zeros(t.shape if need else 0) for t, need in zip((x, a, b), needs, strict=True))
    if _of_cuda(x):
        return _cuda.backward(_ops, g.contiguous(), x.contiguous(), a, b, scale, needs)
    return _ops.kron_backward.default(g.contiguous(), x.contiguous(), a, b, scale, *needs)


# -- weights ----------------------------------------------------------------------------------------------------------


def kron_sum_weight(a, b, scale):
    if _empty(a, b):
        return a.new_zeros(a.shape[1] * b.shape[1], a.shape[2] * b.shape[2])
    return _ops.kron_sum_weight.default(a.contiguous(), b.contiguous(), scale)


def kron_sum_weight_backward(g, a, b, scale, needs):
    if _empty(a, b):
        return tuple(t.new_zeros(t.shape if need else 0) for t, need in zip((a, b), needs, strict=True))
    return _ops.kron_sum_weight_backward.default(g.contiguous(), a.contiguous(), b.contiguous(), scale, *needs)


def kron_add(w, w1, w2, alpha):
    return kron_add_(w.clone(memory_format=torch.contiguous_format), w1, w2, alpha)


def kron_add_(w, w1, w2, alpha):
    if 1 not in w.stride():
        return kron_add(w, w1, w2, alpha)
    _ops.kron_add_.default(w, w1, w2, alpha)
    return w
