"""Products with a Kronecker product that is never formed: KronA, LoKr. Edalati et al. 2022, arXiv:2212.10650.

    y = acc + scale * x (A kron B) + bias       x [..., p r]   A [p, q]   B [r, s]   y, acc [..., q s]   bias [q s]

(A kron B)[i r + k, j s + l] = A[i, j] B[k, l]. With row m of x as X [p, r], those of y and g = dL/dy as Y, G [q, s]:

    Y = scale A^T X B       dX = scale A G B^T       dA = scale sum over m of X B G^T       dB = scale sum of X^T A G

so two small products, A's and B's, in the order that takes fewer operations. dacc = g, dbias = sum over m of g.
A linear weight W [out, in] = w1 kron w2 is y = x W^T, hence A = w1^T and B = w2^T: the factors may have any strides.

x may be fp32, bf16, fp16 or fp64; A and B have its dtype or, beside a 16-bit x, fp32. Only x and the factors are kept
for the backward. Kernels sum in fp32 and round y once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ._op import Cost, Gradient, Op, Sample
from ._tensors import as_rows, nbytes

# -- references -------------------------------------------------------------------------------------------------------


def b_first(p: int, q: int, r: int, s: int) -> bool:
    """Does x (A kron B) take no more operations with B's product first than with A's?"""
    return p * s * (r + q) <= q * r * (p + s)


def _matrices(x: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """x [..., rows columns] as [M, rows, columns]"""
    return x.reshape(math.prod(x.shape[:-1]), rows, columns).to(dtype)


def _times(x: Tensor, b: Tensor) -> Tensor:
    """[M, rows, k] times [k, columns] as one product"""
    m, rows, k = x.shape
    return (x.reshape(m * rows, k) @ b).view(m, rows, b.shape[1])


def _both(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a^T X b of each X [p, r]"""
    if b_first(*a.shape, *b.shape):
        return torch.matmul(a.T, _times(x, b))
    return _times(torch.matmul(a.T, x), b)


def _summed(u: Tensor, v: Tensor) -> Tensor:
    """sum over m of U V^T, as one product of copies: as many products and their sum, or einsum, take longer"""
    u, v = (t.transpose(0, 1).reshape(t.shape[1], len(t) * t.shape[2]) for t in (u, v))
    return u @ v.T


def _add_reference(acc, x, a, b, bias, scale):
    dtype = torch.promote_types(x.dtype, a.dtype)
    (p, q), (r, s) = a.shape, b.shape
    y = _both(_matrices(x, p, r, dtype), a.to(dtype) * scale, b.to(dtype)).view(*x.shape[:-1], q * s)
    y = y if bias is None else y + bias
    return y.to(x.dtype) if acc is None else (acc + y).to(acc.dtype)


def _linear_reference(x, a, b, bias, scale):
    return _add_reference(None, x, a, b, bias, scale)


def _backward_reference(g, x, a, b, scale, needs):
    dtype = torch.promote_types(torch.promote_types(g.dtype, x.dtype), a.dtype)
    (p, q), (r, s) = a.shape, b.shape
    x2, g2 = _matrices(x, p, r, dtype), _matrices(g, q, s, dtype)
    scaled, wide = a.to(dtype) * scale, b.to(dtype)
    if p * s * (3 * r + 2 * q) <= q * r * (3 * p + 2 * s):
        v = torch.matmul(scaled, g2)  # [M, p, s]
        dx = _times(v, wide.T)
        db = as_rows(x2).T @ as_rows(v)
        da = _summed(_times(x2, wide), g2) * scale if needs[1] else None
    else:
        h = _times(g2, wide.T)  # [M, q, r]
        dx = torch.matmul(scaled, h)
        da = _summed(x2, h) * scale
        db = as_rows(torch.matmul(scaled.T, x2)).T @ as_rows(g2) if needs[2] else None
    return (
        dx.reshape(x.shape).to(x.dtype) if needs[0] else x.new_empty(0),
        da.to(a.dtype) if needs[1] else a.new_empty(0),
        db.to(b.dtype) if needs[2] else b.new_empty(0),
    )


