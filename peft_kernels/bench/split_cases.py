"""FAR's linear layer on named shapes, against the published form, plain torch and the full weight gradient."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import all_ops, far_linear
from .case import LLAMA, Case, Problem, Run, of_reference, randn

_SHAPES = {"distilbert up": (768, 3072), "7b qkvo": LLAMA["7b qkvo"]}
_PUBLISHED = "published (cat, permute)"


def split_cases(device: str) -> Iterator[Case]:
    fast = device == "cuda" or torch.cpu._is_avx512_bf16_supported()  # elsewhere torch's own bf16 product takes minutes

    def case(shape, share, mode, rows, selection, dtype="float32"):
        build = functools.partial(_split, share=share)
        sizes = _SHAPES[shape]
        return Case("far_linear", f"{shape} f={share}", mode, dtype, rows, *sizes, selection, build)

    yield case("distilbert up", 0.1, "full", 2048, "quick")
    yield case("7b qkvo", 0.1, "full", 512, "quick")
    yield case("distilbert up", 0.4, "full", 2048, "default")
    yield case("7b qkvo", 0.1, "full", 2048, "all")
    for shape, rows in itertools.product(_SHAPES, (1, 16)):
        yield case(shape, 0.1, "forward", rows, "default")
    if fast:
        yield case("distilbert up", 0.1, "full", 2048, "default", "bfloat16")
        yield case("7b qkvo", 0.1, "full", 512, "default", "bfloat16")


def _split(case: Case, device: str, stack: ExitStack, share: float) -> Problem:
    ops, (k, n) = all_ops(), (case.n_in, case.n_out)
    x = randn(case.rows, k, like=case, device=device).requires_grad_()
    g = randn(case.rows, n, like=case, device=device)
    w, bias = randn(n, k, like=case, device=device, scale=k**-0.5), randn(n, like=case, device=device)
    order = torch.randperm(n, device=device)
    rows, rest = order[: round(share * n)].sort().values, order[round(share * n) :].sort().values
    # Trained in fp32 beside a 16-bit W, as LoRA is here; what the rivals train is of W's dtype.
    wt = randn(len(rows), k, like=case, device=device, scale=k**-0.5).float().requires_grad_()
    bt = randn(len(rows), like=case, device=device).float().requires_grad_()
    own = [t.detach().to(w.dtype).requires_grad_() for t in (wt, bt)]
    whole = [t.index_copy(0, rows, s.detach()).requires_grad_() for t, s in ((w, own[0]), (bias, own[1]))]
    frozen, back = (w[rest], bias[rest]), torch.cat([rows, rest]).argsort()

    def published() -> Tensor:
        return torch.cat([F.linear(x, *own), F.linear(x, *frozen)], -1)[..., back]

    args = (x, w, bias, wt, bt, rows)
    needs = (True, True, True)
    return Problem(
        _PUBLISHED,
        [Run(lambda: far_linear(x, w, wt, rows, bias=bias, bt=bt), (x, wt, bt))],
        {
            _PUBLISHED: [Run(published, (x, *own))],
            "full dW": [Run(lambda: F.linear(x, *whole), (x, *whole))],
            "frozen": [Run(lambda: F.linear(x, w, bias), (x,))],
        },
        g,
        *of_reference(ops["far_linear"], args, (0, 3, 4), g, case.mode),
        forward=[ops["far_linear"].cost(*args)],
        backward=[ops["far_linear_backward"].cost(g, x, w, wt, rows, needs)],
    )
