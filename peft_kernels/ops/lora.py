"""LoRA: a frozen linear plus a low-rank update. Hu et al. 2021, arXiv:2106.09685.

    y = x W^T + bias + scale * (drop(x) A^T) B^T        x [..., K]   W [N, K]   A [r, K]   B [N, r]   y [..., N]

With t = drop(x) A^T and g = dL/dy:

    dt = scale * g B      dA = dt^T drop(x)      dB = scale * g^T t      dx = g W + drop'(dt A)

x, y and W share one dtype (fp32, bf16, fp16 or fp64); A and B may be fp32 beside a 16-bit x. Kernels sum in fp32, round
y once, and keep only x and t [M, r] for the backward. dx has the dtype of x, dA and dB that of A and B.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _philox
from ._op import Cost, Gradient, Op, Sample
from ._tensors import as_rows

# -- references -------------------------------------------------------------------------------------------------------


def _shrink(x: Tensor, a: Tensor, p: float, rng: Tensor | None) -> tuple[Tensor, Tensor]:
    """drop(x) [M, K] and t [M, r] in the wider of the two dtypes."""
    dtype = torch.promote_types(x.dtype, a.dtype)
    dropped = _philox.dropout(as_rows(x), p, rng).to(dtype)
    return dropped, F.linear(dropped, a.to(dtype))


def _kept(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _add_reference(y, x, a, b, scale, p, rng):
    _, t = _shrink(x, a, p, rng)
    delta = F.linear(t, b.to(t.dtype)) * scale
    return (y + delta.view(y.shape)).to(y.dtype), _kept(t)


def _linear_reference(x, w, bias, a, b, scale, p, rng):
    return _add_reference(F.linear(x, w, bias), x, a, b, scale, p, rng)


def _add_backward_reference(g, x, a, b, t, scale, p, rng, needs):
    dtype = torch.promote_types(g.dtype, a.dtype)
    dropped, recomputed = _shrink(x, a, p, rng)
    t = recomputed if t is None else t
    g2 = as_rows(g).to(dtype)  # [M, N]
    dt = (g2 @ b.to(dtype)) * scale  # [M, r]
    dx = _philox.dropout(dt @ a.to(dtype), p, rng).view(x.shape).to(x.dtype) if needs[0] else x.new_empty(0)
    da = (dt.T @ dropped.to(dtype)).to(a.dtype) if needs[1] else a.new_empty(0)
    db = (g2.T @ t.to(dtype) * scale).to(b.dtype) if needs[2] else b.new_empty(0)
    return dx, da, db


def _linear_backward_reference(g, x, w, a, b, t, scale, p, rng, needs):
    dx, da, db = _add_backward_reference(g, x, a, b, t, scale, p, rng, needs)
    return (g @ w + dx if needs[0] else dx), da, db


# -- test inputs and costs --------------------------------------------------------------------------------------------

# id: leading dims, K, N, r, p
_SHAPES = {
    "one_row": ((1,), 16, 8, 4, 0.0),
    "odd": ((3, 5), 17, 13, 3, 0.0),
    "odd_dropout": ((3, 5), 17, 13, 3, 0.25),
    "wide_dropout": ((33,), 100, 51, 8, 0.5),
    "rank_zero": ((4,), 8, 6, 0, 0.0),
    "rank_24": ((9,), 64, 72, 24, 0.0),
    "one_column": ((7,), 1, 1, 1, 0.0),
    "no_rows": ((0,), 12, 10, 2, 0.1),
    "all_dropped": ((6,), 24, 8, 2, 1.0),
    "transposed": ((6, 4), 20, 12, 4, 0.0),
    "expanded": ((6, 4), 20, 12, 4, 0.0),
    "mixed": ((5, 3), 40, 24, 8, 0.25),
}


def _layouts(dtype: torch.dtype, device: str) -> Iterator[tuple[str, tuple]]:
    """(id, (x, w, bias, a, b, y, scale, p, rng)) over shapes, strides and mixed dtypes."""
    for name, (lead, k, n, r, p) in _SHAPES.items():
        low = torch.promote_types(dtype, torch.float32) if name == "mixed" else dtype
        made = torch.Generator().manual_seed(len(name))
        shapes = ((*lead, k), (n, k), (n,), (r, k), (n, r), (*lead, n))
        x, w, bias, a, b, y = (torch.randn(s, generator=made, dtype=torch.float64).to(device, dtype) for s in shapes)
        w, a, b = w * k**-0.5, (a * k**-0.5).to(low), b.to(low)
        rng = torch.tensor([2**40 + 7, -3], device=device) if p else None
        if name == "transposed":
            x, a, b, y = x.transpose(0, 1), a.T.contiguous().T, b.T.contiguous().T, y.transpose(0, 1)
        if name == "expanded":
            x, y = x[:1].expand_as(x), y[:1].expand_as(y)
        yield name, (x, w, None if name == "expanded" else bias, a, b, y, -0.5 if name == "odd" else 2.0, p, rng)


def _add_samples(dtype, device):
    for name, (x, _, _, a, b, y, scale, p, rng) in _layouts(dtype, device):
        yield Sample(name, (y, x, a, b, scale, p, rng), (0, 1, 2, 3))


def _linear_samples(dtype, device):
    for name, (x, w, bias, a, b, _, scale, p, rng) in _layouts(dtype, device):
        yield Sample(name, (x, w, bias, a, b, scale, p, rng), (0, 3, 4))


def _backward_samples(with_w: bool):
    def samples(dtype, device):
        for name, (x, w, _, a, b, g, scale, p, rng) in _layouts(dtype, device):
            t = _kept(_shrink(x, a, p, rng)[1])
            lead = (g, x, w, a, b) if with_w else (g, x, a, b)
            for needs in ((True, True, True), (False, True, False), (True, False, True)):
                yield Sample(f"{name}_{''.join(str(int(n)) for n in needs)}", (*lead, t, scale, p, rng, needs))

    return samples


def _cost(x: Tensor, a: Tensor, b: Tensor, passes: int, moved: tuple, w: Tensor | None = None) -> Cost:
    """`passes` products with each factor, one with w, and every tensor of `moved` through memory once."""
    m, k, n, r = math.prod(x.shape[:-1]), x.shape[-1], b.shape[0], a.shape[0]
    flops = 2 * m * r * (k + n) * passes + (0 if w is None else 2 * m * k * n)
    return Cost(flops, sum(t.numel() * t.element_size() for t in (*moved, a, b, w) if t is not None))


_add_backward = Op(
    "lora_add_backward",
    "(Tensor g, Tensor x, Tensor a, Tensor b, Tensor? t, float scale, float p, Tensor? rng, bool[3] needs)"
    " -> (Tensor, Tensor, Tensor)",
    family="lora",
    reference=_add_backward_reference,
    samples=_backward_samples(with_w=False),
    cost=lambda g, x, a, b, *_: _cost(x, a, b, 2, (g, x, x, a, b)),
)

_linear_backward = Op(
    "lora_linear_backward",
    "(Tensor g, Tensor x, Tensor w, Tensor a, Tensor b, Tensor? t, float scale, float p, Tensor? rng, bool[3] needs)"
    " -> (Tensor, Tensor, Tensor)",
    family="lora",
    reference=_linear_backward_reference,
    samples=_backward_samples(with_w=True),
    cost=lambda g, x, w, a, b, *_: _cost(x, a, b, 2, (g, x, x, a, b), w),
)


def _wanted(grads: tuple, needs: tuple) -> tuple:
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


def _add_gradient(tensors, constants, grads, needs):
    (x, a, b, t, rng), (scale, p) = tensors, constants
    wanted = (needs[1], needs[2], needs[3])
    if not any(wanted):
        return grads[0], *(None,) * 6
    t = None if torch.is_grad_enabled() else t
    out = _add_backward(grads[0], x, a, b, t, scale, p, rng, wanted)
    return grads[0], *_wanted(out, wanted), None, None, None


def _linear_gradient(tensors, constants, grads, needs):
    (x, w, a, b, t, rng), (scale, p) = tensors, constants
    if needs[1] or needs[2]:
        raise RuntimeError("lora_linear: w and bias are frozen; train them through F.linear and lora_add")
    wanted = (needs[0], needs[3], needs[4])
    t = None if torch.is_grad_enabled() else t
    dx, da, db = _wanted(_linear_backward(grads[0], x, w, a, b, t, scale, p, rng, wanted), wanted)
    return dx, None, None, da, db, None, None, None


_add = Op(
    "lora_add",
    "(Tensor y, Tensor x, Tensor a, Tensor b, float scale, float p, Tensor? rng) -> (Tensor, Tensor)",
    family="lora",
    reference=_add_reference,
    samples=_add_samples,
    cost=lambda y, x, a, b, *_: _cost(x, a, b, 1, (y, y, x)),
    gradient=Gradient(lambda args, out: ((*args[1:4], out[1], args[6]), args[4:6]), _add_gradient),
    autocast=(0, 1),
)

_linear = Op(
    "lora_linear",
    "(Tensor x, Tensor w, Tensor? bias, Tensor a, Tensor b, float scale, float p, Tensor? rng) -> (Tensor, Tensor)",
    family="lora",
    reference=_linear_reference,
    samples=_linear_samples,
    cost=lambda x, w, bias, a, b, *_: _cost(x, a, b, 1, (x, bias, F.linear(x.to("meta"), w.to("meta"))), w),
    gradient=Gradient(lambda args, out: ((*args[:2], *args[3:5], out[1], args[7]), args[5:7]), _linear_gradient),
    autocast=(0, 1, 2),
)


def dropout_of(op: str, x: Tensor, p: float, rng: Tensor | None) -> tuple[float, Tensor | None]:
    """(p, rng) checked; without dropout there is no rng."""
    if not p:
        return 0.0, None
    if not 0 <= p <= 1:
        raise ValueError(f"{op}: p is {p}; expected a probability from 0 to 1")
    if rng is None or rng.dtype != torch.int64 or rng.shape != (2,) or rng.device != x.device:
        raise ValueError(
            f"{op}: dropout p={p} needs rng, an int64[2] tensor (seed, offset) on {x.device}; draw one with "
            "torch.randint(2**62, (2,), device=x.device)"
        )
    return float(p), rng


def _checked(op: str, x: Tensor, a: Tensor, b: Tensor, scale, p: float, rng: Tensor | None):
    """The arguments shared by both ops, checked; a tensor scale moves into b, where autograd and capture follow it."""
    xs, as_, bs = x.shape, a.shape, b.shape
    if not xs or len(as_) != 2 or len(bs) != 2 or as_[1] != xs[-1] or bs[1] != as_[0]:
        raise ValueError(
            f"{op}: a {tuple(as_)} and b {tuple(bs)} do not fit x {tuple(xs)}; "
            f"expected a [r, {xs[-1] if xs else 'in'}] and b [out, r]"
        )
    if a.device != x.device or b.device != x.device:
        raise ValueError(f"{op}: x is on {x.device}, a on {a.device}, b on {b.device}; move them to one device")
    if a.dtype != b.dtype:
        raise ValueError(f"{op}: a is {a.dtype} and b {b.dtype}; give both the same dtype")
    p, rng = dropout_of(op, x, p, rng)
    if isinstance(scale, Tensor):
        b, scale = b * scale, 1.0
    return b, float(scale), p, rng


def lora_add(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float | Tensor, *, p: float = 0.0, rng: Tensor | None = None
) -> Tensor:
    """y + scale * (drop(x) a^T) b^T, a new tensor.

    y [..., out]   x [..., in]   a [r, in]   b [out, r]   scale float or 0-d tensor (differentiable)
    p, rng: dropout of x with probability p; rng is int64[2] (seed, offset) on x's device and alone decides the mask.
    dtypes: y any floating dtype and kept; a and b equal, and x's dtype or wider. Differentiable in y, x, a, b.
    Raises ValueError on shapes, dtypes or devices that do not fit. Hu et al. 2021, arXiv:2106.09685.
    """
    return _add(*_add_args("lora_add", y, x, a, b, scale, p, rng))


def lora_add_(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float | Tensor, *, p: float = 0.0, rng: Tensor | None = None
) -> Tensor:
    """`lora_add` that may write into y, for a caller that owns y and goes on with the result alone."""
    return _add.call_(*_add_args("lora_add_", y, x, a, b, scale, p, rng))


def _add_args(op, y, x, a, b, scale, p, rng):
    b, scale, p, rng = _checked(op, x, a, b, scale, p, rng)
    if y.shape != (*x.shape[:-1], b.shape[0]):
        raise ValueError(f"{op}: y is {tuple(y.shape)}; expected {(*x.shape[:-1], b.shape[0])} from x and b")
    return y, x, a, b, scale, p, rng


def lora_linear(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float | Tensor,
    *,
    p: float = 0.0,
    rng: Tensor | None = None,
) -> Tensor:
    """x w^T + bias + scale * (drop(x) a^T) b^T in one op: the update accumulates into the linear's own output.

    x [..., in]   w [out, in]   bias [out] or None   a [r, in]   b [out, r]   scale float or 0-d tensor
    Arguments and errors otherwise as in lora_add. w and bias are meant to be frozen: the gradients are those of x, a
    and b. If w or bias does require grad, the op falls back to F.linear followed by lora_add, which trains them too.
    """
    b, scale, p, rng = _checked("lora_linear", x, a, b, scale, p, rng)
    if w.shape != (b.shape[0], x.shape[-1]):
        raise ValueError(f"lora_linear: w is {tuple(w.shape)}; expected [{b.shape[0]}, {x.shape[-1]}] from b and x")
    if torch.is_grad_enabled() and (w.requires_grad or (bias is not None and bias.requires_grad)):
        return _add.call_(F.linear(x, w, bias), x, a, b, scale, p, rng)
    return _linear(x, w, bias, a, b, scale, p, rng)
