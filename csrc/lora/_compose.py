"""The LoRA ops made of two primitives each, so that every backend writes only those.

One adapter:

add_(y, x, a, b, scale, p, rng) -> t        y += scale * t b^T in place, t = drop(x) a^T [M, r] fp32
backward_(dx, g, x, a, b, t, scale, p, rng, need_da, need_db) -> (da, db)        dx += drop'(dt a) in place unless None

Many adapters, bank = (a, bt, r_indptr, scaling, ids), plan as plan.py makes it or None, no adapter wider than r_max:

multi_add_(y, x, *bank, plan, r_max, p, rng)        y += scale * t bt in place
multi_backward_(dx, g, x, *bank, plan, r_max, p, rng, need_da, need_dbt) -> (da, dbt)
    dx += drop'(dt a) in place unless None
apply_(y, x, *bank, plan, r_max, slice_n)        as multi_add_, where y is outputs of these widths side by side

Several linears of one x, slices = (a, bs, scales), a [R, K] and t [M, R] being those of all side by side:

slices_add_(ys, x, *slices, p, rng) -> t        each y += scale * t_s b^T in place
slices_backward_(dx, gs, x, *slices, t, p, rng, need_da, need_db) -> (da, dbs)        dx += drop'(dt a) unless None
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
SERVED = DTYPES | {torch.int32, torch.int64}  # those of rng, r_indptr and ids too


def why_not(*args) -> str:
    """The reason why kernels of these primitives cannot serve the arguments of a LoRA op, or ""."""
    for a in args:
        if type(a) is not float and isinstance(a, torch.Tensor) and a.dtype not in SERVED:
            return f"no kernel for {a.dtype}"
    return ""


def _frozen(x, w, bias):
    """x made contiguous, and the output of the frozen linear for an update to be added into."""
    x = x.contiguous()
    y = F.linear(x, w, bias)
    if y._is_view():  # of a 2-d product nobody else holds; as a view it could not be written into by a later op
        y = torch.ops.aten._unsafe_view(y, y.shape)
    return x, y


def _wanted(outs, likes, needs):
    return tuple(out if need else like.new_empty(0) for out, like, need in zip(outs, likes, needs, strict=True))


def compose(add_, backward_):
    """(lora_add, lora_add_, lora_add_backward, lora_linear, lora_linear_backward) over the primitives."""

    def lora_add(y, x, a, b, scale, p, rng):
        y = y.clone(memory_format=torch.contiguous_format)
        return y, add_(y, x.contiguous(), a.contiguous(), b.contiguous(), scale, p, rng)

    def lora_add_inplace(y, x, a, b, scale, p, rng):
        if not y.is_contiguous():
            return lora_add(y, x, a, b, scale, p, rng)
        return y, add_(y, x.contiguous(), a.contiguous(), b.contiguous(), scale, p, rng)

    def gradients(dx, g, x, a, b, t, scale, p, rng, needs):
        a, b, t = a.contiguous(), b.contiguous(), t.contiguous()
        da, db = backward_(dx, g.contiguous(), x.contiguous(), a, b, t, scale, p, rng, needs[1], needs[2])
        return _wanted((dx, da, db), (x, a, b), needs)

    def lora_add_backward(g, x, a, b, t, scale, p, rng, needs):
        dx = torch.zeros_like(x, memory_format=torch.contiguous_format) if needs[0] else None
        return gradients(dx, g, x, a, b, t, scale, p, rng, needs)

    def lora_linear(x, w, bias, a, b, scale, p, rng):
        x, y = _frozen(x, w, bias)
        return y, add_(y, x, a.contiguous(), b.contiguous(), scale, p, rng)

    def lora_linear_backward(g, x, w, a, b, t, scale, p, rng, needs):
        g = g.contiguous()
        return gradients(g @ w if needs[0] else None, g, x, a, b, t, scale, p, rng, needs)

    return lora_add, lora_add_inplace, lora_add_backward, lora_linear, lora_linear_backward


def compose_multi(add_, backward_, apply_):
    """The same five of multi_lora over its primitives, then (lora_apply, lora_apply_)."""

    def packed(a, bt, r_indptr, scaling, ids):
        return a.contiguous(), bt.contiguous(), r_indptr.contiguous(), scaling.float().contiguous(), ids.contiguous()

    def multi_lora_add_inplace(y, x, *args):
        if not y.is_contiguous():
            return multi_lora_add(y, x, *args)
        add_(y, x.contiguous(), *packed(*args[:5]), *args[5:])
        return y

    def lora_apply_inplace(y, x, *args):
        if not y.is_contiguous():
            return lora_apply(y, x, *args)
        apply_(y, x.contiguous(), *packed(*args[:5]), *args[5:])
        return y

    def lora_apply(y, *args):
        return lora_apply_inplace(y.clone(memory_format=torch.contiguous_format), *args)

    def multi_lora_add(y, *args):
        return multi_lora_add_inplace(y.clone(memory_format=torch.contiguous_format), *args)

    def gradients(dx, g, x, a, bt, *args):
        *args, needs = args
        bank = packed(a, bt, *args[:3])
        da, dbt = backward_(dx, g.contiguous(), x.contiguous(), *bank, *args[3:], needs[1], needs[2])
        return _wanted((dx, da, dbt), (x, a, bt), needs)

    def multi_lora_add_backward(g, x, *args):
        dx = torch.zeros_like(x, memory_format=torch.contiguous_format) if args[-1][0] else None
        return gradients(dx, g, x, *args)

    def multi_lora_linear(x, w, bias, *args):
        x, y = _frozen(x, w, bias)
        return multi_lora_add_inplace(y, x, *args)

    def multi_lora_linear_backward(g, x, w, *args):
        g = g.contiguous()
        return gradients(g @ w if args[-1][0] else None, g, x, *args)

    return (
        multi_lora_add,
        multi_lora_add_inplace,
        multi_lora_add_backward,
        multi_lora_linear,
        multi_lora_linear_backward,
        lora_apply,
        lora_apply_inplace,
    )


def compose_slices(add_, backward_):
    """(lora_linear_slices, lora_linear_slices_backward) over the primitives."""

    def lists(spread):
        n = len(spread) // 4
        return [spread[i * n : (i + 1) * n] for i in range(4)]

    def factors(as_, bs, scales):
        return torch.cat(as_), [b.contiguous() for b in bs], scales

    def lora_linear_slices(x, scales, p, rng, *spread):
        ws, biases, as_, bs = lists(spread)
        x = x.contiguous()
        ys = [_frozen(x, w, bias)[1] for w, bias in zip(ws, biases, strict=True)]
        return ys, add_(ys, x, *factors(as_, bs, scales), p, rng)

    def lora_linear_slices_backward(x, t, scales, p, rng, needs, *spread):
        gs, ws, as_, bs = lists(spread)
        gs, dx = [g.contiguous() for g in gs], None
        if needs[0]:
            (g, w), *others = zip(gs, ws, strict=True)
            dx = g @ w
            rows = dx.view(math.prod(x.shape[:-1]), x.shape[-1])
            for g, w in others:
                rows.addmm_(g.view(len(rows), len(w)), w)
        slices = factors(as_, bs, scales)
        da, dbs = backward_(dx, gs, x.contiguous(), *slices, t.contiguous(), p, rng, needs[1], needs[2])
        return *_wanted((dx, da), (x, slices[0]), needs[:2]), list(dbs) if needs[2] else [b.new_empty(0) for b in bs]

    return lora_linear_slices, lora_linear_slices_backward


def one_by_one(add_, backward_):
    """The primitives of several linears over those of one, for kernels that have no better way."""

    def slices_add_(ys, x, a, bs, scales, p, rng):
        own = a.split([b.shape[1] for b in bs])
        return torch.cat([add_(y, x, *rest, p, rng) for y, *rest in zip(ys, own, bs, scales, strict=True)], 1)

    def slices_backward_(dx, gs, x, a, bs, scales, t, *rest):
        ranks = [b.shape[1] for b in bs]
        every = zip(gs, a.split(ranks), bs, t.split(ranks, 1), scales, strict=True)
        das, dbs = zip(
            *(backward_(dx, g, x, own, b, u.contiguous(), s, *rest) for g, own, b, u, s in every), strict=True
        )
        return None if das[0] is None else torch.cat(das), dbs

    return slices_add_, slices_backward_
