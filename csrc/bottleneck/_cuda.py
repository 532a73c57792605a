"""What the CUDA launchers of the bottleneck serve: few rows. `ops` are those of the library, or emulated.

More rows, and larger weights, are products for tensor cores that are kept busy, and so another backend's or torch's.
"""

from __future__ import annotations

import torch

OPS = frozenset(("bottleneck", "bottleneck_add", "bottleneck_backward"))

_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
_ROWS, _WEIGHT = 64, 1 << 22  # bottleneck_most_rows and bottleneck_most_weight of bottleneck.cuh


def why_not(y, x, ln_w, ln_b, wd, bd, wu, bu, gate) -> str:
    """y: the residual, or g."""
    rows = x.shape[:-1].numel()
    for t in (y, x, ln_w, ln_b, wd, bd, wu, bu, gate):
        if t is not None and t.dtype not in _DTYPES:
            return f"no kernel for {t.dtype}"
    if y.dtype != x.dtype or wd.dtype not in (x.dtype, torch.float32):
        return f"x is {x.dtype}, y {y.dtype} and the weights {wd.dtype}; the kernels take weights of x or float32"
    if rows > _ROWS:
        return f"x has {rows} rows; the kernels are for up to {_ROWS}"
    if max(wd.numel(), wu.numel()) > _WEIGHT:
        return f"wd or wu has more than {_WEIGHT} elements; the kernels are for smaller ones"
    return "" if wd.numel() and wu.numel() else "wd or wu has no elements"


def _rows(t):
    return t.reshape(-1, t.shape[-1]).contiguous()


def _whole(*vectors):
    return (v if v is None else v.contiguous() for v in vectors)


def forward(ops, y, residual, x, ln_w, ln_b, wd, bd, wu, bu, gate, act, scale, eps, p, rng):
    """(y, z, stats); y is contiguous, and may be residual."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if not x.numel():
        return y, x.new_empty(0, len(wd), dtype=wd.dtype), x.new_empty(0 if eps is None else (2, 0), dtype=wide)
    ln_w, ln_b, bd, bu, gate = _whole(ln_w, ln_b, bd, bu, gate)
    rows = _rows(x)
    own = rows if residual is x else _rows(residual)
    z, stats = ops.bottleneck_cuda_.default(
        y.view(own.shape), own, rows, ln_w, ln_b, wd, bd, wu, bu, gate, act, scale, eps is not None, eps or 0.0,
        p, rng,
    )  # fmt: skip
    return y, z, stats


def backward(ops, g, x, ln_w, ln_b, wd, bd, wu, bu, gate, z, stats, act, scale, eps, p, rng, own_residual, needs):
    """The eight gradients, empty where not needed."""
    inputs = x, ln_w, ln_b, wd, bd, wu, bu, gate
    if not x.numel():
        return tuple(t.new_zeros(t.shape) if need else x.new_empty(0) for t, need in zip(inputs, needs, strict=True))
    ln_w, ln_b, bd, bu, gate, z, stats = _whole(ln_w, ln_b, bd, bu, gate, z, stats)
    dx, *others = ops.bottleneck_backward_cuda.default(
        _rows(g), _rows(x), ln_w, ln_b, wd, bd, wu, bu, gate, z, stats, act, scale, eps is not None, p, rng,
        own_residual, sum(1 << i for i, need in enumerate(needs) if need),
    )  # fmt: skip
    return dx.view(x.shape) if needs[0] else dx, *others
