"""Selection, statistics, optimizer and gates of sparse fine-tuning on named shapes, against plain torch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import all_ops, fisher_linear_, hard_concrete, sparse_adamw_, topk_compact, topk_threshold
from .case import LLAMA, Case, Problem, Run, of_reference, randn

_SIDE = LLAMA["7b qkvo"]  # 16.8 million elements
_TOKENS = 32  # of a sample
_NONE = torch.empty(0)  # the cotangent of what has none


def select_cases(device: str) -> Iterator[Case]:
    fast = device == "cuda" or torch.cpu._is_avx512_bf16_supported()  # elsewhere torch's own bf16 product takes minutes

    def case(op, shape, build, selection, rows=_SIDE[0], n=_SIDE[1], mode="forward", dtype="float32"):
        return Case(op, shape, mode, dtype, rows, n, n, selection, build)

    for share, selection in ((0.005, "quick"), (0.0002, "default"), (0.5, "default")):
        yield case("topk_threshold", f"16.8M {share}", functools.partial(_topk, share=share), selection)
    build = functools.partial(_topk, share=0.005)
    yield case("topk_threshold", "16.8M 0.005", build, "default", dtype="bfloat16")
    for dtype in ("float32", "bfloat16")[: 1 + fast]:
        for n in (768, 4096):
            selection = "quick" if (dtype, n) == ("float32", 768) else "default"
            yield case("fisher_linear", f"{n} x {n}", _fisher, selection, 16 * _TOKENS, n, dtype=dtype)
    for decay in (0.01, 0.0):
        build = functools.partial(_adamw, share=0.005, decay=decay)
        yield case("sparse_adamw", f"16.8M 0.005 decay={decay}", build, "quick" if decay else "default")
    for mode in ("forward", "full"):
        yield case("hard_concrete", "16.8M", _gates, "default", mode=mode)


def _topk(case: Case, device: str, stack: ExitStack, share: float) -> Problem:
    """Threshold and positions together, of several tensors. The rival joins them, and sorts the indices only."""
    ops, total = all_ops(), case.rows * case.n_in
    k = max(1, round(share * total))
    scores = list(randn(total, like=case, device=device).split(total // 3 + 1))

    def ours() -> Tensor:
        threshold, _ = topk_threshold(scores, k, use_abs=True)
        indices = topk_compact(scores, threshold, k, use_abs=True)
        return torch.cat([own + i * len(scores[0]) for i, own in enumerate(indices)])

    def expected() -> list[Tensor]:
        threshold = ops["topk_threshold"].reference(k, True, *scores)[0]
        return [ops["topk_compact"].reference(threshold, k, True, *scores)[0]]

    return Problem(
        "torch.topk",
        [Run(ours, ())],
        {"torch.topk": [Run(lambda: torch.cat(scores).abs().topk(k, sorted=False).indices.sort().values, ())]},
        _NONE,
        expected,
        expected,
        forward=[
            ops["topk_threshold"].cost(k, True, *scores),
            ops["topk_compact"].cost(torch.zeros(()), k, True, *scores),
        ],
    )


def _fisher(case: Case, device: str, stack: ExitStack) -> Problem:
    """From the gradient of the outputs, as one backward of the batch gives it. The rivals go sample by sample."""
    op, (k, n) = all_ops()["fisher_linear"], (case.n_in, case.n_out)
    x, dy = (randn(case.rows, width, like=case, device=device) for width in (k, n))
    w = randn(n, k, like=case, device=device, scale=k**-0.5).requires_grad_()
    ends = torch.arange(0, case.rows + 1, _TOKENS, device=device)
    pairs = list(zip(x.split(_TOKENS), dy.split(_TOKENS), strict=True))
    with torch.enable_grad():
        outs = [F.linear(own, w) for own, _ in pairs]

    def ours(f: Tensor) -> Tensor:
        fisher_linear_(f.zero_(), dy, x, ends)
        return f

    def summed(f: Tensor, gradients: Callable[[], Iterator[Tensor]]) -> Tensor:
        f.zero_()
        for g in gradients():
            f += g.square()
        return f

    def backwards(again: bool) -> Iterator[Tensor]:
        for out, (own, g) in zip(outs, pairs, strict=True):
            with torch.enable_grad():
                out = F.linear(own, w) if again else out
            yield torch.autograd.grad(out, w, g, retain_graph=True)[0]

    loops: dict[str, Callable[[], Iterator[Tensor]]] = {
        "loop of backwards": functools.partial(backwards, False),
        "loop of forwards and backwards": functools.partial(backwards, True),
        "loop of products": lambda: (g.T @ own for own, g in pairs),
    }
    f = torch.zeros(n, k, device=device)
    args = (f, dy, x, ends, None)
    return Problem(
        "loop of backwards",
        [Run(functools.partial(ours, f.clone()), ())],
        {name: [Run(functools.partial(summed, f.clone(), loop), ())] for name, loop in loops.items()},
        _NONE,
        *of_reference(op, args, (), _NONE, case.mode),
        forward=[op.cost(*args)],
    )


def _adamw(case: Case, device: str, stack: ExitStack, share: float, decay: float) -> Problem:
    """One step on the values of a mask; the rivals mask the gradient of the whole weight and step on all of it."""
    op, total = all_ops()["sparse_adamw"], case.rows * case.n_in
    idx = torch.randperm(total, device=device)[: max(1, round(share * total))].sort().values.int()
    w = randn(total, like=case, device=device)
    start = [randn(len(idx), like=case, device=device) for _ in range(3)]
    start[2].abs_()
    state, grad, step = [t.clone() for t in start], torch.randn_like(start[0]), torch.tensor(3.0, device=device)
    mask = torch.zeros(total, device=device).index_fill_(0, idx.long(), 1)
    base = (w, idx) if decay else (None, None)
    vals, m, v = state

    def ours() -> Tensor:
        for own, first in zip(state, start, strict=True):  # a little work of its own, so that each call is the same
            own.copy_(first)
        sparse_adamw_(vals, m, v, grad, step, lr=1e-3, weight_decay=decay, w=base[0], idx=base[1])
        return vals

    def dense(fused: bool) -> Run:
        own = torch.nn.Parameter(w.clone())
        own.grad = torch.randn_like(w)
        optimizer = torch.optim.AdamW([own], lr=1e-3, weight_decay=decay, fused=fused, foreach=not fused)

        def call() -> Tensor:
            assert own.grad is not None  # for the type checker
            own.grad.mul_(mask)
            optimizer.step()
            return own

        return Run(call, ())

    args = (*start, grad, step, *base, 1e-3, 0.9, 0.999, 1e-8, decay)
    return Problem(
        "fused dense masked AdamW",
        [Run(ours, ())],
        {"fused dense masked AdamW": [dense(True)], "dense masked AdamW": [dense(False)]},
        _NONE,
        *of_reference(op, args, (), _NONE, case.mode),
        forward=[op.cost(*args)],
        same=False,  # theirs is a whole weight
    )


def _gates(case: Case, device: str, stack: ExitStack) -> Problem:
    ops = all_ops()
    w0, g = (randn(case.rows, case.n_in, like=case, device=device) for _ in range(2))
    w, alpha = (randn(case.rows, case.n_in, like=case, device=device).requires_grad_() for _ in range(2))
    group = torch.ones((), device=device, requires_grad=True)
    rng = torch.tensor([1, 2], device=device)

    def gate(alpha: Tensor) -> Tensor:
        u = torch.empty_like(alpha).uniform_(1e-4, 1 - 1e-4)
        return (((u.log() - (1 - u).log() + alpha).sigmoid()) * 3 - 1.5).clamp(0, 1)

    args = (w0, w, alpha, group, rng)
    return Problem(
        "plain torch",
        [Run(lambda: hard_concrete(w0, w, alpha, alpha_group=group, rng=rng), (w, alpha, group))],
        {"plain torch": [Run(lambda: w0 + w * gate(alpha) * gate(group), (w, alpha, group))]},
        g,
        *of_reference(ops["hard_concrete"], args, (1, 2, 3), g, case.mode),
        forward=[ops["hard_concrete"].cost(*args)],
        backward=[ops["hard_concrete_backward"].cost(g, *args[1:], (True, True, True))],
        same=False,  # theirs draws other numbers
    )
