"""Bottleneck adapters in one op. Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2021, arXiv:2005.00247.

    h = LN(x) or x    z = h Wd^T + bd    a = drop(act(z))    y = residual + c (a Wu^T + bu)    c = scale * gate

x [..., K]   Wd [m, K]   Wu [N, m]   y, residual [..., N], the residual x itself by default   gate: one number per row

With g = dL/dy and u = drop'(c (g Wu)) * act'(z):

    dWu = (c g)^T a    dbu = sum of c g    dWd = u^T h    dbd = sum of u    dx = LN'(u Wd)    dresidual = g
    dgate = scale * (a . (g Wu) + g . bu) of each row

where dresidual joins dx if the residual is x. x is fp32, bf16, fp16 or fp64, the weights that or wider. Kernels sum in
fp32 and round y once; x, z [M, m] and two numbers per row (mean and 1 / deviation of LN) are kept for the backward.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _bottleneck, _philox
from ._op import Gradient, Op
from ._tensors import as_rows
from .lora import dropout_of

_aten = torch.ops.aten

# name: act(z), act'(z) * d of (d, z); kernels know an activation by its place
ACTIVATIONS = {
    "relu": (F.relu, lambda d, z: _aten.threshold_backward(d, z, 0)),
    "gelu": (F.gelu, _aten.gelu_backward),
    "gelu_tanh": (partial(F.gelu, approximate="tanh"), partial(_aten.gelu_backward, approximate="tanh")),
    "silu": (F.silu, lambda d, z: d * z.sigmoid() * (1 + z * (1 - z.sigmoid()))),
    "tanh": (torch.tanh, lambda d, z: _aten.tanh_backward(d, z.tanh())),
    "leaky_relu": (F.leaky_relu, lambda d, z: _aten.leaky_relu_backward(d, z, 0.01, False)),
    "identity": (lambda z: z, lambda d, z: d),
}
_NAMES, _ACTS = list(ACTIVATIONS), list(ACTIVATIONS.values())

# -- references -------------------------------------------------------------------------------------------------------


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _hidden(x, ln_w, ln_b, eps, stats, dtype):
    """(x normalised, h) [M, K] and stats [2, M]; without LN (None, x, empty)."""
    rows = as_rows(x)
    if eps is None:
        return None, rows.to(dtype), rows.new_empty(0, dtype=_wide(rows.dtype))
    rows = rows.to(_wide(rows.dtype))
    if stats is None:
        mean = rows.mean(-1)
        stats = torch.stack((mean, ((rows - mean[:, None]).square().mean(-1) + eps).rsqrt()))
    unit = (rows - stats[0][:, None]) * stats[1][:, None]
    h = unit if ln_w is None else unit * ln_w
    return unit, (h if ln_b is None else h + ln_b).to(dtype), stats


def _bias(b, dtype):
    return None if b is None else b.to(dtype)


def _add_reference(residual, x, ln_w, ln_b, wd, bd, wu, bu, gate, act, scale, eps, p, rng):
    dtype = torch.promote_types(x.dtype, wd.dtype)
    _, h, stats = _hidden(x, ln_w, ln_b, eps, None, dtype)
    z = F.linear(h, wd.to(dtype), _bias(bd, dtype))
    up = F.linear(_philox.dropout(_ACTS[act][0](z), p, rng), wu.to(dtype), _bias(bu, dtype))
    if gate is not None or scale != 1:
        up = up * (scale if gate is None else gate[:, None] * scale)
    return (residual + up.view(residual.shape)).to(residual.dtype), z, stats


def _reference(x, *args):
    return _add_reference(x, x, *args)


def _backward_reference(g, x, ln_w, ln_b, wd, bd, wu, bu, gate, z, stats, act, scale, eps, p, rng, own_residual, needs):
    dtype = torch.promote_types(torch.promote_types(g.dtype, x.dtype), wd.dtype)
    unit, h, stats = _hidden(x, ln_w, ln_b, eps, stats, dtype)
    z = (F.linear(h, wd.to(dtype), _bias(bd, dtype)) if z is None else z).to(_wide(dtype))
    rows = as_rows(g).to(dtype)
    a = _philox.dropout(_ACTS[act][0](z), p, rng)
    back = (rows @ wu.to(dtype)).to(z.dtype)  # [M, m]
    c = scale if gate is None else gate[:, None] * scale
    u = _ACTS[act][1](_philox.dropout(back * c, p, rng), z)
    dh = u.to(dtype) @ wd.to(dtype) if any(needs[:3]) else None
    dx = dln_w = dln_b = dwd = dbd = dwu = dbu = dgate = None
    if needs[0]:
        dx = dh
        if unit is not None:
            d = dh.to(z.dtype) if ln_w is None else dh.to(z.dtype) * ln_w
            dx = (d - d.mean(-1, keepdim=True) - unit * (d * unit).mean(-1, keepdim=True)) * stats[1][:, None]
        dx = dx.view(x.shape) + g if own_residual else dx.view(x.shape)
    if needs[1]:
        dln_w = (dh * unit).sum(0)
    if needs[2]:
        dln_b = dh.sum(0, dtype=z.dtype)
    if needs[3]:
        dwd = u.to(dtype).T @ h
    if needs[4]:
        dbd = u.sum(0)
    if needs[5]:
        dwu = rows.T @ (a * c).to(dtype)
    if needs[6]:
        dbu = rows.sum(0, dtype=z.dtype) * c if gate is None else (rows.to(z.dtype) * c).sum(0)
    if needs[7]:
        dgate = ((a * back).sum(-1) + (0 if bu is None else rows.to(z.dtype) @ bu.to(z.dtype))) * scale
    likes = (x, ln_w, ln_b, wd, bd, wu, bu, gate)
    grads = (dx, dln_w, dln_b, dwd, dbd, dwu, dbu, dgate)
    return tuple(x.new_empty(0) if d is None else d.to(t.dtype) for d, t in zip(grads, likes, strict=True))


# -- the ops ----------------------------------------------------------------------------------------------------------

_WEIGHTS = "Tensor? ln_w, Tensor? ln_b, Tensor wd, Tensor? bd, Tensor wu, Tensor? bu, Tensor? gate"
_CONSTANTS = "int act, float scale, float? eps, float p, Tensor? rng"

_backward = Op(
    "bottleneck_backward",
    f"(Tensor g, Tensor x, {_WEIGHTS}, Tensor? z, Tensor? stats, {_CONSTANTS}, bool own_residual, bool[8] needs)"
    f" -> ({', '.join(['Tensor'] * 8)})",
    family="bottleneck",
    reference=_backward_reference,
    samples=partial(_bottleneck.backward_samples, _NAMES, _reference),
    cost=_bottleneck.backward_cost,
)


def _keep(args, out):
    *tensors, act, scale, eps, p, rng = args[-13:]
    return (*tensors, rng, *out[1:]), (act, scale, eps, p)


def _gradients(tensors, constants, g, needs, own_residual):
    """Of x, ln_w, ln_b, wd, bd, wu, bu, gate and None for the rest; needs: of these eight."""
    *inputs, rng, z, stats = tensors
    if not any(needs):
        return (None,) * 13
    if torch.is_grad_enabled():
        z = stats = None
    stats = stats if constants[2] is not None else None
    grads = _backward(g, *inputs, z, stats, *constants, rng, own_residual, needs)
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *(None,) * 5


_own = Op(
    "bottleneck",
    f"(Tensor x, {_WEIGHTS}, {_CONSTANTS}) -> (Tensor, Tensor, Tensor)",
    family="bottleneck",
    reference=_reference,
    samples=partial(_bottleneck.samples, _NAMES),
    cost=partial(_bottleneck.cost, None),
    gradient=Gradient(_keep, lambda tensors, consts, g, needs: _gradients(tensors, consts, g[0], needs[:8], True)),
    autocast=(0,),
)

_add = Op(
    "bottleneck_add",
    f"(Tensor residual, Tensor x, {_WEIGHTS}, {_CONSTANTS}) -> (Tensor, Tensor, Tensor)",
    family="bottleneck",
    reference=_add_reference,
    samples=partial(_bottleneck.add_samples, _NAMES),
    cost=_bottleneck.cost,
    gradient=Gradient(
        _keep, lambda tensors, consts, g, needs: (g[0], *_gradients(tensors, consts, g[0], needs[1:9], False))
    ),
    autocast=(0, 1),
)


def _checked(op, residual, x, wd, bd, wu, bu, act, scale, ln, gate, mask, expert, p, rng) -> tuple:
    """The arguments of the op behind the residual; experts, masks and a tensor scale are plain torch before it."""
    if act not in ACTIVATIONS:
        raise ValueError(f"{op}: act is {act!r}; expected one of {', '.join(ACTIVATIONS)}")
    if expert is not None:
        wd, wu = (w.index_select(0, expert.view(1))[0] if w.dim() == 3 else w for w in (wd, wu))
        bd, bu = (b.index_select(0, expert.view(1))[0] if b is not None and b.dim() == 2 else b for b in (bd, bu))
    if mask is not None:
        wd, wu = (w if own is None else w * own.to(w.dtype) for w, own in zip((wd, wu), mask, strict=True))
    if wd.dim() != 2 or wu.dim() != 2 or not x.dim() or wd.shape[1] != x.shape[-1] or wu.shape[1] != wd.shape[0]:
        raise ValueError(
            f"{op}: wd {tuple(wd.shape)} and wu {tuple(wu.shape)} do not fit x {tuple(x.shape)}; "
            f"expected wd [m, {x.shape[-1] if x.dim() else 'in'}] and wu [out, m]"
        )
    if wd.dtype != wu.dtype:
        raise ValueError(f"{op}: wd is {wd.dtype} and wu {wu.dtype}; give both the same dtype")
    y, own = (*x.shape[:-1], wu.shape[0]), x if residual is None else residual
    if own.shape != y:
        raise ValueError(f"{op}: the residual is {tuple(own.shape)}; expected {y} from x and wu")
    ln_w, ln_b, eps = (None, None, None) if ln is None else (*ln[:2], float(ln[2]))
    (m, k), n = wd.shape, len(wu)
    for name, t, size in (("bd", bd, m), ("bu", bu, n), ("the weight of ln", ln_w, k), ("the bias of ln", ln_b, k)):
        if t is not None and t.shape != (size,):
            raise ValueError(f"{op}: {name} is {tuple(t.shape)}; expected [{size}]")
    if isinstance(scale, Tensor):
        gate, scale = scale if gate is None else scale * gate, 1.0
    if gate is not None:
        if gate.dim() and gate.shape[-1] != 1:
            raise ValueError(f"{op}: gate is {tuple(gate.shape)}; expected a last dimension of 1, as in [B, 1, 1]")
        gate = gate.to(_wide(gate.dtype)).expand(*x.shape[:-1], 1).reshape(math.prod(x.shape[:-1]))
    for t in (wd, bd, wu, bu, ln_w, ln_b, gate, own):
        if t is not None and t.device != x.device:
            raise ValueError(f"{op}: x is on {x.device}, another tensor on {t.device}; move them to one device")
    p, rng = dropout_of(op, x, p, rng)
    return x, ln_w, ln_b, wd, bd, wu, bu, gate, _NAMES.index(act), float(scale), eps, p, rng


def bottleneck(
    x: Tensor,
    wd: Tensor,
    bd: Tensor | None,
    wu: Tensor,
    bu: Tensor | None,
    *,
    act: str = "relu",
    scale: float | Tensor = 1.0,
    residual: Tensor | None = None,
    ln: tuple[Tensor | None, Tensor | None, float] | None = None,
    gate: Tensor | None = None,
    mask: tuple[Tensor | None, Tensor | None] | None = None,
    expert: Tensor | None = None,
    p: float = 0.0,
    rng: Tensor | None = None,
) -> Tensor:
    """residual + scale * gate * (drop(act(LN(x) wd^T + bd)) wu^T + bu), a new tensor of the residual's dtype.

    x [..., in]   wd [m, in]   bd [m] or None   wu [out, m]   bu [out] or None   residual [..., out]; None is x
    act: relu, gelu (with erf), gelu_tanh, silu, tanh, leaky_relu (0.01) or identity.
    scale: float or 0-d tensor.   gate: broadcasts against x with a last dimension of 1, such as [B, 1, 1].
    ln: (weight [in] or None, bias [in] or None, eps) of a LayerNorm of x before wd; None: without.
    mask: two that multiply wd and wu, bool or float, or None.   expert: 0-d int64 on x's device, which picks from
    those of wd, bd, wu, bu that have one dimension more in front.
    p, rng: dropout of the activations with probability p; rng is int64[2] (seed, offset) on x's device.
    dtypes: weights of x's dtype or wider. Differentiable in x, residual, ln, wd, bd, wu, bu, gate and scale.
    Raises ValueError on arguments that do not fit. Houlsby et al. 2019, arXiv:1902.00751.
    """
    args = _checked("bottleneck", residual, x, wd, bd, wu, bu, act, scale, ln, gate, mask, expert, p, rng)
    return _own(*args) if residual is None else _add(residual, *args)


def bottleneck_(
    residual: Tensor,
    x: Tensor,
    wd: Tensor,
    bd: Tensor | None,
    wu: Tensor,
    bu: Tensor | None,
    *,
    act: str = "relu",
    scale: float | Tensor = 1.0,
    ln: tuple[Tensor | None, Tensor | None, float] | None = None,
    gate: Tensor | None = None,
    mask: tuple[Tensor | None, Tensor | None] | None = None,
    expert: Tensor | None = None,
    p: float = 0.0,
    rng: Tensor | None = None,
) -> Tensor:
    """`bottleneck` that may write into residual, for a caller that owns it and goes on with the result alone."""
    args = _checked("bottleneck_", residual, x, wd, bd, wu, bu, act, scale, ln, gate, mask, expert, p, rng)
    return _add.call_(residual, *args)
