"""AdamW on the values of a sparse update, with state of their number. Loshchilov and Hutter 2019, arXiv:1711.05101.

    m = b1 m + (1 - b1) g      v = b2 v + (1 - b2) g^2      d = vals, or w[idx] + vals where W is given
    vals -= lr * weight_decay * d + lr / (1 - b1^step) * m / (sqrt(v / (1 - b2^step)) + eps)

With W the values stand for the entries w[idx] + vals of the tuned weight, and decay pulls these to zero, which is what
AdamW does to a dense weight whose gradient is masked at idx, if nothing outside of idx decays.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._op import Cost, Op, Sample, write


def _reference(vals, m, v, grad, step, w, idx, lr, beta1, beta2, eps, weight_decay):
    dtype = torch.promote_types(vals.dtype, torch.float32)
    p, mean, square, g = (t.to(dtype) for t in (vals, m, v, grad))
    decayed = p if w is None else p + w.flatten()[idx.long()].to(dtype)
    mean = beta1 * mean + (1 - beta1) * g
    square = beta2 * square + (1 - beta2) * g * g
    correction1, correction2 = (1 - beta ** step.double() for beta in (beta1, beta2))
    update = mean / ((square / correction2.to(dtype)).sqrt() + eps) * (lr / correction1).to(dtype)
    p = p - lr * weight_decay * decayed - update
    return p.to(vals.dtype), mean.to(m.dtype), square.to(v.dtype)


# id: nnz, shape of W or None, weight decay, step
_SHAPES = {
    "odd": (37, (9, 11), 0.1, 3.0),
    "values_alone": (65, None, 0.1, 1.0),
    "no_decay": (16, None, 0.0, 50.0),
    "one": (1, (3, 5), 0.01, 2.0),
    "none": (0, (4, 4), 0.1, 1.0),
    "long": (3001, (70, 90), 0.01, 1000.0),
    "transposed": (60, (12, 10), 0.1, 7.0),
    "mixed": (70, (16, 33), 0.1, 2.0),
}


def _samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    for name, (nnz, shape, decay, step) in _SHAPES.items():
        made = torch.Generator().manual_seed(nnz)
        low = torch.promote_types(dtype, torch.float32)
        vals, m, v, grad = (torch.randn(nnz, generator=made, dtype=torch.float64).to(device, low) for _ in range(4))
        w = idx = None
        if shape is not None:
            w = torch.randn(shape, generator=made, dtype=torch.float64).to(device, dtype)
            w = w.T if name == "transposed" else w
            whole = torch.int64 if name == "odd" else torch.int32
            idx = torch.randperm(w.numel(), generator=made)[:nnz].sort().values.to(device, whole)
        if name in ("mixed", "no_decay"):
            grad = grad.to(dtype)
        at = torch.tensor(step, device=device)
        yield Sample(name, (vals, m, v.abs(), grad, at, w, idx, 0.01, 0.9, 0.999, 1e-8, decay))


_adamw = Op(
    "sparse_adamw",
    "(Tensor vals, Tensor m, Tensor v, Tensor grad, Tensor step, Tensor? w, Tensor? idx, float lr, float beta1, "
    "float beta2, float eps, float weight_decay) -> (Tensor, Tensor, Tensor)",
    family="sparse",
    reference=_reference,
    samples=_samples,
    cost=lambda vals, m, v, grad, step, w, *rest: Cost(
        16 * vals.numel(), vals.numel() * (28 if w is None else 32 + w.element_size())
    ),
)


@torch.no_grad()
def sparse_adamw_(
    vals: Tensor,
    m: Tensor,
    v: Tensor,
    grad: Tensor,
    step: Tensor,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    w: Tensor | None = None,
    idx: Tensor | None = None,
) -> None:
    """One step of AdamW on vals, written into vals, m and v; without autograd.

    vals, m, v [nnz] of one dtype, fp32 or fp64   grad [nnz], any floating dtype   step 0-d float, of torch.optim's
        state: the number of this step, from 1, which the caller counts
    w: the base weight of any shape, which stays as it is   idx int [nnz]: the flat indices of vals in w. With both,
        decay pulls w.flatten()[idx] + vals to zero, without them vals.
    lr, betas, eps, weight_decay: as in torch.optim.AdamW.
    Raises ValueError on shapes, dtypes or devices that do not fit, and the CPU kernel on indices outside of w.
    """
    if vals.dim() != 1 or any(t.shape != vals.shape for t in (m, v, grad)):
        got = ", ".join(str(tuple(t.shape)) for t in (vals, m, v, grad))
        raise ValueError(f"sparse_adamw_: vals, m, v and grad are {got}; expected [nnz] each")
    if not vals.dtype == m.dtype == v.dtype or vals.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"sparse_adamw_: vals, m and v are {vals.dtype}, {m.dtype}, {v.dtype}; expected float32 each")
    if (w is None) != (idx is None) or (idx is not None and idx.shape != vals.shape):
        raise ValueError(
            f"sparse_adamw_: w is {'None' if w is None else tuple(w.shape)}, idx "
            f"{'None' if idx is None else tuple(idx.shape)}; expected both, idx [{len(vals)}], or neither"
        )
    if idx is not None and idx.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"sparse_adamw_: idx is {idx.dtype}; expected int32 or int64")
    if step.dim() or not step.is_floating_point():
        raise ValueError(f"sparse_adamw_: step is {step.dtype} {tuple(step.shape)}; expected a 0-d float tensor")
    devices = {t.device for t in (vals, m, v, grad, w, idx) if t is not None}
    if len(devices) > 1 or step.device not in (vals.device, torch.device("cpu")):
        raise ValueError("sparse_adamw_: its tensors are on several devices; move them to one device")
    if not weight_decay:
        w = idx = None
    outs = _adamw.call_(vals, m, v, grad, step, w, idx, lr, *betas, eps, weight_decay)
    for target, out in zip((vals, m, v), outs, strict=True):
        write(target, out)
