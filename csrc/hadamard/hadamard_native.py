"""The Walsh-Hadamard transform and Fastfood on the C++ launchers of the ops library."""

from __future__ import annotations

import torch

from ..common.library import unavailable as unavailable

VERIFIED_ON: frozenset[str] = frozenset()  # compute capabilities with a correct run under benchmarks/results

ON_CUDA = frozenset(("fwht", "fastfood", "fastfood_backward"))  # the ops with CUDA launchers; all have CPU ones

_ops = torch.ops._peft_kernels
_MOST_ON_CUDA = 1 << 15
_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))


def _without_kernel(*tensors) -> str:
    return next((f"no kernel for {t.dtype}" for t in tensors if t is not None and t.dtype not in _DTYPES), "")


def _of_cuda(t):
    """Whether the launchers are CUDA's: on a GPU, or in their emulation."""
    return t.is_cuda or _ops is not torch.ops._peft_kernels


def _state(sign, g) -> str:
    if len(sign) > _MOST_ON_CUDA and _of_cuda(sign):
        return f"d is {len(sign)}; the CUDA kernels sum into at most {_MOST_ON_CUDA} bins"
    return "" if g.dtype in (torch.int16, torch.float32) else f"g is {g.dtype}; the kernels take int16 or float32"


def why_not_fwht(x, scale) -> str:
    return _without_kernel(x)


def fwht(x, scale):
    return _ops.fwht.default(x.contiguous(), scale)


def why_not_fastfood(theta, sign, pi_mod, g, base, numel, scale) -> str:
    return _without_kernel(theta, base) or _state(sign, g)


def fastfood(theta, sign, pi_mod, g, base, numel, scale):
    base = None if base is None else base.contiguous()
    return _ops.fastfood.default(*(t.contiguous() for t in (theta, sign, pi_mod, g)), base, numel, scale)


def why_not_fastfood_backward(dy, sign, pi_mod, g, scale) -> str:
    return _without_kernel(dy) or _state(sign, g)


def fastfood_backward(dy, sign, pi_mod, g, scale):
    return _ops.fastfood_backward.default(*(t.contiguous() for t in (dy, sign, pi_mod, g)), scale)


def fastfood_state(quantiles, seed, n, d):
    """sign, pi_mod and g of a seed, not an op of its own: see ops/fastfood_state.py."""
    return _ops.fastfood_state.default(quantiles, seed, n, d)
