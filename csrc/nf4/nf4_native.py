"""NF4 on the C++ launchers of the ops library, CPU and CUDA."""

from __future__ import annotations

import math

import torch

from ..common.library import unavailable as unavailable

VERIFIED_ON: frozenset[str] = frozenset()  # compute capabilities with a correct run under benchmarks/results

# The ops with CUDA launchers; all have CPU ones.
ON_CUDA = frozenset(do + kind for do in ("quantize_", "dequantize_") for kind in ("nf4", "absmax")) | {
    "nf4_linear",
    "nf4_linear_dgrad",
    "nf4_lora_linear",
    "nf4_lora_linear_backward",
}

_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
_ops = torch.ops._peft_kernels

# CUDA multiplies up to so many rows with packed weights. For more, W is read panel by panel into a workspace of this
# size, which stays in the L2 cache, and multiplied by torch.
_FEW = {torch.float32: 16, torch.bfloat16: 64, torch.float16: 64}
_PANEL_BYTES = 16 << 20


def _of_cuda(t):
    """Whether the launchers are CUDA's: on a GPU, or in their emulation."""
    return t.is_cuda or _ops is not torch.ops._peft_kernels


def _refused(*tensors) -> str:
    """The reason why a tensor that is computed with has no kernel, or ""."""
    for t in tensors:
        if t is not None and t.dtype not in _DTYPES:
            return f"no kernel for {t.dtype}"
    return ""


def _bytes(packed):
    return packed.contiguous().view(torch.uint8)


def _whole(absmax, absmax_q, code2, offset, blocksize2):
    """The scales, contiguous: (absmax, (absmax_q, code2, offset, blocksize2))"""
    nested = (t if t is None else t.contiguous() for t in (absmax_q, code2, offset))
    return absmax.contiguous(), (*nested, blocksize2)


# -- numbers to and from four bits -----------------------------------------------------------------------------------


def why_not_quantize_nf4(w, blocksize) -> str:
    return _refused(w)


def quantize_nf4(w, blocksize):
    return _ops.quantize_nf4.default(w.contiguous(), blocksize)


def why_not_dequantize_nf4(packed, absmax, shape, blocksize, dtype, *nested) -> str:
    return "" if dtype in _DTYPES else f"no kernel for {dtype}"


def dequantize_nf4(packed, absmax, shape, blocksize, dtype, *nested):
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    absmax, nested = _whole(absmax, *nested)
    _ops.dequantize_nf4_.default(out, _bytes(packed), absmax, blocksize, *nested)
    return out


def why_not_quantize_absmax(absmax, code, blocksize2) -> str:
    return _refused(absmax, code)


def quantize_absmax(absmax, code, blocksize2):
    return _ops.quantize_absmax.default(absmax.contiguous(), code.contiguous(), blocksize2)


def why_not_dequantize_absmax(q, absmax2, code, offset, blocksize2) -> str:
    return _refused(absmax2, code, offset)


def dequantize_absmax(q, absmax2, code, offset, blocksize2):
    absmax2, (q, code, offset, blocksize2) = _whole(absmax2, q, code, offset, blocksize2)
    return _ops.dequantize_absmax.default(q.view(-1), absmax2, code, offset, blocksize2)


# -- linear layers ----------------------------------------------------------------------------------------------------


def _by_panels(u):
    return _of_cuda(u) and math.prod(u.shape[:-1]) > _FEW[u.dtype]


