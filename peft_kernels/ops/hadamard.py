"""The fast Walsh-Hadamard transform. Fino and Algazi 1976, doi:10.1109/TC.1976.1674569.

    y = scale * (H pad(x))[:n]      x, y [..., n]      H_1 = [1]      H_2m = [[H_m, H_m], [H_m, -H_m]]

along the last dimension. H has the 2^m rows of the smallest power of two that holds n, in natural order and not
normalised: H = H^T and H H = 2^m I. Zeros pad x and the result is cropped to n again, so a size that is no power of
two takes the leading block of H, which is symmetric too:

    dx = scale * (H pad(g))[:n]      g = dL/dy

All is added in fp32 (fp64 where x is), and the result rounded to x's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ._op import Cost, Gradient, Op, Sample
from ._tensors import nbytes

LARGEST = 1 << 26


def padded(n: int) -> int:
    """The smallest power of two that is no smaller than n >= 1."""
    return 1 << (int(n) - 1).bit_length()


def transform(y: Tensor) -> Tensor:
    """H y along the last dimension, a power of two, in y's dtype: a level of butterflies after the other."""
    half = 1
    while half < y.shape[-1]:
        a, b = y.unflatten(-1, (-1, 2, half)).unbind(-2)
        y = torch.stack((a + b, a - b), -2).flatten(-3)
        half *= 2
    return y


def _reference(x, scale):
    n = x.shape[-1]
    y = F.pad(x.to(torch.promote_types(x.dtype, torch.float32)), (0, padded(n) - n))
    return (transform(y)[..., :n] * scale).to(x.dtype)


# id: shape of x
_SHAPES = {
    "one": (3, 1),
    "two": (2,),
    "rows": (3, 2, 16),
    "odd": (3, 23),
    "no_rows": (0, 12),
    "transposed": (32, 3),
    "long": (1, 300),
}


def _samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    for name, shape in _SHAPES.items():
        made = torch.Generator().manual_seed(sum(shape))
        x = torch.randn(shape, generator=made, dtype=torch.float64).to(device, dtype)
        yield Sample(name, (x.T if name == "transposed" else x, 0.3), (0,))


def _cost(x, scale):
    n = padded(x.shape[-1])
    return Cost(math.prod(x.shape[:-1]) * n * (n.bit_length() - 1), 2 * nbytes(x))


_fwht: Op = Op(
    "fwht",
    "(Tensor x, float scale) -> Tensor",
    family="hadamard",
    reference=_reference,
    samples=_samples,
    cost=_cost,
    gradient=Gradient(
        lambda args, out: ((), args[1:]), lambda tensors, constants, grads, needs: (_fwht(grads[0], *constants), None)
    ),
)


def fwht(x: Tensor, scale: float = 1.0) -> Tensor:
    """scale * H x along the last dimension, H the unnormalised Walsh-Hadamard matrix in natural order, in x's dtype.

    x [..., n] fp32, bf16, fp16 or fp64, n from 1 to 2^26; where n is no power of two, x is padded with zeros and the
    result cropped. Differentiable in x; keeps nothing. fwht(fwht(x)) is n x for a power of two n.
    Raises ValueError on another size or dtype.
    """
    if not x.dim() or not 1 <= x.shape[-1] <= LARGEST:
        raise ValueError(f"fwht: x is {tuple(x.shape)}; expected [..., n] with n from 1 to 2^26")
    if not x.is_floating_point():
        raise ValueError(f"fwht: x is {x.dtype}; expected a floating point dtype, as x.float() has")
    return _fwht(x, scale)
