"""Test inputs and costs of the bottleneck: small shapes, every activation, strides and mixed dtypes."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ._op import Cost, Sample
from ._tensors import nbytes

# id: leading dims, K, m, N, activation, p, LN's parameters ("w", "b" or none of them; None: no LN)
_SHAPES = {
    "plain": ((5,), 16, 4, 16, "relu", 0.0, None),
    "odd": ((3, 3), 17, 3, 17, "gelu", 0.0, "wb"),
    "wide": ((2, 5), 40, 21, 40, "gelu_tanh", 0.25, "b"),
    "one_row": ((1,), 24, 8, 24, "tanh", 0.5, "wb"),
    "one_column": ((7,), 1, 1, 1, "silu", 0.0, None),
    "no_rows": ((0,), 12, 2, 12, "relu", 0.0, "wb"),
    "all_dropped": ((4,), 8, 2, 8, "leaky_relu", 1.0, None),
    "expanded": ((4, 2), 12, 4, 12, "identity", 0.0, "w"),
    "transposed": ((4, 3), 20, 8, 20, "leaky_relu", 0.0, ""),
    "mixed": ((5, 3), 32, 16, 32, "silu", 0.25, "wb"),
}


def _layouts(activations: list[str], dtype: torch.dtype, device: str) -> Iterator[tuple[str, tuple, Tensor]]:
    """(id, (residual, x, ln_w, ln_b, wd, bd, wu, bu, gate, act, scale, eps, p, rng), g) over shapes and strides."""
    for number, (name, (lead, k, m, n, act, p, ln)) in enumerate(_SHAPES.items()):
        low = torch.promote_types(dtype, torch.float32) if name == "mixed" else dtype
        generator, rows = torch.Generator().manual_seed(len(name)), math.prod(lead)
        shapes = (*lead, n), (*lead, k), (k,), (k,), (m, k), (m,), (n, m), (n,), (rows,), (*lead, n)
        made = [torch.randn(s, generator=generator, dtype=torch.float64).to(device) for s in shapes]
        residual, x, ln_w, ln_b, wd, bd, wu, bu, gate, g = made
        residual, x, g, ln_w, ln_b = (t.to(dtype) for t in (residual, x + 1, g, ln_w + 1, ln_b))
        wd, bd, wu, bu = ((t * f).to(low) for t, f in ((wd, k**-0.5), (bd, 1), (wu, m**-0.5), (bu, 1)))
        if name == "transposed":
            residual, x, g = (t.transpose(0, 1) for t in (residual, x, g))
            wd, wu = wd.T.contiguous().T, wu.T.contiguous().T
        if name == "expanded":
            residual, x, g = (t[:1].expand_as(t) for t in (residual, x, g))
        weight, bias = (t if ln and letter in ln else None for t, letter in ((ln_w, "w"), (ln_b, "b")))
        biases = (None, None) if name == "wide" else (bd, bu)
        own_gate = gate.to(torch.promote_types(dtype, torch.float32)) if number % 2 else None
        rng = torch.tensor([2**40 + 7, -3], device=device) if p else None
        eps = None if ln is None else 1e-5
        number, scale = activations.index(act), -0.5 if name == "odd" else 2.0
        weights = weight, bias, wd, biases[0], wu, biases[1], own_gate
        yield name, (residual, x, *weights, number, scale, eps, p, rng), g


def _differentiable(args: tuple) -> tuple[int, ...]:
    return tuple(i for i, a in enumerate(args[:-1]) if isinstance(a, Tensor))


def samples(activations, dtype, device):
    for name, (_, *args), _ in _layouts(activations, dtype, device):
        yield Sample(name, tuple(args), _differentiable(tuple(args)))


def add_samples(activations, dtype, device):
    for name, args, _ in _layouts(activations, dtype, device):
        if name in ("plain", "odd", "wide", "one_row", "transposed", "mixed"):
            if name == "odd":  # a result of another width
                args = (args[0][..., :7], *args[1:6], args[6][:7], args[7][:7], *args[8:])
            yield Sample(name, args, _differentiable(args))


def backward_samples(activations, reference, dtype, device):
    for number, (name, (_, *args), g) in enumerate(_layouts(activations, dtype, device)):
        _, z, stats = reference(*args)
        exists = tuple(t is not None for t in args[:8])
        lead = g, *args[:8], z, None if args[10] is None else stats, *args[8:]
        yield Sample(name, (*lead, number % 3 != 0, exists))
        if name in ("odd", "wide"):
            for keep in (0, 1, 3, 5):  # dx, an LN weight, Wd, Wu alone
                needs = tuple(e and i == keep for i, e in enumerate(exists))
                yield Sample(f"{name}_{keep}", (*lead, True, needs))


def cost(residual, x, ln_w, ln_b, wd, bd, wu, bu, gate, *_):
    m, y = math.prod(x.shape[:-1]), math.prod(x.shape[:-1]) * wu.shape[0] * x.element_size()
    z = m * len(wd) * x.element_size()
    return Cost(2 * m * (wd.numel() + wu.numel()), nbytes(residual, x, ln_w, ln_b, wd, bd, wu, bu, gate) + y + z)


def backward_cost(g, x, *args):
    tensors, needs, (wd, wu), m = (x, *args[:7]), args[-1], (args[2], args[4]), math.prod(x.shape[:-1])
    products = wu.numel() + wd.numel() * (needs[0] + needs[3]) + wu.numel() * needs[5]
    written = sum(nbytes(t) for t, need in zip(tensors, needs, strict=True) if need)
    return Cost(2 * m * products, nbytes(g, *tensors, args[7]) + written)
