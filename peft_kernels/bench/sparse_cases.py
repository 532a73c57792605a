"""Sparse deltas: the gradient of the numbers that a mask keeps, and the linear that they are added to."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Iterator
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import all_ops, sddmm, sparse_linear
from . import rivals
from .case import LLAMA, Case, Problem, Run, lora_layer, of_reference, pooled, randn

DENSITIES = (0.0005, 0.005, 0.01, 0.05, 0.2)


def sparse_cases(device: str) -> Iterator[Case]:
    bf16 = device == "cuda" or torch.cpu._is_avx512_bf16_supported()  # elsewhere torch's own bf16 product takes minutes
    sizes = LLAMA["7b qkvo"]

    def case(op, build, mode, dtype, rows, density, selection, cold=False):
        own = functools.partial(build, density=density)
        return Case(op, f"7b qkvo {density:.4g}", mode, dtype, rows, *sizes, selection, own, cold=cold)

    for dtype, rows, density in itertools.product(("float32", "bfloat16"), (512, 2048), DENSITIES):
        if dtype == "float32" or bf16:
            shown = "quick" if density == 0.01 else "default"
            yield case("sddmm", _sddmm, "forward", dtype, rows, density, shown)
    for dtype in ("float32", "bfloat16")[: 1 + bf16]:
        for density, rows in itertools.product((0.005, 0.01, 0.05), (512, 2048)):
            shown = "quick" if (density, rows) == (0.01, 512) else "default" if density == 0.01 else "all"
            yield case("sparse_linear", _sparse_linear, "full", dtype, rows, density, shown)
        for rows in (1, 16):
            yield case("sparse_linear", _sparse_linear, "forward", dtype, rows, 0.01, "default", cold=True)


def _mask(case: Case, device: str, density: float) -> tuple[Tensor, Tensor, Tensor]:
    """(crow, col, row) of a random mask."""
    m, n = case.n_out, case.n_in
    flat = torch.randperm(m * n, device=device)[: max(1, round(m * n * density))].sort().values
    row, col = flat // n, flat % n
    crow = F.pad(torch.bincount(row, minlength=m).cumsum(0), (1, 0))
    return crow.int(), col.int(), row


def _sddmm(case: Case, device: str, stack: ExitStack, density: float) -> Problem:
    op = all_ops()["sddmm"]
    dy, x = (randn(case.rows, width, like=case, device=device) for width in (case.n_out, case.n_in))
    crow, col, row = _mask(case, device, density)
    return Problem(
        "dense dW + gather",
        [Run(lambda: sddmm(dy, x, crow, col), ())],
        {
            "dense dW + gather": [Run(lambda: (dy.T @ x)[row, col], ())],
            "torch sampled_addmm": _sampled_addmm(dy, x, crow, col),
        },
        randn(len(col), like=case, device=device),
        *of_reference(op, (dy, x, crow, col), (), torch.empty(0), case.mode),
        forward=[op.cost(dy, x, crow, col)],
    )


def _sampled_addmm(dy: Tensor, x: Tensor, crow: Tensor, col: Tensor) -> list[Run] | str:
    if dy.dtype != torch.float32:
        return f"it has no kernel for {dy.dtype}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "beta state"
        mask = torch.sparse_csr_tensor(crow, col, x.new_zeros(len(col)), (dy.shape[1], x.shape[1]))
    return [Run(lambda: torch.sparse.sampled_addmm(mask, dy.T, x, beta=0.0).values(), ())]


def _sparse_linear(case: Case, device: str, stack: ExitStack, density: float) -> Problem:
    ops = all_ops()
    x = randn(case.rows, case.n_in, like=case, device=device).requires_grad_()
    g = randn(case.rows, case.n_out, like=case, device=device)
    crow, col, row = _mask(case, device, density)
    vals = randn(len(col), like=case, device=device, scale=case.n_in**-0.5, dtype=torch.float32).requires_grad_()
    pool, places = pooled(case, device, lambda: lora_layer(case, device)[:2]), torch.stack([row, col.long()])

    def ours(w, bias):
        return Run(lambda: sparse_linear(x, w, vals, crow, col, bias=bias), (x, vals))

    def shira(w, bias):
        return Run(lambda: rivals.shira(x, w, bias, vals, places), (x, vals))

    w, bias = pool[0]
    args = (x, w, vals, crow, col, bias)
    return Problem(
        "frozen",
        [ours(*layer) for layer in pool],
        {
            "frozen": [Run(functools.partial(F.linear, x, *layer), (x,)) for layer in pool],
            "clone + COO": [shira(*layer) for layer in pool],
        },
        g,
        *of_reference(ops["sparse_linear"], args, (0, 2), g, case.mode),
        forward=[ops["sparse_linear"].cost(*args)],
        backward=[ops["sparse_linear_dx"].cost(g, w, vals, crow, col, case.n_in), ops["sddmm"].cost(g, x, crow, col)],
    )
