"""Weights that are Kronecker products: sums of small ones, and one added to a large weight in place.

    kron_sum_weight:  H = scale * sum over i of A_i kron B_i        A [n, p, q]   B [n, r, s]   H [p r, q s]
    kron_add_:        W += alpha * w1 kron w2                       w1 [o1, i1]   w2 [o2, i2]   W [o1 o2, i1 i2]

The sum is the weight of a PHM layer (Zhang et al. 2021, arXiv:2102.08597), whose n products take as many operations as
the dense one: H is built once per forward. With G = dL/dH cut into G[i, k, j, l] = G[i r + k, j s + l]:

    dA_n[i, j] = scale * sum over k, l of G[i, k, j, l] B_n[k, l]    dB_n[k, l] = scale * sum of G[i, k, j, l] A_n[i, j]

Neither the n products nor, for kron_add_, the one is ever formed. Sums are fp32, H and W are rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._op import Cost, Gradient, Op, Sample, write
from ._tensors import nbytes

# -- references -------------------------------------------------------------------------------------------------------


def _sum_reference(a, b, scale):
    (n, p, q), (_, r, s) = a.shape, b.shape
    h = (a * scale).reshape(n, p * q).T @ b.reshape(n, r * s)
    return h.view(p, q, r, s).transpose(1, 2).reshape(p * r, q * s)


def _sum_backward_reference(g, a, b, scale, needs):
    (n, p, q), (_, r, s) = a.shape, b.shape
    g = g.reshape(p, r, q, s).transpose(1, 2).reshape(p * q, r * s) * scale
    da = (b.reshape(n, r * s) @ g.T).view(a.shape) if needs[0] else a.new_empty(0)
    db = (a.reshape(n, p * q) @ g).view(b.shape) if needs[1] else b.new_empty(0)
    return da, db


def _add_reference(w, w1, w2, alpha):
    dtype = torch.promote_types(torch.promote_types(w.dtype, w1.dtype), torch.float32)
    (o1, i1), (o2, i2) = w1.shape, w2.shape
    product = (w1.to(dtype) * alpha)[:, None, :, None] * w2.to(dtype)[None, :, None, :]
    return (w.to(dtype) + product.reshape(o1 * o2, i1 * i2)).to(w.dtype)


# -- test inputs and costs --------------------------------------------------------------------------------------------

# id: n, p, q, r, s
_SHAPES = {
    "phm": (4, 4, 4, 12, 6),
    "odd": (3, 5, 2, 7, 19),
    "one_term": (1, 6, 3, 4, 33),
    "ones": (2, 1, 1, 1, 1),
    "no_terms": (0, 2, 3, 4, 5),
    "transposed": (2, 3, 4, 18, 17),
}


def _layouts(dtype: torch.dtype, device: str) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """(id, a, b, g)"""
    for name, (n, p, q, r, s) in _SHAPES.items():
        made = torch.Generator().manual_seed(len(name))
        shapes = ((n, p, q), (n, r, s), (p * r, q * s))
        a, b, g = (torch.randn(shape, generator=made, dtype=torch.float64).to(device, dtype) for shape in shapes)
        if name == "transposed":
            a, b, g = a.mT.contiguous().mT, b.mT.contiguous().mT, g.T.contiguous().T
        yield name, a, b, g


def _sum_samples(dtype, device):
    for name, a, b, _ in _layouts(dtype, device):
        yield Sample(name, (a, b, -0.5 if name == "odd" else 1.0), (0, 1))


def _sum_backward_samples(dtype, device):
    for name, a, b, g in _layouts(dtype, device):
        for needs in ((True, True), (False, True)) if name == "odd" else ((True, True),):
            yield Sample(f"{name}_{''.join(str(int(n)) for n in needs)}", (g, a, b, 2.0, needs))


def _add_samples(dtype, device):
    for name, a, b, w in _layouts(dtype, device):
        if len(a):
            wide = torch.promote_types(dtype, torch.float32) if name == "odd" else dtype
            yield Sample(name, (w, a[0].to(wide), b[0].to(wide), 1.0 if name == "phm" else -0.3))


# -- the ops ----------------------------------------------------------------------------------------------------------


def _sum_cost(a: Tensor, b: Tensor, moved: int, products: int) -> Cost:
    h = a[0].numel() * b[0].numel() if len(a) else a.shape[1:].numel() * b.shape[1:].numel()
    return Cost(2 * products * len(a) * h, moved * nbytes(a, b) + h * a.element_size())


_sum_backward = Op(
    "kron_sum_weight_backward",
    "(Tensor g, Tensor a, Tensor b, float scale, bool[2] needs) -> (Tensor, Tensor)",
    family="kron",
    reference=_sum_backward_reference,
    samples=_sum_backward_samples,
    cost=lambda g, a, b, scale, needs: _sum_cost(a, b, 2, sum(needs)),
)


def _sum_gradient(tensors, constants, grads, needs):
    wanted = (needs[0], needs[1])
    da, db = _sum_backward(grads[0], *tensors, *constants, wanted)
    return da if wanted[0] else None, db if wanted[1] else None, None


_sum = Op(
    "kron_sum_weight",
    "(Tensor a, Tensor b, float scale) -> Tensor",
    family="kron",
    reference=_sum_reference,
    samples=_sum_samples,
    cost=lambda a, b, scale: _sum_cost(a, b, 1, 1),
    gradient=Gradient(lambda args, out: (args[:2], args[2:]), _sum_gradient),
)

_add = Op(
    "kron_add",
    "(Tensor w, Tensor w1, Tensor w2, float alpha) -> Tensor",
    family="kron",
    reference=_add_reference,
    samples=_add_samples,
    cost=lambda w, w1, w2, alpha: Cost(2 * w.numel(), 2 * nbytes(w) + nbytes(w1, w2)),
)


def kron_sum_weight(a: Tensor, b: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """scale * sum over i of a[i] kron b[i]: the weight of a PHM layer, without the n products.

    a [n, p, q]   b [n, r, s], of one dtype   scale float or 0-d tensor -> [p r, q s]. Differentiable in a and b.
    Raises ValueError on shapes, dtypes or devices that do not fit. Zhang et al. 2021, arXiv:2102.08597.
    """
    if a.dim() != 3 or b.dim() != 3 or len(a) != len(b):
        raise ValueError(
            f"kron_sum_weight: a is {tuple(a.shape)} and b {tuple(b.shape)}; expected [n, p, q] and [n, r, s]"
        )
    if a.dtype != b.dtype or a.device != b.device:
        raise ValueError(
            f"kron_sum_weight: a is {a.dtype} on {a.device} and b {b.dtype} on {b.device}; give both alike"
        )
    if isinstance(scale, Tensor):
        a, scale = a * scale.to(a), 1.0
    return _sum(a, b, float(scale))


def kron_add_(w: Tensor, w1: Tensor, w2: Tensor, alpha: float = 1.0) -> Tensor:
    """w += alpha * w1 kron w2, in place; the product is never formed. No autograd. Returns w.

    w [o1 o2, i1 i2], any strides   w1 [o1, i1] and w2 [o2, i2] of one dtype, w's or wider
    The sum is rounded to w's dtype once. Raises ValueError on shapes, dtypes or devices that do not fit.
    """
    if w.dim() != 2 or w1.dim() != 2 or w2.dim() != 2 or w.shape != (len(w1) * len(w2), w1.shape[1] * w2.shape[1]):
        raise ValueError(
            f"kron_add_: w is {tuple(w.shape)}, w1 {tuple(w1.shape)} and w2 {tuple(w2.shape)}; "
            "expected [o1 o2, i1 i2], [o1, i1] and [o2, i2]"
        )
    if w1.dtype != w2.dtype or not w.device == w1.device == w2.device:
        raise ValueError(
            f"kron_add_: w is on {w.device}, w1 {w1.dtype} on {w1.device} and w2 {w2.dtype} on {w2.device}; "
            "give both factors one dtype, and all one device"
        )
    with torch.no_grad():
        write(w, _add.call_(w, w1, w2, float(alpha)))
    return w