# -- test inputs and costs --------------------------------------------------------------------------------------------

# id: leading dims, p, q, r, s
_SHAPES = {
    "one_row": ((1,), 4, 4, 8, 8),
    "odd": ((3, 3), 3, 5, 7, 6),
    "wide": ((2,), 9, 5, 17, 33),
    "narrow": ((3,), 17, 18, 3, 2),
    "no_rows": ((0,), 3, 2, 4, 5),
    "ones": ((2,), 1, 1, 1, 1),
    "one_by_three": ((5,), 1, 3, 20, 2),
    "transposed": ((3, 2), 4, 6, 5, 9),
    "expanded": ((4, 2), 5, 2, 3, 8),
    "mixed": ((2, 2), 6, 3, 8, 16),
}


def _layouts(dtype: torch.dtype, device: str) -> Iterator[tuple[str, tuple, Tensor]]:
    """(id, (acc, x, a, b, bias, scale), g) over shapes, strides and mixed dtypes."""
    for name, (lead, p, q, r, s) in _SHAPES.items():
        low = torch.promote_types(dtype, torch.float32) if name == "mixed" else dtype
        made = torch.Generator().manual_seed(len(name))
        shapes = ((*lead, q * s), (*lead, p * r), (p, q), (r, s), (q * s,), (*lead, q * s))
        acc, x, a, b, bias, g = (torch.randn(n, generator=made, dtype=torch.float64).to(device, dtype) for n in shapes)
        a, b, bias = (a * p**-0.5).to(low), (b * r**-0.5).to(low), bias.to(low)
        if name == "transposed":
            acc, x, g = acc.transpose(0, 1), x.transpose(0, 1), g.transpose(0, 1)
            a, b = a.T.contiguous().T, b.T.contiguous().T
        if name == "expanded":
            acc, x, g = acc[:1].expand_as(acc), x[:1].expand_as(x), g[:1].expand_as(g)
        yield name, (acc, x, a, b, None if name == "expanded" else bias, -0.5 if name == "odd" else 2.0), g


def _linear_samples(dtype, device):
    for name, (_, *args), _ in _layouts(dtype, device):
        yield Sample(name, tuple(args), (0, 1, 2) if args[3] is None else (0, 1, 2, 3))


def _add_samples(dtype, device):
    for name, args, _ in _layouts(dtype, device):
        if name in ("one_row", "odd", "narrow", "transposed", "expanded", "mixed"):
            yield Sample(name, args, (0, 1, 2, 3) if args[4] is None else (0, 1, 2, 3, 4))


def _backward_samples(dtype, device):
    for name, (_, x, a, b, _, scale), g in _layouts(dtype, device):
        yield Sample(name, (g, x, a, b, scale, (True, True, True)))
        if name in ("odd", "narrow"):
            yield Sample(f"{name}_a", (g, x, a, b, scale, (False, True, False)))
            yield Sample(f"{name}_b", (g, x, a, b, scale, (False, False, True)))


def _cost(acc, x, a, b, bias, scale):
    m, (p, q), (r, s) = math.prod(x.shape[:-1]), a.shape, b.shape
    y = m * q * s * x.element_size()
    return Cost(2 * m * min(p * s * (r + q), q * r * (p + s)), nbytes(acc, x, a, b, bias) + y)


def _backward_cost(g, x, a, b, scale, needs):
    m, (p, q), (r, s) = math.prod(x.shape[:-1]), a.shape, b.shape
    flops = 2 * m * min(p * s * (3 * r + 2 * q), q * r * (3 * p + 2 * s))
    return Cost(flops, nbytes(g, x, a, b) + sum(nbytes(t) for t, need in zip((x, a, b), needs, strict=True) if need))


# -- the ops ----------------------------------------------------------------------------------------------------------

_backward = Op(
    "kron_linear_backward",
    "(Tensor g, Tensor x, Tensor a, Tensor b, float scale, bool[3] needs) -> (Tensor, Tensor, Tensor)",
    family="kron",
    reference=_backward_reference,
    samples=_backward_samples,
    cost=_backward_cost,
)


