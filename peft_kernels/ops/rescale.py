"""Rescaling of features, the operation of (IA)^3. Liu et al. 2022, arXiv:2205.05638.

    y = x * l        x [..., n]   l [n]        with g = dL/dy:   dx = g * l      dl = sum over rows of g * x

x and y share one dtype; l may be fp32 beside a 16-bit x. Kernels multiply and sum in fp32 and round once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._op import Cost, Gradient, Op, Sample

# id: shape of x
_SHAPES = {
    "one_row": (1, 16),
    "odd": (3, 5, 17),
    "one_column": (9, 1),
    "no_rows": (0, 12),
    "long": (515, 33),
    "flat": (40,),
}


def _reference(x, l):
    return (x * l).to(x.dtype)


def _backward_reference(g, x, l, needs):
    dtype = torch.promote_types(torch.promote_types(g.dtype, l.dtype), torch.float32)
    dx = (g.to(dtype) * l).to(x.dtype) if needs[0] else x.new_empty(0)
    rows = (g.to(dtype) * x).flatten(0, -2) if g.dim() > 1 else (g.to(dtype) * x)[None]
    dl = rows.sum(0).to(l.dtype) if needs[1] else l.new_empty(0)
    return dx, dl


def _tensors(dtype, device):
    for name, shape in _SHAPES.items():
        made = torch.Generator().manual_seed(sum(shape))
        x, g = (torch.randn(shape, generator=made, dtype=torch.float64).to(device, dtype) for _ in range(2))
        l = torch.rand(shape[-1], generator=made, dtype=torch.float64) + 0.5
        yield name, x, l.to(device, dtype), g
        if name == "odd":
            yield "transposed", x.transpose(0, 1), l.to(device, dtype), g.transpose(0, 1)
            if dtype in (torch.bfloat16, torch.float16):
                yield "mixed", x, l.to(device, torch.float32), g


def _samples(dtype, device):
    for name, x, l, _ in _tensors(dtype, device):
        yield Sample(name, (x, l), (0, 1))


def _backward_samples(dtype, device):
    for name, x, l, g in _tensors(dtype, device):
        yield Sample(name, (g, x, l, (True, True)))
        yield Sample(name + "_l_only", (g, x, l, (False, True)))


_backward = Op(
    "rescale_backward",
    "(Tensor g, Tensor x, Tensor l, bool[2] needs) -> (Tensor, Tensor)",
    family="rescale",
    reference=_backward_reference,
    samples=_backward_samples,
    cost=lambda g, x, l, needs: Cost(3 * x.numel(), 3 * x.numel() * x.element_size()),
)


def _keep(args, out):
    x, l = args
    return (x if l.requires_grad else None, l), ()  # dx takes l alone


def _gradient(tensors, constants, grads, needs):
    x, l = tensors
    wanted = (needs[0], needs[1])
    dx, dl = _backward(grads[0], grads[0] if x is None else x, l, wanted)
    return dx if needs[0] else None, dl if needs[1] else None


_rescale = Op(
    "rescale",
    "(Tensor x, Tensor l) -> Tensor",
    family="rescale",
    reference=_reference,
    samples=_samples,
    cost=lambda x, l: Cost(x.numel(), 2 * x.numel() * x.element_size()),
    gradient=Gradient(_keep, _gradient),
)


def _check(op: str, x: Tensor, l: Tensor) -> None:
    if l.dim() != 1 or x.dim() == 0 or l.shape[0] != x.shape[-1]:
        width = x.shape[-1] if x.dim() else "n"
        raise ValueError(f"{op}: l is {tuple(l.shape)}; expected [{width}] from x {tuple(x.shape)}")
    if l.device != x.device:
        raise ValueError(f"{op}: x is on {x.device}, l on {l.device}; move them to one device")


def rescale(x: Tensor, l: Tensor) -> Tensor:
    """x * l along the last dimension, in x's dtype.

    x [..., n] fp32, bf16, fp16 or fp64   l [n] of x's dtype or wider. Differentiable in both.
    Raises ValueError on shapes or devices that do not fit. Liu et al. 2022, arXiv:2205.05638.
    """
    _check("rescale", x, l)
    return _rescale(x, l)


def rescale_(x: Tensor, l: Tensor) -> Tensor:
    """`rescale` that may write into x, for a caller that owns x and goes on with the result alone.

    Where l gets a gradient it does not: dl is a sum over x, which is therefore kept as it is.
    """
    _check("rescale_", x, l)
    if torch.is_grad_enabled() and l.requires_grad:
        return _rescale(x, l)
    return _rescale.call_(x, l)
