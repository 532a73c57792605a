"""The Walsh-Hadamard transform and Fastfood on named shapes, against plain torch and the published form."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack

import torch
from torch import Tensor

from ..ops import all_ops, fastfood, fastfood_norm, fastfood_state, fwht
from . import rivals
from .case import Case, Problem, Run, of_reference, randn

_BY_LEVEL, _PUBLISHED = "torch, a level at a time", "published (two transforms)"


def hadamard_cases(device: str) -> Iterator[Case]:
    def transform(rows, size, selection, mode="forward", dtype="float32"):
        shape = f"{rows} x 2^{size.bit_length() - 1}"
        return Case("fwht", shape, mode, dtype, rows, size, size, selection, _fwht)

    def project(rows, columns, d, selection, mode, dtype="float32"):
        build = functools.partial(_fastfood, d=d)
        return Case("fastfood", f"{rows} x {columns} d={d}", mode, dtype, rows, columns, columns, selection, build)

    yield transform(1, 1 << 20, "quick")
    yield transform(1, 1 << 22, "default")
    yield transform(1, 1 << 24, "all")
    for size in (16, 256, 4096, 32768):
        yield transform((1 << 22) // size, size, "default")
    yield transform(1024, 4096, "default", "full", "bfloat16")
    for mode in ("forward", "full"):
        yield project(768, 3072, 4000, "quick", mode)
        yield project(768, 768, 1000, "default", mode)
        yield project(768, 3072, 20000, "default", mode)
        yield project(768, 3072, 20000, "default", mode, "bfloat16")
        yield project(1, 768, 20000, "default", mode)
    yield project(4096, 4096, 20000, "all", "full")


def _fwht(case: Case, device: str, stack: ExitStack) -> Problem:
    op, (rows, n) = all_ops()["fwht"], (case.rows, case.n_in)
    x = randn(rows, n, like=case, device=device).requires_grad_()
    g = torch.randn_like(x)
    right = rivals.butterflies(torch.eye(1 << n.bit_length() // 2, dtype=x.dtype, device=device))
    left = right[: n // len(right), : n // len(right)]  # the leading block of H is H too

    def products() -> Tensor:
        return (left @ (x.view(rows, len(left), len(right)) @ right)).view(rows, n)

    args = (x, 1.0)
    return Problem(
        _BY_LEVEL,
        [Run(lambda: fwht(x), (x,))],
        {
            _BY_LEVEL: [Run(lambda: rivals.butterflies(x), (x,))],
            "torch, two products": [Run(products, (x,))],
        },
        g,
        *of_reference(op, args, (0,), g, case.mode),
        forward=[op.cost(*args)],
        backward=[op.cost(*args)],
    )


def _fastfood(case: Case, device: str, stack: ExitStack, d: int) -> Problem:
    """The rival holds signs, permutation and gaussians of all n dimensions, of which ours needs less."""
    ops, numel = all_ops(), case.rows * case.n_in
    base = randn(case.rows, case.n_in, like=case, device=device)
    theta = randn(d, like=case, device=device, dtype=torch.float32).requires_grad_()
    g = torch.randn_like(base)
    n = len(fastfood_state(0, numel, d)[1])
    signs, permutation, gaussians = fastfood_state(0, numel, n, device)
    k = 1 << (d - 1).bit_length()
    sign, pi_mod = signs[:d].clone(), (permutation % k).to(torch.int16 if k <= 1 << 15 else torch.int32)
    scale = fastfood_norm(gaussians, numel)
    full = signs.long(), permutation.long(), gaussians.float() / 4096, 1 / scale

    args = (theta, sign, pi_mod, gaussians, base, numel, scale)
    return Problem(
        _PUBLISHED,
        [Run(lambda: fastfood(theta, sign, pi_mod, gaussians, numel, scale, base=base), (theta,))],
        {_PUBLISHED: [Run(lambda: rivals.fastfood(theta, *full, base), (theta,))]},
        g,
        *of_reference(ops["fastfood"], args, (0,), g, case.mode),
        forward=[ops["fastfood"].cost(*args)],
        backward=[ops["fastfood_backward"].cost(g, sign, pi_mod, gaussians, scale)],
    )