def _panels(u, along, across):
    """(where, room): the slices of a dimension of W, `across` being the other one, and room for the largest."""
    count = -(-along * across * u.itemsize // _PANEL_BYTES)
    size = -(-along // max(count, 1) // 64) * 64
    starts = range(0, along, max(size, 1))
    return [(i, min(size, along - i)) for i in starts], u.new_empty(min(size, along) * across)


def _linear_by_panels(x, packed, absmax, n, blocksize, bias, nested):
    k, m = x.shape[-1], math.prod(x.shape[:-1])
    y, rows = x.new_empty(m, n), x.view(m, k)
    where, room = _panels(x, n, k)
    for i, size in where:
        w = room[: size * k].view(size, k)
        _ops.nf4_panel_.default(w, packed, absmax, n, k, i, 0, blocksize, *nested)
        if bias is None:
            torch.mm(rows, w.T, out=y[:, i : i + size])
        else:
            torch.addmm(bias[i : i + size], rows, w.T, out=y[:, i : i + size])
    return y.view(*x.shape[:-1], n)


def _dgrad_by_panels(g, packed, absmax, k, blocksize, nested):
    n, m = g.shape[-1], math.prod(g.shape[:-1])
    dx, rows = g.new_empty(m, k), g.view(m, n)
    where, room = _panels(g, k, n)
    for i, size in where:
        w = room[: n * size].view(n, size)
        _ops.nf4_panel_.default(w, packed, absmax, n, k, 0, i, blocksize, *nested)
        torch.mm(rows, w, out=dx[:, i : i + size])
    return dx.view(*g.shape[:-1], k)


def why_not_nf4_linear(x, packed, absmax, n, blocksize, bias, *nested) -> str:
    return _refused(x, bias)


def nf4_linear(x, packed, absmax, n, blocksize, bias, *nested):
    absmax, nested = _whole(absmax, *nested)
    x, packed, bias = x.contiguous(), _bytes(packed), None if bias is None else bias.contiguous()
    if _by_panels(x):
        bias = None if bias is None else bias.to(x.dtype)
        return _linear_by_panels(x, packed, absmax, n, blocksize, bias, nested)
    return _ops.nf4_linear.default(x, packed, absmax, n, blocksize, bias, *nested)


def why_not_nf4_linear_dgrad(g, packed, absmax, k, blocksize, *nested) -> str:
    return _refused(g)


def nf4_linear_dgrad(g, packed, absmax, k, blocksize, *nested):
    absmax, nested = _whole(absmax, *nested)
    g, packed = g.contiguous(), _bytes(packed)
    if _by_panels(g):
        return _dgrad_by_panels(g, packed, absmax, k, blocksize, nested)
    return _ops.nf4_linear_dgrad.default(g, packed, absmax, k, blocksize, *nested)


def why_not_nf4_lora_linear(x, packed, absmax, n, blocksize, a, b, scale, bias, *rest) -> str:
    return _refused(x, a, b, bias)


def nf4_lora_linear(x, packed, absmax, n, blocksize, a, b, scale, bias, p, rng, *nested):
    x, a, b = x.contiguous(), a.contiguous(), b.contiguous()
    if _by_panels(x):
        y = nf4_linear(x, packed, absmax, n, blocksize, bias, *nested)
        return y, _ops.lora_add_.default(y, x, a, b, scale, p, rng)
    absmax, nested = _whole(absmax, *nested)
    bias = None if bias is None else bias.contiguous()
    args = (x, _bytes(packed), absmax, blocksize, a, b, scale, bias, p, rng)
    return _ops.nf4_lora_linear.default(*args, *nested)


def why_not_nf4_lora_linear_backward(g, x, packed, absmax, blocksize, a, b, *rest) -> str:
    return _refused(g, x, a, b) or ("" if b.shape[0] else "no kernel for a layer without outputs")


def nf4_lora_linear_backward(g, x, packed, absmax, blocksize, a, b, t, scale, p, rng, *rest):
    *nested, needs = rest
    g, x, a, b, t = (v.contiguous() for v in (g, x, a, b, t))
    if _by_panels(x):
        dx = nf4_linear_dgrad(g, packed, absmax, x.shape[-1], blocksize, *nested) if needs[0] else None
        da, db = _ops.lora_backward_.default(dx, g, x, a, b, t, scale, p, rng, needs[1], needs[2])
        outs = zip((dx, da, db), (x, a, b), needs, strict=True)
        return tuple(out if need else like.new_empty(0) for out, like, need in outs)
    absmax, nested = _whole(absmax, *nested)
    args = (g, x, _bytes(packed), absmax, blocksize, a, b, t, scale, p, rng)
    return _ops.nf4_lora_linear_backward.default(*args, *nested, *needs)
