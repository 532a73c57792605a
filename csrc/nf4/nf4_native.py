"""NF4 on the C++ launchers of the ops library, CPU."""

from __future__ import annotations

import torch

from ..common.library import unavailable as unavailable

VERIFIED_ON: frozenset[str] = frozenset()  # compute capabilities with a correct run under benchmarks/results
ON_CUDA: frozenset[str] = frozenset()  # the ops with CUDA launchers; all have CPU ones

_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
_launch = torch.ops._peft_kernels


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
    return _launch.quantize_nf4.default(w.contiguous(), blocksize)


def why_not_dequantize_nf4(packed, absmax, shape, blocksize, dtype, *nested) -> str:
    return "" if dtype in _DTYPES else f"no kernel for {dtype}"


def dequantize_nf4(packed, absmax, shape, blocksize, dtype, *nested):
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    absmax, nested = _whole(absmax, *nested)
    _launch.dequantize_nf4_.default(out, _bytes(packed), absmax, blocksize, *nested)
    return out


def why_not_quantize_absmax(absmax, code, blocksize2) -> str:
    return _refused(absmax, code)


def quantize_absmax(absmax, code, blocksize2):
    return _launch.quantize_absmax.default(absmax.contiguous(), code.contiguous(), blocksize2)


def why_not_dequantize_absmax(q, absmax2, code, offset, blocksize2) -> str:
    return _refused(absmax2, code, offset)


def dequantize_absmax(q, absmax2, code, offset, blocksize2):
    absmax2, (q, code, offset, blocksize2) = _whole(absmax2, q, code, offset, blocksize2)
    return _launch.dequantize_absmax.default(q.view(-1), absmax2, code, offset, blocksize2)


# -- linear layers ----------------------------------------------------------------------------------------------------


def why_not_nf4_linear(x, packed, absmax, n, blocksize, bias, *nested) -> str:
    return _refused(x, bias)


def nf4_linear(x, packed, absmax, n, blocksize, bias, *nested):
    absmax, nested = _whole(absmax, *nested)
    bias = None if bias is None else bias.contiguous()
    return _launch.nf4_linear.default(x.contiguous(), _bytes(packed), absmax, n, blocksize, bias, *nested)


def why_not_nf4_linear_dgrad(g, packed, absmax, k, blocksize, *nested) -> str:
    return _refused(g)


def nf4_linear_dgrad(g, packed, absmax, k, blocksize, *nested):
    absmax, nested = _whole(absmax, *nested)
    return _launch.nf4_linear_dgrad.default(g.contiguous(), _bytes(packed), absmax, k, blocksize, *nested)


def why_not_nf4_lora_linear(x, packed, absmax, n, blocksize, a, b, scale, bias, *rest) -> str:
    return _refused(x, a, b, bias)


def nf4_lora_linear(x, packed, absmax, n, blocksize, a, b, scale, bias, p, rng, *nested):
    absmax, nested = _whole(absmax, *nested)
    x, a, b = x.contiguous(), a.contiguous(), b.contiguous()
    bias = None if bias is None else bias.contiguous()
    args = (x, _bytes(packed), absmax, blocksize, a, b, scale, bias, p, rng)
    return _launch.nf4_lora_linear.default(*args, *nested)


def why_not_nf4_lora_linear_backward(g, x, packed, absmax, blocksize, a, b, *rest) -> str:
    return _refused(g, x, a, b) or ("" if b.shape[0] else "no kernel for a layer without outputs")


def nf4_lora_linear_backward(g, x, packed, absmax, blocksize, a, b, t, scale, p, rng, *rest):
    *nested, needs = rest
    absmax, nested = _whole(absmax, *nested)
    g, x, a, b = (v.contiguous() for v in (g, x, a, b))
    args = (g, x, _bytes(packed), absmax, blocksize, a, b, t, scale, p, rng)
    return _launch.nf4_lora_linear_backward.default(*args, *nested, *needs)
