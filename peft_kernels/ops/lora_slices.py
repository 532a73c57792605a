"""LoRA of several frozen linears of one input, as of q, k and v, or gate and up: x is read once for all updates.

    y_s = x W_s^T + bias_s + scale_s * (drop(x) A_s^T) B_s^T        W_s [N_s, K]   A_s [r_s, K]   B_s [N_s, r_s]

There is one mask for all slices. With A and t the A_s and t_s = drop(x) A_s^T side by side, and g_s = dL/dy_s:

    dt_s = scale_s * g_s B_s    dA = dt^T drop(x)    dB_s = scale_s * g_s^T t_s    dx = sum_s g_s W_s + drop'(dt A)

dtypes and rounding are those of `lora_linear`, and what is kept is x and t [M, sum r_s].
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _philox
from ._op import Cost, Gradient, Op, Sample
from ._tensors import as_rows
from .lora import _checked, _kept, _shrink, _wanted, lora_add_

# -- references -------------------------------------------------------------------------------------------------------


def _lists(spread: Sequence, count: int) -> list[list]:
    """The lists, `count` of one length, whose members `spread` holds."""
    n = len(spread) // count
    return [list(spread[i * n : (i + 1) * n]) for i in range(count)]


def _ranks(as_: Sequence[Tensor]) -> list[int]:
    return [a.shape[0] for a in as_]


def _reference(x, scales, p, rng, *spread):
    ws, biases, as_, bs = _lists(spread, 4)
    _, t = _shrink(x, torch.cat(as_), p, rng)
    ys = []
    for w, bias, b, scale, own in zip(ws, biases, bs, scales, t.split(_ranks(as_), 1), strict=True):
        y = F.linear(x, w, bias)
        ys.append((y + (F.linear(own, b.to(t.dtype)) * scale).view(y.shape)).to(y.dtype))
    return ys, _kept(t)


def _backward_reference(x, t, scales, p, rng, needs, *spread):
    gs, ws, as_, bs = _lists(spread, 4)
    a = torch.cat(as_)
    dtype = torch.promote_types(x.dtype, a.dtype)
    dropped, recomputed = _shrink(x, a, p, rng)
    t = recomputed if t is None else t
    gs = [as_rows(g) for g in gs]
    dt = torch.cat([g.to(dtype) @ b.to(dtype) * scale for g, b, scale in zip(gs, bs, scales, strict=True)], 1)
    dx, da, dbs = x.new_empty(0), a.new_empty(0), [b.new_empty(0) for b in bs]
    if needs[0]:
        base = sum(g @ w for g, w in zip(gs, ws, strict=True))
        dx = (base + _philox.dropout(dt @ a.to(dtype), p, rng).to(x.dtype)).view(x.shape)
    if needs[1]:
        da = (dt.T @ dropped.to(dtype)).to(a.dtype)
    if needs[2]:
        parts = zip(gs, t.split(_ranks(as_), 1), bs, scales, strict=True)
        dbs = [(g.to(dtype).T @ own.to(dtype) * scale).to(b.dtype) for g, own, b, scale in parts]
    return dx, da, dbs


# -- test inputs and costs --------------------------------------------------------------------------------------------

# id: leading dims, K, (N, r) of each slice, p
_SHAPES = {
    "one_row": ((1,), 16, ((8, 4), (12, 2)), 0.0),
    "odd": ((3, 5), 17, ((13, 3), (7, 5), (21, 1)), 0.0),
    "odd_dropout": ((3, 5), 17, ((13, 3), (7, 5), (21, 1)), 0.25),
    "one_slice": ((4,), 8, ((6, 2),), 0.0),
    "rank_zero": ((4,), 24, ((8, 0), (6, 3), (5, 0)), 0.5),
    "no_ranks": ((4,), 8, ((6, 0), (3, 0)), 0.0),
    "many_rows_and_ranks": ((70,), 50, ((33, 24), (18, 50)), 0.1),
    "one_column": ((7,), 1, ((1, 1), (1, 1)), 0.0),
    "no_rows": ((0,), 12, ((10, 2), (4, 1)), 0.1),
    "all_dropped": ((6,), 24, ((8, 2), (8, 2)), 1.0),
    "transposed": ((6, 4), 20, ((12, 4), (8, 4)), 0.0),
    "expanded": ((6, 4), 20, ((12, 4), (8, 3)), 0.0),
    "mixed": ((5, 3), 40, ((24, 8), (16, 3)), 0.25),
}


def _layouts(dtype: torch.dtype, device: str) -> Iterator[tuple[str, tuple]]:
    """(id, (x, ws, biases, as_, bs, gs, scales, p, rng)) over shapes, strides and mixed dtypes."""
    for name, (lead, k, slices, p) in _SHAPES.items():
        low = torch.promote_types(dtype, torch.float32) if name == "mixed" else dtype
        made = torch.Generator().manual_seed(len(name))

        def drawn(*shape, dtype=dtype, scale=1.0, made=made):
            return (torch.randn(shape, generator=made, dtype=torch.float64) * scale).to(device, dtype)

        x = drawn(*lead, k)
        ws, as_ = [drawn(n, k, scale=k**-0.5) for n, _ in slices], [drawn(r, k, dtype=low) for _, r in slices]
        biases = [None if name == "expanded" or n == 7 else drawn(n) for n, _ in slices]
        bs, gs = [drawn(*s, dtype=low, scale=k**-0.5) for s in slices], [drawn(*lead, n) for n, _ in slices]
        if name == "transposed":
            x, as_, bs = x.transpose(0, 1), [a.T.contiguous().T for a in as_], [b.T.contiguous().T for b in bs]
            gs = [g.transpose(0, 1) for g in gs]
        if name == "expanded":
            x, gs = x[:1].expand_as(x), [g[:1].expand_as(g) for g in gs]
        rng = torch.tensor([2**40 + 7, -3], device=device) if p else None
        scales = [2.0 - i if name == "odd" else 2.0 for i in range(len(slices))]
        yield name, (x, ws, biases, as_, bs, gs, scales, p, rng)


def _samples(dtype, device):
    for name, (x, ws, biases, as_, bs, _, scales, p, rng) in _layouts(dtype, device):
        first, n = 4 + 2 * len(ws), 2 * len(ws)
        yield Sample(name, (x, scales, p, rng, *ws, *biases, *as_, *bs), (0, *range(first, first + n)))


def _backward_samples(dtype, device):
    for name, (x, ws, _, as_, bs, gs, scales, p, rng) in _layouts(dtype, device):
        t = _kept(_shrink(x, torch.cat(as_), p, rng)[1])
        for needs in ((False, True, False), (True, False, True)):  # all of them: the gradient law of the op
            args = (x, t, scales, p, rng, needs, *gs, *ws, *as_, *bs)
            yield Sample(f"{name}_{''.join(str(int(n)) for n in needs)}", args)


def _cost(x: Tensor, ws: list, as_: list, bs: list, passes: int, moved: list) -> Cost:
    """`passes` products with each factor, one with each w, and every tensor through memory once."""
    m, k = math.prod(x.shape[:-1]), x.shape[-1]
    flops = sum(2 * m * (w.numel() + passes * r * (k + len(w))) for w, r in zip(ws, _ranks(as_), strict=True))
    return Cost(flops, sum(t.numel() * t.element_size() for t in (*moved, *ws, *as_, *bs) if t is not None))


def _forward_cost(x, scales, p, rng, *spread):
    ws, biases, as_, bs = _lists(spread, 4)
    ys = [F.linear(x.to("meta"), w.to("meta")) for w in ws]
    return _cost(x, ws, as_, bs, 1, [x, *biases, *ys])


def _backward_cost(x, t, scales, p, rng, needs, *spread):
    gs, ws, as_, bs = _lists(spread, 4)
    return _cost(x, ws, as_, bs, 2, [*gs, x, x, *as_, *bs])


_backward = Op(
    "lora_linear_slices_backward",
    "(Tensor x, Tensor? t, float[] scales, float p, Tensor? rng, bool[3] needs, Tensor[] gs, Tensor[] ws, "
    "Tensor[] as_, Tensor[] bs) -> (Tensor, Tensor, Tensor[])",
    family="lora",
    reference=_backward_reference,
    samples=_backward_samples,
    cost=_backward_cost,
)


def _keep(args: tuple, out: Any) -> tuple[tuple, tuple]:
    x, scales, p, rng, *spread = args
    ws, _, as_, bs = _lists(spread, 4)
    return (x, out[1], rng, *ws, *as_, *bs), (scales, p)


def _gradient(tensors, constants, grads, needs):
    (x, t, rng, *spread), (scales, p) = tensors, constants
    n = len(scales)
    if any(needs[4 : -2 * n]):
        raise RuntimeError("lora_linear_slices: ws and biases are frozen; train them through F.linear and lora_add")
    ws, as_, _ = _lists(spread, 3)
    gs = [x.new_zeros(*x.shape[:-1], len(w)) if g is None else g for g, w in zip(grads[0], ws, strict=True)]
    wanted = (needs[0], any(needs[-2 * n : -n]), any(needs[-n:]))
    t = None if torch.is_grad_enabled() else t
    dx, da, dbs = _backward(x, t, scales, p, rng, wanted, *gs, *spread)
    das = da.split(_ranks(as_)) if wanted[1] else [da] * n
    return _wanted((dx, *[None] * (3 + 2 * n), *das, *dbs), needs)


_slices = Op(
    "lora_linear_slices",
    "(Tensor x, float[] scales, float p, Tensor? rng, Tensor[] ws, Tensor?[] biases, Tensor[] as_, Tensor[] bs)"
    " -> (Tensor[], Tensor)",
    family="lora",
    reference=_reference,
    samples=_samples,
    cost=_forward_cost,
    gradient=Gradient(_keep, _gradient),
    autocast=(0, 4, 5),
)


def lora_linear_slices(
    x: Tensor,
    ws: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    as_: Sequence[Tensor],
    bs: Sequence[Tensor],
    scales: Sequence[float | Tensor],
    *,
    p: float = 0.0,
    rng: Tensor | None = None,
) -> list[Tensor]:
    """`lora_linear` of one x at several linears, each with its own update: x w^T + bias + scale * (drop(x) a^T) b^T.

    x [..., in]   ws [out, in] each   biases [out] or None   as_ [r, in]   bs [out, r]   scales floats or 0-d tensors
    Widths and ranks differ as they like; rank 0 leaves a linear as it is. All as_ and bs have one dtype, x's or wider.
    p, rng: as in `lora_linear`, one mask for all. Differentiable in x, as_, bs and tensor scales, in one node, which
    keeps x once and adds up one dx. If a w or bias requires grad, every linear is F.linear followed by lora_add.
    Raises ValueError on shapes, dtypes or devices that do not fit, with the number of the linear.
    """
    lists = dict(ws=ws, biases=biases, as_=as_, bs=bs, scales=scales)
    counts = {name: len(members) for name, members in lists.items()}
    if len(set(counts.values())) > 1 or not ws:
        got = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise ValueError(f"lora_linear_slices: {got}; expected one of each for every linear, and one linear at least")
    scaled, factors = [], []
    for s, (w, a, b, scale) in enumerate(zip(ws, as_, bs, scales, strict=True)):
        op = f"lora_linear_slices, linear {s}"
        b, scale, p, rng = _checked(op, x, a, b, scale, p, rng)
        if w.shape != (b.shape[0], x.shape[-1]):
            raise ValueError(f"{op}: w is {tuple(w.shape)}; expected [{b.shape[0]}, {x.shape[-1]}] from b and x")
        if a.dtype != as_[0].dtype:
            raise ValueError(f"{op}: a is {a.dtype} and that of linear 0 {as_[0].dtype}; give all the same dtype")
        scaled.append(scale)
        factors.append(b)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*ws, *biases)):
        every = zip(ws, biases, as_, factors, scaled, strict=True)
        return [lora_add_(F.linear(x, w, bias), x, a, b, scale, p=p, rng=rng) for w, bias, a, b, scale in every]
    return _slices(x, scaled, p, rng, *ws, *biases, *as_, *factors)
