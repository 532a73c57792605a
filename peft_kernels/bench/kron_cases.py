"""Products with a Kronecker product on named shapes, against two products in torch, HF PEFT's LoKr and pyfastkron."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import all_ops, kron_add_, kron_linear, kron_sum_weight
from . import rivals
from .case import Case, Problem, Run, of_reference, randn

# p, r of square factors, and how many tokens
_GRID = {
    (64, 64): (1, 16, 512, 2048, 4096),
    (32, 128): (512, 2048),
    (16, 256): (512, 2048),
    (8, 512): (512,),
    (16, 48): (16, 4096),
    (4, 192): (16, 4096),
    (24, 32): (1, 16, 2048),
    (128, 128): (512,),
    (192, 4): (512,),
}
_QUICK = {(64, 64, 512), (16, 48, 4096)}
_TWO = "two products"


def kron_cases(device: str) -> Iterator[Case]:
    def case(p, r, mode, rows, selection, dtype="float32"):
        build = functools.partial(_linear, p=p)
        return Case("kron_linear", f"{p}x{p} {r}x{r}", mode, dtype, rows, p * r, p * r, selection, build)

    for (p, r), tokens in _GRID.items():
        for rows in tokens:
            for mode in ("forward", "full") if rows > 16 else ("forward",):
                quick = (p, r, rows) in _QUICK
                yield case(
                    p, r, mode, rows, "quick" if quick else "all" if (p * r) ** 2 * rows > 1 << 35 else "default"
                )
    yield case(64, 64, "forward", 1, "default", "bfloat16")  # of more tokens torch has the better product
    yield case(16, 48, "full", 512, "all", "float16")  # torch has no fast product
    for mode in ("forward", "full"):
        yield Case("kron_sum_weight", "phm n=4 768 x 3072", mode, "float32", 768, 3072, 3072, "default", _phm)
    for dtype in ("float32", "bfloat16"):
        yield Case("kron_add", "64x64 64x64", "forward", dtype, 4096, 4096, 4096, "default", _merge)


def two_products(x: Tensor, a: Tensor, b: Tensor, b_first: bool) -> Tensor:
    """x (a kron b) by hand."""
    m, (p, q), (r, s) = len(x), a.shape, b.shape
    if b_first:
        return torch.matmul(a.T, (x.view(m * p, r) @ b).view(m, p, s)).view(m, q * s)
    return (torch.matmul(a.T, x.view(m, p, r)).reshape(m * q, r) @ b).view(m, q * s)


def _linear(case: Case, device: str, stack: ExitStack, p: int) -> Problem:
    """As LoKr calls it: the factors of the weight transposed, W = w1 kron w2 [out, in]."""
    ops, p = all_ops(), min(p, case.n_in)
    r = case.n_in // p
    x = randn(case.rows, case.n_in, like=case, device=device).requires_grad_()
    g = randn(case.rows, case.n_in, like=case, device=device)
    w1, w2 = (randn(n, n, like=case, device=device, scale=n**-0.5).requires_grad_() for n in (p, r))
    leaves = (x, w1, w2)

    def run(call: Callable[..., Tensor]) -> list[Run]:
        return [Run(lambda: call(x, w1.T, w2.T), leaves)]

    args = (x, w1.T, w2.T, None, 1.0)
    ours, theirs = of_reference(ops["kron_linear"], args, (0, 1, 2), g, case.mode)

    def as_ours(results: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
        """The gradients of w1 and w2 from those of their transposes."""
        return lambda: [t.T if i > 1 else t for i, t in enumerate(results())]

    return Problem(
        _TWO,
        run(kron_linear),
        {
            _TWO: run(functools.partial(two_products, b_first=True)),
            f"{_TWO}, a first": run(functools.partial(two_products, b_first=False)),
            "dense": [Run(lambda: F.linear(x, torch.kron(w1, w2)), leaves)],
            "HF PEFT": rivals.missing("peft") or rivals.not_for_lokr(p, r) or [_peft(x, w1, w2)],
            "pyfastkron": rivals.missing("pyfastkron") or run(_fastkron(device)),
        },
        g,
        as_ours(ours),
        as_ours(theirs),
        forward=[ops["kron_linear"].cost(*args)],
        backward=[ops["kron_linear_backward"].cost(g, *args[:3], 1.0, (True, True, True))],
    )


def _fastkron(device: str) -> Callable[..., Tensor]:
    import pyfastkron.fastkrontorch as fastkron

    return lambda x, a, b: fastkron.gemkm(x, [a.contiguous(), b.contiguous()])


def _peft(x: Tensor, w1: Tensor, w2: Tensor) -> Run:
    delta, leaves = rivals.lokr_delta(w1, w2)
    return Run(lambda: delta(x), (x, *leaves))


def _phm(case: Case, device: str, stack: ExitStack) -> Problem:
    n, k, m = 4, case.rows, case.n_out
    a = randn(n, n, n, like=case, device=device).requires_grad_()
    b = randn(n, k // n, m // n, like=case, device=device).requires_grad_()
    g = randn(k, m, like=case, device=device)
    ops = all_ops()

    def terms() -> Tensor:
        """As Compacter's published code has it: all products, then their sum."""
        return torch.einsum("nij,nkl->nikjl", a, b).reshape(n, k, m).sum(0)

    return Problem(
        "products, then sum",
        [Run(lambda: kron_sum_weight(a, b), (a, b))],
        {
            "products, then sum": [Run(terms, (a, b))],
            "one product, permuted": [Run(lambda: ops["kron_sum_weight"].reference(a, b, 1.0), (a, b))],
        },
        g,
        *of_reference(ops["kron_sum_weight"], (a, b, 1.0), (0, 1), g, case.mode),
        forward=[ops["kron_sum_weight"].cost(a, b, 1.0)],
        backward=[ops["kron_sum_weight_backward"].cost(g, a, b, 1.0, (True, True))],
    )


def _merge(case: Case, device: str, stack: ExitStack) -> Problem:
    left = 1 << case.n_in.bit_length() // 2
    w = randn(case.n_in, case.n_in, like=case, device=device)
    w1, w2 = (randn(n, n, like=case, device=device, scale=0.01) for n in (left, case.n_in // left))
    own, other = w.clone(), w.clone()
    op = all_ops()["kron_add"]

    def on_a_copy(to: Tensor, add: Callable[[Tensor], Tensor]) -> Run:
        return Run(lambda: add(to.copy_(w)), ())  # so that each call is the same

    args = (w, w1, w2, 0.5)
    return Problem(
        "torch.kron",
        [on_a_copy(own, lambda to: kron_add_(to, w1, w2, 0.5))],
        {"torch.kron": [on_a_copy(other, lambda to: to.add_(torch.kron(w1, w2), alpha=0.5))]},
        w,
        *of_reference(op, args, (), w, case.mode),
        forward=[op.cost(*args)],
    )
