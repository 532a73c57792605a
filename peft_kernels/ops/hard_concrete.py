"""A sparse update under hard-concrete gates, of DiffPruning. Guo et al. 2021, arXiv:2012.07463; Louizos et al. 2018,
arXiv:1712.01312.

    s = sigmoid(log(u / (1 - u)) + alpha)      z = clamp(s (r - l) + l, 0, 1)      l = -1.5   r = 1.5
    result = w0 + w z(alpha) z(alpha_group)    one alpha_group for the whole tensor, or none

u = 1e-4 + (1 - 2e-4) U, with U the upper 24 bits of a Philox word over 2^24, and 1 - u = 1e-4 + (1 - 2e-4) (1 - U),
which loses no digits. Element e takes word e % 4 of the counter (e // 4, 0, offset low, offset high), the group's gate
word 0 of (0, 1, offset low, offset high), the key is the seed: rng = (seed, offset). Without rng s is sigmoid(alpha).
So the backward makes the gates again, and nothing is kept but w and alpha. With g = dL/dresult and Z the group's gate:

    dw0 = g    dw = g z Z    dalpha = g w Z z'    dalpha_group = Z' sum g w z    z' = (r - l) s (1 - s) where 0 < z < 1

All is computed in fp32 (fp64 where a tensor is), and the result rounded to w0's dtype.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import _philox
from ._op import Cost, Gradient, Op, Sample

LEFT, RIGHT = -1.5, 1.5  # l and r
MARGIN = 1e-4  # of u to 0 and 1


def _dtype(*tensors: Tensor | None) -> torch.dtype:
    dtype = torch.float32
    for t in tensors:
        dtype = dtype if t is None else torch.promote_types(dtype, t.dtype)
    return dtype


def _logit(word: Tensor, dtype: torch.dtype) -> Tensor:
    """log(u / (1 - u)) of Philox words."""
    uniform = (word >> 8).to(dtype) * 2.0**-24
    scale = 1 - 2 * MARGIN
    return torch.log(MARGIN + scale * uniform) - torch.log(MARGIN + scale * (1 - uniform))


def _sigmoid(alpha: Tensor, rng: Tensor | None, group: bool, dtype: torch.dtype) -> Tensor:
    """s of every element, or of the group."""
    alpha = alpha.to(dtype)
    if rng is None:
        return alpha.sigmoid()
    if group:
        return (alpha + _logit(_philox.words(rng, 2, 1)[0][1, 0], dtype)).sigmoid()
    words = torch.stack(_philox.words(rng, 1, (alpha.numel() + 3) // 4), -1).flatten()[: alpha.numel()]
    return (alpha + _logit(words, dtype).view(alpha.shape)).sigmoid()


def _gate(s: Tensor) -> Tensor:
    return (s * (RIGHT - LEFT) + LEFT).clamp(0, 1)


def _slope(s: Tensor) -> Tensor:
    """dz / dalpha."""
    stretched = s * (RIGHT - LEFT) + LEFT
    return torch.where((stretched > 0) & (stretched < 1), (RIGHT - LEFT) * s * (1 - s), 0)


def _reference(w0, w, alpha, alpha_group, rng):
    dtype = _dtype(w0, w, alpha, alpha_group)
    change = w.to(dtype) * _gate(_sigmoid(alpha, rng, False, dtype))
    if alpha_group is not None:
        change = change * _gate(_sigmoid(alpha_group, rng, True, dtype))
    return (w0 + change).to(w0.dtype)


def _backward_reference(g, w, alpha, alpha_group, rng, needs):
    dtype = _dtype(g, w, alpha, alpha_group)
    g2, w2, s = g.to(dtype), w.to(dtype), _sigmoid(alpha, rng, False, dtype)
    group = None if alpha_group is None else _sigmoid(alpha_group, rng, True, dtype)
    whole = 1.0 if group is None else _gate(group)
    dw, dalpha, dgroup = w.new_empty(0), alpha.new_empty(0), alpha.new_empty(0)
    if needs[0]:
        dw = (g2 * _gate(s) * whole).to(w.dtype)
    if needs[1]:
        dalpha = (g2 * w2 * whole * _slope(s)).to(alpha.dtype)
    if needs[2] and group is not None:
        dgroup = ((g2 * w2 * _gate(s)).sum() * _slope(group)).to(alpha_group.dtype)
    return dw, dalpha, dgroup


# id: shape, alpha_group or None, with rng
_SHAPES = {
    "odd": ((3, 17), None, True),
    "group": ((5, 7), 0.7, True),
    "scalar": ((), 1.4, True),
    "one": ((1,), None, True),
    "deterministic": ((9, 5), 0.6, False),
    "empty": ((0, 4), 0.5, True),
    "long": ((67, 129), 0.9, True),
    "transposed": ((12, 10), None, True),
    "mixed": ((33, 3), 0.4, True),
}


def _tensors(dtype: torch.dtype, device: str) -> Iterator[tuple[str, Tensor, tuple]]:
    """(id, w0 or its gradient, the arguments behind it)."""
    for name, (shape, group, random) in _SHAPES.items():
        made = torch.Generator().manual_seed(163 + len(name))  # with sums that do not nearly cancel
        w0, w, alpha = (torch.randn(shape, generator=made, dtype=torch.float64).to(device, dtype) for _ in range(3))
        if name in ("scalar", "one"):  # one number has the relative error of all: no term cancels, gates near 1
            w0, alpha = w / 2, torch.full_like(alpha, 0.45)
        low = torch.promote_types(dtype, torch.float32) if name == "mixed" else dtype
        w, alpha = w.to(low), (alpha * 2).to(low)
        if name == "transposed":
            w0, w, alpha = w0.T, w.T.contiguous(), alpha.T
        of_group = None if group is None else torch.tensor(group, dtype=low, device=device)
        rng = torch.tensor([2**40 + 7, -14], device=device) if random else None  # the gates of groups are half open
        yield name, w0, (w, alpha, of_group, rng)


def _samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    for name, w0, rest in _tensors(dtype, device):
        yield Sample(name, (w0, *rest), (0, 1, 2, 3)[: 3 if rest[2] is None else 4])


def _backward_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    for name, g, rest in _tensors(dtype, device):
        for needs in ((True, True, rest[2] is not None), (False, True, False), (True, False, False)):
            yield Sample(f"{name}_{''.join(str(int(n)) for n in needs)}", (g, *rest, needs))


def _cost(passes: int, *tensors: Tensor) -> Cost:
    """Flops of a gate: Philox's multiplications, the exponential function and what is around it, about 60."""
    return Cost(60 * tensors[0].numel(), sum(t.numel() * t.element_size() for t in tensors) * passes // 2)


_backward = Op(
    "hard_concrete_backward",
    "(Tensor g, Tensor w, Tensor alpha, Tensor? alpha_group, Tensor? rng, bool[3] needs) -> (Tensor, Tensor, Tensor)",
    family="sparse",
    reference=_backward_reference,
    samples=_backward_samples,
    cost=lambda g, w, alpha, alpha_group, rng, needs: _cost(2, g, w, w, alpha, alpha),
)


def _gradient(tensors, constants, grads, needs):
    wanted = tuple(needs[1:4])
    if not any(wanted):
        return grads[0], None, None, None, None
    out = _backward(grads[0], *tensors, wanted)
    return grads[0] if needs[0] else None, *(o if n else None for o, n in zip(out, wanted, strict=True)), None


_hard_concrete = Op(
    "hard_concrete",
    "(Tensor w0, Tensor w, Tensor alpha, Tensor? alpha_group, Tensor? rng) -> Tensor",
    family="sparse",
    reference=_reference,
    samples=_samples,
    cost=lambda w0, w, alpha, *rest: _cost(2, w0, w0, w, alpha),
    gradient=Gradient(lambda args, out: (args[1:], ()), _gradient),
)


def hard_concrete(
    w0: Tensor, w: Tensor, alpha: Tensor, *, alpha_group: Tensor | None = None, rng: Tensor | None = None
) -> Tensor:
    """w0 + w * z(alpha) * z(alpha_group) with hard-concrete gates z from 0 to 1, in w0's dtype.

    w0, w, alpha of one shape, any; fp32, bf16, fp16 or fp64, w and alpha best fp32   alpha_group 0-d or None
    rng: int64 (seed, offset) on the device of w0, from `torch.randint`; equal numbers give equal gates everywhere.
        None: gates without noise, sigmoid(alpha) stretched and clamped, as they are used in evaluation.
    Differentiable in w0, w, alpha and alpha_group; keeps w and alpha, no gates. Fewer than 2^34 elements.
    Raises ValueError on shapes or devices that do not fit.
    """
    if not w0.shape == w.shape == alpha.shape:
        got = ", ".join(str(tuple(t.shape)) for t in (w0, w, alpha))
        raise ValueError(f"hard_concrete: w0, w and alpha are {got}; expected one shape")
    if alpha_group is not None and alpha_group.dim():
        raise ValueError(f"hard_concrete: alpha_group is {tuple(alpha_group.shape)}; expected 0-d, one for the tensor")
    if rng is not None and (rng.shape != (2,) or rng.dtype != torch.int64):
        raise ValueError(f"hard_concrete: rng is {rng.dtype} {tuple(rng.shape)}; expected int64 [2], (seed, offset)")
    if len({t.device for t in (w0, w, alpha, alpha_group, rng) if t is not None}) > 1:
        raise ValueError("hard_concrete: its tensors are on several devices; move them to one device")
    return _hard_concrete(w0, w, alpha, alpha_group, rng)