def _gradients(tensors, constants, g, needs):
    """Of x, a, b and bias, which has a dtype if there is one."""
    (x, a, b), (scale, bias) = tensors, constants
    out = _backward(g, x, a, b, scale, needs[:3]) if any(needs[:3]) else (None,) * 3
    dbias = as_rows(g).sum(0, dtype=torch.promote_types(g.dtype, torch.float32)).to(bias) if needs[3] else None
    return *(grad if need else None for grad, need in zip(out, needs, strict=False)), dbias, None


def _keep(args, out):
    *tensors, bias, scale = args
    return tuple(tensors[-3:]), (scale, None if bias is None else bias.dtype)


_linear = Op(
    "kron_linear",
    "(Tensor x, Tensor a, Tensor b, Tensor? bias, float scale) -> Tensor",
    family="kron",
    reference=_linear_reference,
    samples=_linear_samples,
    cost=lambda *args: _cost(None, *args),
    gradient=Gradient(_keep, lambda tensors, constants, grads, needs: _gradients(tensors, constants, grads[0], needs)),
    autocast=(0,),
)

_add = Op(
    "kron_linear_add",
    "(Tensor acc, Tensor x, Tensor a, Tensor b, Tensor? bias, float scale) -> Tensor",
    family="kron",
    reference=_add_reference,
    samples=_add_samples,
    cost=_cost,
    gradient=Gradient(
        _keep,
        lambda tensors, constants, grads, needs: (grads[0], *_gradients(tensors, constants, grads[0], needs[1:])),
    ),
    autocast=(0, 1),
)


def _checked(op: str, acc: Tensor | None, x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, scale) -> tuple:
    """(x, a, b, bias, scale); a tensor scale moves into a, where autograd and capture follow it."""
    if a.dim() != 2 or b.dim() != 2 or not x.dim() or x.shape[-1] != a.shape[0] * b.shape[0]:
        raise ValueError(
            f"{op}: a {tuple(a.shape)} and b {tuple(b.shape)} do not fit x {tuple(x.shape)}; "
            "expected a [p, q], b [r, s] and x [..., p r]"
        )
    out = (*x.shape[:-1], a.shape[1] * b.shape[1])
    if acc is not None and acc.shape != out:
        raise ValueError(f"{op}: acc is {tuple(acc.shape)}; expected {out} from x, a and b")
    if bias is not None and bias.shape != out[-1:]:
        raise ValueError(f"{op}: bias is {tuple(bias.shape)}; expected [{out[-1]}] from a and b")
    device = x.device
    for t in (a, b, acc, bias):
        if t is not None and t.device != device:
            raise ValueError(f"{op}: x is on {device}, another tensor on {t.device}; move them to one device")
    if a.dtype != b.dtype:
        raise ValueError(f"{op}: a is {a.dtype} and b {b.dtype}; give both the same dtype")
    if isinstance(scale, Tensor):
        a, scale = a * scale.to(a), 1.0
    return x, a, b, bias, float(scale)


def kron_linear(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    acc: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | Tensor = 1.0,
) -> Tensor:
    """acc + scale * x (a kron b) + bias, a new tensor; the Kronecker product is never formed.

    x [..., p r]   a [p, q]   b [r, s]   acc [..., q s] or None   bias [q s] or None   scale float or 0-d tensor
    For a linear weight w1 kron w2 [out, in], give w1.T and w2.T: a and b may have any strides and are read in place.
    dtypes: a and b equal, and x's dtype or wider; the result has that of acc, else of x. Differentiable in all tensors.
    Raises ValueError on shapes, dtypes or devices that do not fit. Edalati et al. 2022, arXiv:2212.10650.
    """
    args = _checked("kron_linear", acc, x, a, b, bias, scale)
    return _linear(*args) if acc is None else _add(acc, *args)


def kron_linear_(
    acc: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float | Tensor = 1.0,
) -> Tensor:
    """`kron_linear` that may write into acc, for a caller that owns acc and goes on with the result alone."""
    return _add.call_(acc, *_checked("kron_linear_", acc, x, a, b, bias, scale))
