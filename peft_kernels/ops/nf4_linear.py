"""Linear layers on NF4 weights, which stay packed. Dettmers et al. 2023, arXiv:2305.14314 (QLoRA).

    y = x W^T + bias        dx = g W        x [..., K]   W [N, K], packed as in `quantize_nf4`   y, g = dL/dy [..., N]

and with LoRA as in `lora_linear`, accumulated into y and dx. The frozen weights get no gradient. Kernels never hold
more of W than a cache-sized piece. Where the reference rounds level * scale to x's dtype, a kernel may keep it in fp32;
sums are fp32, y and dx are rounded once. Kept for the backward: the packed tensors, and for LoRA x and t = drop(x) A^T.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import nf4
from ._op import Cost, Gradient, Op, Sample
from .lora import _add_backward_reference, _add_reference, _checked, _kept, _shrink, _wanted
from .nf4_absmax import size_of

# -- references -------------------------------------------------------------------------------------------------------


def _linear_reference(x, packed, absmax, n, blocksize, bias, *nested):
    w = nf4.weight(packed, absmax, (n, x.shape[-1]), blocksize, x.dtype, *nested)
    return F.linear(x, w, None if bias is None else bias.to(x.dtype))


def _dgrad_reference(g, packed, absmax, k, blocksize, *nested):
    return g @ nf4.weight(packed, absmax, (g.shape[-1], k), blocksize, g.dtype, *nested)


def _lora_reference(x, packed, absmax, n, blocksize, a, b, scale, bias, p, rng, *nested):
    y = _linear_reference(x, packed, absmax, n, blocksize, bias, *nested)
    return _add_reference(y, x, a, b, scale, p, rng)


def _lora_backward_reference(g, x, packed, absmax, blocksize, a, b, t, scale, p, rng, *rest):
    *nested, needs = rest
    dx, da, db = _add_backward_reference(g, x, a, b, t, scale, p, rng, needs)
    if needs[0]:
        dx = _dgrad_reference(g, packed, absmax, x.shape[-1], blocksize, *nested) + dx
    return dx, da, db


# -- test inputs and costs --------------------------------------------------------------------------------------------

_LEADS = {
    "aligned": (1,),
    "nested": (3, 5),
    "odd": (2, 3),
    "three_chunks": (33,),
    "one_block": (0,),
    "many_rows": (70,),
}


def _layouts(dtype, device):
    """(id, x [..., K], g [..., N], bias, a, b, Packed)"""
    for name, packed in nf4.layouts(device):
        n, k = packed.shape
        made = torch.Generator().manual_seed(k)
        lead = _LEADS.get(name, (4,))
        shapes = ((*lead, k), (*lead, n), (n,), (5, k), (n, 5))
        x, g, bias, a, b = (torch.randn(s, generator=made, dtype=torch.float64).to(device, dtype) for s in shapes)
        if name == "odd":
            x, g = x.transpose(0, 1), g.transpose(0, 1)
        low = torch.promote_types(dtype, torch.float32) if name == "nested" else dtype
        yield name, x, g, bias if n % 2 else None, (a * k**-0.5).to(low), b.to(low), packed


def _linear_samples(dtype, device):
    for name, x, _, bias, _, _, p in _layouts(dtype, device):
        yield Sample(name, (x, p.packed, p.absmax, p.shape[0], p.blocksize, bias, *p.nested), (0,))


def _dgrad_samples(dtype, device):
    for name, _, g, _, _, _, p in _layouts(dtype, device):
        yield Sample(name, (g, p.packed, p.absmax, p.shape[1], p.blocksize, *p.nested))


def _dropout_of(name, device):
    return (0.25, torch.tensor([2**40 + 7, -3], device=device)) if name in ("odd", "many_rows") else (0.0, None)


def _lora_layouts(dtype, device):
    return (layout for layout in _layouts(dtype, device) if layout[-1].shape[0])


def _lora_samples(dtype, device):
    for name, x, _, bias, a, b, p in _lora_layouts(dtype, device):
        lora = (a, b, 0.5, bias, *_dropout_of(name, device))
        yield Sample(name, (x, p.packed, p.absmax, p.shape[0], p.blocksize, *lora, *p.nested), (0, 5, 6))


def _lora_backward_samples(dtype, device):
    for name, x, g, _, a, b, p in _lora_layouts(dtype, device):
        drop = _dropout_of(name, device)
        t = _kept(_shrink(x, a, *drop)[1])
        for needs in ((True, True, True), (False, True, False), (True, False, False)):
            args = (g, x, p.packed, p.absmax, p.blocksize, a, b, t, 0.5, *drop, *p.nested, needs)
            yield Sample(f"{name}_{''.join(str(int(n)) for n in needs)}", args)


def _cost(x: Tensor, n: int, packed: tuple, moved: tuple = (), products: int = 0) -> Cost:
    """One product with W, which is read packed, and `products` with the factors of `moved`."""
    m, k = math.prod(x.shape[:-1]), x.shape[-1]
    tensors = [t for t in (x, *packed, *moved) if isinstance(t, Tensor)]
    factors = sum(t.numel() for t in moved if isinstance(t, Tensor) and t.dim() == 2)
    return Cost(2 * m * n * k + 2 * m * factors * products, size_of(*tensors) + m * n * x.element_size())


_dgrad = Op(
    "nf4_linear_dgrad",
    "(Tensor g, Tensor packed, Tensor absmax, SymInt in_features, int blocksize, Tensor? absmax_q, Tensor? code2,"
    " Tensor? offset, int blocksize2) -> Tensor",
    family="nf4",
    reference=_dgrad_reference,
    samples=_dgrad_samples,
    cost=lambda g, packed, absmax, k, blocksize, *nested: _cost(g, k, (packed, absmax, *nested)),
)

_lora_backward = Op(
    "nf4_lora_linear_backward",
    "(Tensor g, Tensor x, Tensor packed, Tensor absmax, int blocksize, Tensor a, Tensor b, Tensor? t, float scale,"
    " float p, Tensor? rng, Tensor? absmax_q, Tensor? code2, Tensor? offset, int blocksize2, bool[3] needs)"
    " -> (Tensor, Tensor, Tensor)",
    family="nf4",
    reference=_lora_backward_reference,
    samples=_lora_backward_samples,
    cost=lambda g, x, packed, absmax, blocksize, a, b, t, scale, p, rng, *nested: _cost(
        g, x.shape[-1], (packed, absmax, x, *nested), (a, b), 2
    ),
)


def _linear_gradient(tensors, constants, grads, needs):
    (packed, absmax, *nested), (k, blocksize, blocksize2) = tensors, constants
    if any(needs[1:]):
        raise RuntimeError("nf4_linear: packed weights and bias are frozen; only x has a gradient")
    return _dgrad(grads[0], packed, absmax, k, blocksize, *nested, blocksize2), *(None,) * 9


def _lora_gradient(tensors, constants, grads, needs):
    (x, packed, absmax, a, b, t, rng, *nested), (blocksize, scale, p, blocksize2) = tensors, constants
    wanted = (needs[0], needs[5], needs[6])
    if sum(needs) > sum(wanted):
        raise RuntimeError("nf4_lora_linear: packed weights and bias are frozen; only x, a and b have gradients")
    t = None if torch.is_grad_enabled() else t
    args = (x, packed, absmax, blocksize, a, b, t, scale, p, rng, *nested, blocksize2)
    dx, da, db = _wanted(_lora_backward(grads[0], *args, wanted), wanted)
    return dx, None, None, None, None, da, db, *(None,) * 8


_linear = Op(
    "nf4_linear",
    "(Tensor x, Tensor packed, Tensor absmax, SymInt out_features, int blocksize, Tensor? bias, Tensor? absmax_q,"
    " Tensor? code2, Tensor? offset, int blocksize2) -> Tensor",
    family="nf4",
    reference=_linear_reference,
    samples=_linear_samples,
    cost=lambda x, packed, absmax, n, blocksize, *nested: _cost(x, n, (packed, absmax, *nested)),
    gradient=Gradient(
        lambda args, out: ((*args[1:3], *args[6:9]), (args[0].shape[-1], args[4], args[9])), _linear_gradient
    ),
    autocast=(0, 5),
)

_lora_linear = Op(
    "nf4_lora_linear",
    "(Tensor x, Tensor packed, Tensor absmax, SymInt out_features, int blocksize, Tensor a, Tensor b, float scale,"
    " Tensor? bias, float p, Tensor? rng, Tensor? absmax_q, Tensor? code2, Tensor? offset, int blocksize2)"
    " -> (Tensor, Tensor)",
    family="nf4",
    reference=_lora_reference,
    samples=_lora_samples,
    cost=lambda x, packed, absmax, n, blocksize, a, b, scale, bias, p, rng, *nested: _cost(
        x, n, (packed, absmax, bias, *nested), (a, b), 1
    ),
    gradient=Gradient(
        lambda args, out: (
            (*args[:3], *args[5:7], out[1], args[10], *args[11:14]),
            (args[4], args[7], args[9], args[14]),
        ),
        _lora_gradient,
    ),
    autocast=(0, 8),
)


# -- the functions ----------------------------------------------------------------------------------------------------


def _arguments(op: str, x, packed, absmax, n, blocksize, bias, nested) -> None:
    if not x.dim() or not x.is_floating_point():
        raise ValueError(f"{op}: x is {x.dtype} {tuple(x.shape)}; expected a floating dtype and [..., in]")
    if x.device != packed.device:
        raise ValueError(f"{op}: x is on {x.device}, packed on {packed.device}; move them to one device")
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"{op}: bias is {tuple(bias.shape)}; expected [{n}] from out_features")
    nf4.checked(op, packed, absmax, n * x.shape[-1], blocksize, *nested)


def nf4_linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    out_features: int,
    blocksize: int,
    *,
    bias: Tensor | None = None,
    absmax_q: Tensor | None = None,
    code2: Tensor | None = None,
    offset: Tensor | None = None,
    blocksize2: int = 256,
) -> Tensor:
    """x W^T + bias in x's dtype, with W [out_features, in] packed by `quantize_nf4` and never materialised.

    x [..., in] fp32, bf16, fp16 or fp64   bias [out_features]   the packed weights as in `dequantize_nf4`
    Differentiable in x; a bias that requires grad is added outside of the op and trained. Raises ValueError on what
    does not fit. Dettmers et al. 2023, arXiv:2305.14314.
    """
    nested = (absmax_q, code2, offset, blocksize2)
    _arguments("nf4_linear", x, packed, absmax, out_features, blocksize, bias, nested)
    if _trained(bias):
        y = _linear(x, packed, absmax, out_features, blocksize, None, *nested)
        return y + bias.to(y.dtype)  # type: ignore[union-attr]
    return _linear(x, packed, absmax, out_features, blocksize, bias, *nested)


def nf4_lora_linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    out_features: int,
    blocksize: int,
    a: Tensor,
    b: Tensor,
    scale: float | Tensor,
    *,
    bias: Tensor | None = None,
    p: float = 0.0,
    rng: Tensor | None = None,
    absmax_q: Tensor | None = None,
    code2: Tensor | None = None,
    offset: Tensor | None = None,
    blocksize2: int = 256,
) -> Tensor:
    """x W^T + bias + scale * (drop(x) a^T) b^T, W packed as in `nf4_linear`, LoRA as in `lora_linear`.

    x [..., in]   a [r, in]   b [out_features, r] of x's dtype or wider   scale float or 0-d tensor   p, rng: dropout
    Differentiable in x, a, b and a tensor scale; a bias that requires grad is added outside of the op and trained.
    Raises ValueError on what does not fit. Dettmers et al. 2023, arXiv:2305.14314; Hu et al. 2021, arXiv:2106.09685.
    """
    nested = (absmax_q, code2, offset, blocksize2)
    _arguments("nf4_lora_linear", x, packed, absmax, out_features, blocksize, bias, nested)
    b, scale, p, rng = _checked("nf4_lora_linear", x, a, b, scale, p, rng)
    if b.shape[0] != out_features:
        raise ValueError(f"nf4_lora_linear: b is {tuple(b.shape)}; expected [{out_features}, r] from out_features")
    if _trained(bias):
        y = _lora_linear(x, packed, absmax, out_features, blocksize, a, b, scale, None, p, rng, *nested)
        return y + bias.to(y.dtype)  # type: ignore[union-attr]
    return _lora_linear(x, packed, absmax, out_features, blocksize, a, b, scale, bias, p, rng, *nested)


def _trained(bias: Tensor | None) -> bool:
    return bias is not None and bias.requires_grad and torch.is_grad_enabled()
