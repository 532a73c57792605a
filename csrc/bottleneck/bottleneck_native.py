"""Bottleneck adapters on the C++ launchers of the ops library."""

from __future__ import annotations

import functools

import torch

from ..common.library import unavailable as unavailable
from . import _cuda

VERIFIED_ON: frozenset[str] = frozenset()  # compute capabilities with a correct run under benchmarks/results
ON_CUDA = _cuda.OPS  # the ops with CUDA launchers; all have CPU ones

_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
_FEW = 64  # rows up to which packing weights takes as long as multiplying with them
_SMALL = 1 << 14  # numbers of weights that are packed in no time
_WORK = 1 << 22  # multiply-adds of bfloat16 for which calling torch several times takes longer
_ops = torch.ops._peft_kernels


@functools.cache
def _torch_multiplies(dtype) -> bool:
    """Does torch have instructions for products of this dtype, which the kernels, who sum in fp32 ones, have not?"""
    return dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported()


def _of_cuda(t):
    """Whether the launchers are CUDA's: on a GPU, or in their emulation."""
    return t.is_cuda or _ops is not torch.ops._peft_kernels


def why_not_bottleneck(x, ln_w, ln_b, wd, bd, wu, bu, gate, act, scale, eps, p, rng) -> str:
    if _of_cuda(x):
        return _cuda.why_not(x, x, ln_w, ln_b, wd, bd, wu, bu, gate)
    for t in (x, ln_w, ln_b, wd, bd, wu, bu, gate):
        if t is not None and t.dtype not in _DTYPES:
            return f"no kernel for {t.dtype}"
    if not wd.numel() or not wu.numel():
        return "the bottleneck or one of its sides has no width"
    rows, size = x.shape[:-1].numel(), wd.numel() + wu.numel()
    if rows < _FEW and size > _SMALL:
        return f"torch's own products are faster with fewer than {_FEW} rows"
    if x.dtype == wd.dtype and _torch_multiplies(x.dtype) and rows * size > _WORK:
        return "torch's own products of bfloat16 are faster on this CPU"
    return ""


def why_not_bottleneck_add(residual, x, *args) -> str:
    if _of_cuda(x):
        return _cuda.why_not(residual, x, *args[:7])
    return why_not_bottleneck(x, *args) or ("" if residual.dtype in _DTYPES else f"no kernel for {residual.dtype}")


def why_not_bottleneck_backward(g, *args) -> str:
    if args[8] is None or (args[12] is not None and args[9] is None):
        return "z and stats are those of the reference's own recomputation"
    if _of_cuda(g):
        return _cuda.why_not(g, *args[:8])
    return why_not_bottleneck(*args[:8], *args[10:15]) or ("" if g.dtype in _DTYPES else f"no kernel for {g.dtype}")


def _weights(ln_w, ln_b, wd, bd, wu, bu, gate):
    """Contiguous; vectors as float32."""
    ln_w, ln_b, bd, bu, gate = (None if t is None else t.float().contiguous() for t in (ln_w, ln_b, bd, bu, gate))
    return ln_w, ln_b, wd.contiguous(), bd, wu.contiguous(), bu, gate


def bottleneck(x, *args):
    x = x.contiguous()
    return _into(x.new_empty(x.shape), x, x, *args)


def bottleneck_add(residual, x, *args):
    return _into(residual.new_empty(residual.shape), residual.contiguous(), x.contiguous(), *args)


def bottleneck_add_(residual, x, *args):
    if not residual.is_contiguous():
        return bottleneck_add(residual, x, *args)
    return _into(residual, residual, x.contiguous(), *args)


def _into(y, residual, x, *args):
    if _of_cuda(x):
        return _cuda.forward(_ops, y, residual, x, *args)
    weights, constants = args[:7], args[7:]
    rows, wide = x.numel() // x.shape[-1], torch.promote_types(x.dtype, torch.float32)
    z = x.new_empty(rows, len(weights[2]), dtype=torch.promote_types(x.dtype, weights[2].dtype))
    stats = None if constants[2] is None else x.new_empty(2, rows, dtype=wide)
    _ops.bottleneck_.default(y, z, stats, residual, x, *_weights(*weights), *constants)
    return y, z, x.new_empty(0, dtype=wide) if stats is None else stats


def bottleneck_backward(g, x, *args):
    if _of_cuda(g):
        return _cuda.backward(_ops, g, x, *args)
    weights, (z, stats), constants, own_residual, needs = args[:7], args[7:9], args[9:14], args[14], args[15]
    inputs = (x, *weights)
    make = torch.empty if x.numel() else torch.zeros
    exact = (0, 3, 5)  # dx, dwd and dwu are rounded by the kernel, vectors come as float32
    grads = [
        make(t.shape, dtype=t.dtype if i in exact else torch.float32, device=t.device) if need else None
        for i, (t, need) in enumerate(zip(inputs, needs, strict=True))
    ]
    if x.numel():
        dx, dln_w, dln_b, dwd, dbd, dwu, dbu, dgate = grads
        _ops.bottleneck_backward_.default(
            *(dx, dwd, dwu, dln_w, dln_b, dbd, dbu, dgate),
            *(g.contiguous(), x.contiguous(), *_weights(*weights), z.contiguous(), stats, *constants, own_residual),
        )
    return tuple(x.new_empty(0) if d is None else d.to(t.dtype) for d, t in zip(grads, inputs, strict=True))
