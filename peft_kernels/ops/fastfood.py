"""The projection of Intrinsic SAID, Fastfood. Aghajanyan et al. 2021, arXiv:2012.13255; Le et al. 2013,
arXiv:1408.3060.

    result = base + scale * (H_n G Pi H_n B pad(theta))[:numel]      theta [d]      n = 2^m >= max(numel, k)

H as in hadamard.py, B = diag(sign), Pi a permutation of n, G = diag(g). With k the smallest power of two that holds d,
pad(theta) is zero past k and H_n = H_{n/k} kron H_k, so H_n B pad(theta) is n / k copies of one vector of k, and of Pi
only the values modulo k count. That leaves one of the two transforms of size k, and of the permutation a gather:

    t = H_k pad(sign * theta)      v_i = g_i t[pi_mod_i]      result = base + scale * (H_n v)[:numel]

The gradients are, with dy = dL/dresult, dbase = dy and

    u = H_n pad(dy)      b_j = sum over i with pi_mod_i = j of g_i u_i      dtheta = scale * sign * (H_k b)[:d]

g is fp32, or int16 in units of 2^-12. All is computed in fp32 (fp64 where theta, base or dy is), and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ._op import Cost, Gradient, Op, Sample
from ._tensors import nbytes
from .fastfood_state import UNIT, fastfood_state
from .hadamard import LARGEST, padded, transform


def _dtype(*tensors: Tensor | None) -> torch.dtype:
    dtype = torch.float32
    for t in tensors:
        dtype = dtype if t is None else torch.promote_types(dtype, t.dtype)
    return dtype


def _values(g: Tensor, dtype: torch.dtype) -> Tensor:
    return g.to(dtype) if g.is_floating_point() else g.to(dtype) * UNIT


# -- references -------------------------------------------------------------------------------------------------------


def _reference(theta, sign, pi_mod, g, base, numel, scale):
    dtype, d = _dtype(theta, base), theta.shape[0]
    k = padded(d)
    t = transform(F.pad(theta.to(dtype) * sign, (0, k - d)))
    v = _values(g, dtype) * t.index_select(0, pi_mod.long() % k)
    change = transform(v)[:numel] * scale
    return change.to(theta.dtype) if base is None else (base + change.view(base.shape)).to(base.dtype)


def _backward_reference(dy, sign, pi_mod, g, scale):
    dtype, k = _dtype(dy), padded(sign.shape[0])
    u = transform(F.pad(dy.to(dtype).flatten(), (0, g.shape[0] - dy.numel()))) * _values(g, dtype)
    b = torch.zeros(k, dtype=dtype, device=dy.device).index_add(0, pi_mod.long() % k, u)
    return transform(b)[: sign.shape[0]] * sign * scale


# -- test inputs and costs --------------------------------------------------------------------------------------------

# id: d, shape of the result
_SHAPES = {
    "odd": (5, (13,)),
    "base": (6, (3, 5)),
    "one": (1, (1,)),
    "wide": (19, (4,)),
    "floats": (7, (8, 2)),
    "mixed": (40, (9, 31)),
    "scalar": (3, ()),
}


def _tensors(dtype: torch.dtype, device: str) -> Iterator[tuple[str, tuple, Tensor | None, Tensor]]:
    """(id, (theta, sign, pi_mod, g), base, dy)."""
    for name, (d, shape) in _SHAPES.items():
        made = torch.Generator().manual_seed(d)
        theta, base, dy = (torch.randn(s, generator=made, dtype=torch.float64) for s in ((d,), shape, shape))
        theta = theta.to(device, torch.promote_types(dtype, torch.float32) if name == "mixed" else dtype)
        sign, pi_mod, g = fastfood_state(d, math.prod(shape), d, device)
        if name == "floats":
            pi_mod, g = pi_mod.int(), (g * UNIT).to(torch.promote_types(dtype, torch.float32))
        given = None if name in ("odd", "wide") else base.to(device, dtype)
        yield name, (theta, sign, pi_mod, g), given, dy.to(device, dtype)


def _samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    for name, state, base, dy in _tensors(dtype, device):
        yield Sample(name, (*state, base, dy.numel(), 0.3), (0,) if base is None else (0, 4))


def _backward_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    for name, state, _, dy in _tensors(dtype, device):
        yield Sample(name, (dy, *state[1:], 0.3))


def _flops(g: Tensor, sign: Tensor) -> int:
    n, k = g.shape[0], padded(sign.shape[0])
    return n * n.bit_length() + k * (k.bit_length() - 1)


def _cost(theta, sign, pi_mod, g, base, numel, scale):
    result = numel * (theta if base is None else base).element_size()
    return Cost(_flops(g, sign), nbytes(theta, sign, pi_mod, g, base) + result)


# -- the ops ----------------------------------------------------------------------------------------------------------

_backward = Op(
    "fastfood_backward",
    "(Tensor dy, Tensor sign, Tensor pi_mod, Tensor g, float scale) -> Tensor",
    family="hadamard",
    reference=_backward_reference,
    samples=_backward_samples,
    cost=lambda dy, sign, pi_mod, g, scale: Cost(_flops(g, sign), nbytes(dy, sign, pi_mod, g) + 4 * sign.numel()),
)


def _gradient(tensors, constants, grads, needs):
    (dtype, scale), (dy, *_) = constants, grads
    dtheta = _backward(dy, *tensors, scale).to(dtype) if needs[0] else None
    return dtheta, None, None, None, dy if needs[4] else None, None, None


_fastfood = Op(
    "fastfood",
    "(Tensor theta, Tensor sign, Tensor pi_mod, Tensor g, Tensor? base, int numel, float scale) -> Tensor",
    family="hadamard",
    reference=_reference,
    samples=_samples,
    cost=_cost,
    gradient=Gradient(lambda args, out: (args[1:4], (args[0].dtype, args[6])), _gradient),
)


def fastfood(
    theta: Tensor,
    sign: Tensor,
    pi_mod: Tensor,
    g: Tensor,
    numel: int,
    scale: float | Tensor,
    *,
    base: Tensor | None = None,
) -> Tensor:
    """base + scale * P(theta), P the Fastfood projection from d to numel dimensions that the state describes.

    theta [d] fp32, bf16, fp16 or fp64   sign [d] int8, 1 or -1   pi_mod [n] int16 or int32, a permutation of n, taken
    modulo k, the smallest power of two >= d   g [n] fp32, or int16 in units of 2^-12   n: a power of two >= numel and k
    `fastfood_state` makes sign, pi_mod and g, `fastfood_norm` the scale with which P keeps norms.
    scale: a float, or a 0-d tensor, which is differentiated too.
    base: any shape of numel elements; the result has its shape and dtype. None: [numel] of theta's dtype.
    Differentiable in theta, scale and base; keeps the state and, where scale is a tensor, d numbers.
    Raises ValueError on values, shapes, dtypes or devices that do not fit. Aghajanyan et al. 2021, arXiv:2012.13255.
    """
    if theta.dim() != 1 or sign.shape != theta.shape or pi_mod.dim() != 1 or g.shape != pi_mod.shape:
        got = ", ".join(str(list(t.shape)) for t in (theta, sign, pi_mod, g))
        raise ValueError(f"fastfood: theta, sign, pi_mod and g are {got}; expected [d], [d], [n] and [n]")
    d, n = theta.shape[0], g.shape[0]
    if not d or n != padded(n) or not max(padded(d), numel) <= n <= LARGEST or numel < 1:
        raise ValueError(f"fastfood: n is {n}, d {d}, numel {numel}; expected fastfood_state's n, 2^m >= max(numel, d)")
    if sign.dtype != torch.int8 or pi_mod.dtype not in (torch.int16, torch.int32):
        raise ValueError(f"fastfood: sign is {sign.dtype}, pi_mod {pi_mod.dtype}; expected int8 and int16 or int32")
    if not theta.is_floating_point() or g.dtype not in (torch.int16, torch.float32, torch.float64):
        raise ValueError(
            f"fastfood: theta is {theta.dtype}, g {g.dtype}; expected floating point, and int16 or float32"
        )
    if base is not None and (base.numel() != numel or not base.is_floating_point()):
        got = f"{base.dtype} {list(base.shape)}"
        raise ValueError(f"fastfood: base is {got}; expected {numel} floating point numbers, as numel says")
    if len({t.device for t in (theta, sign, pi_mod, g, base) if t is not None}) > 1:
        raise ValueError("fastfood: its tensors are on several devices; move them to one device")
    if not isinstance(scale, Tensor):
        return _fastfood(theta, sign, pi_mod, g, base, numel, scale)
    if scale.dim():
        raise ValueError(f"fastfood: scale is {list(scale.shape)}; expected a float or a 0-d tensor")
    scaled = theta.to(_dtype(theta)) * scale  # P is linear, and d numbers are few
    out = _fastfood(scaled, sign, pi_mod, g, base, numel, 1.0)
    return out.to(theta.dtype) if base is None else out
