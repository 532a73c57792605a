"""Rescaling on the C++ launchers of the ops library, CPU and CUDA."""

from __future__ import annotations

import torch

from ..common.library import unavailable as unavailable

VERIFIED_ON: frozenset[str] = frozenset()  # compute capabilities with a correct run under benchmarks/results

ON_CUDA = frozenset(("rescale", "rescale_backward"))  # the ops with CUDA launchers; all have CPU ones

_ops = torch.ops._peft_kernels
_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
_MAPPED = 1 << 23  # numbers in fp32 from which malloc maps the memory of a result anew each time (32 MiB)


def why_not_rescale(x, l) -> str:
    if x.dtype not in _DTYPES:
        return f"no kernel for {x.dtype}"
    if l.dtype not in (x.dtype, torch.float32):
        return f"l is {l.dtype}; the kernels take {x.dtype} or float32"
    return ""


def _of_torch(x, l):
    """Is there nothing to gain over torch's own product?"""
    return x.dtype == l.dtype == torch.float32


def rescale(x, l):
    if _of_torch(x, l) and x.numel() < _MAPPED:
        return x.contiguous() * l
    return _ops.rescale.default(x.contiguous(), l.contiguous())


def rescale_(x, l):
    if _of_torch(x, l) or not x.is_contiguous():
        return x.mul_(l)
    _ops.rescale_.default(x, l.contiguous())
    return x


def why_not_rescale_backward(g, x, l, needs) -> str:
    return why_not_rescale(x, l) or ("" if g.dtype == x.dtype else f"g is {g.dtype} and x {x.dtype}")


def rescale_backward(g, x, l, needs):
    return _ops.rescale_backward.default(g.contiguous(), x.contiguous(), l.contiguous(), *needs)
