"""A case of the benchmark: what it is, the work that is timed, and the parts that cases are made of."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..check import outputs, with_leaves
from ..ops._op import Cost, Op, Sample
from . import rivals
from .measure import cache_bytes

# name: (in, out)
LLAMA = {
    "7b qkvo": (4096, 4096),
    "7b up": (4096, 11008),
    "7b down": (11008, 4096),
    "13b qkvo": (5120, 5120),
    "13b up": (5120, 13824),
    "13b down": (13824, 5120),
    "70b qo": (8192, 8192),
    "70b kv": (8192, 1024),
    "70b up": (8192, 28672),
    "70b down": (28672, 8192),
}
MODES = ("forward", "recorded", "backward", "full")  # without gradients, with them, backward alone, both ways
SELECTIONS = ("quick", "default", "all")  # each holds those before it
SCALE = 2.0  # alpha / rank, as by default
# have no product of matrices
ELEMENTWISE = {"rescale", "topk_threshold", "sparse_adamw", "hard_concrete", "fwht", "fastfood"}


class Run(NamedTuple):
    """The same work on one piece of memory, and what is differentiated in it. Several results come as a list."""

    call: Callable[[], Any]
    leaves: tuple[Tensor, ...]


@dataclass
class Problem:
    """A case on a device. Each list of runs goes over a pool of weights, so that they come from memory.

    rivals: a list of runs, or why there is none.   over: which of them is the yardstick.
    plain, truth: the result (and gradients of `ours[0].leaves`) of plain torch, and in fp64.
    forward, backward: what the ops cost at the least.   same: every rival but a frozen yardstick gives our result.
    """

    over: str
    ours: list[Run]
    rivals: dict[str, list[Run] | str]
    g: Tensor | list[Tensor]
    plain: Callable[[], list[Tensor]]
    truth: Callable[[], list[Tensor]]
    forward: list[Cost]
    backward: list[Cost] = field(default_factory=list)
    same: bool = True


@dataclass(frozen=True)
class Case:
    """One line of the benchmark. rows x n_in is the input, n_out the width of the result."""

    op: str
    shape: str
    mode: str
    dtype: str
    rows: int
    n_in: int
    n_out: int
    selection: str
    build: Callable[[Case, str, ExitStack], Problem]  # the stack holds what must be on while the case is timed
    rank: int | tuple[int, ...] = 0  # of many adapters each its own, in turn
    p: float = 0.0
    popularity: str = ""  # which adapter serves which row
    cold: bool = False  # decoding reads each weight once per token: from a cache it would be measured too fast

    @property
    def name(self) -> str:
        words = [self.op, self.shape, self.mode, self.dtype, f"rows={self.rows}"]
        words += [f"r={'/'.join(map(str, self.ranks))}"] * bool(self.rank) + [f"p={self.p}"] * bool(self.p)
        return " ".join([*words, self.popularity]).rstrip()

    @property
    def ranks(self) -> tuple[int, ...]:
        return self.rank if isinstance(self.rank, tuple) else (self.rank,)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def work(self) -> Cost:
        """Roughly what one call of any rival costs, known without making the tensors."""
        ways = {"backward": 1, "full": 2}.get(self.mode, 1)
        weights = 0 if self.op in ELEMENTWISE else self.n_in * self.n_out
        held = weights + self.rows * (self.n_in + self.n_out)
        return Cost(2 * self.rows * weights * ways, held * self.torch_dtype.itemsize * ways)


def evaluate(run: Run, g: Tensor | list[Tensor], mode: str) -> list[Tensor]:
    """The result, and unless the mode is forward the gradients of the leaves for the cotangent g."""
    if mode == "forward":
        with torch.no_grad():
            return outputs(run.call())[:1]
    out = outputs(run.call())[0]
    return [out.detach(), *torch.autograd.grad(out, run.leaves, outputs(g)[0].to(out.dtype))]


def timed(run: Run, g: Tensor | list[Tensor], mode: str) -> Callable[[], object]:
    """What is timed of a run."""
    if mode == "forward":
        return torch.no_grad()(run.call)
    if mode == "recorded":
        return run.call
    if mode == "full":
        return lambda: torch.autograd.grad(run.call(), run.leaves, g)
    out = run.call()
    return lambda: torch.autograd.grad(out, run.leaves, g, retain_graph=True)


def pooled(case: Case, device: str, make: Callable[[], Any]) -> list[Any]:
    """Results of `make`, nested tensors: so many that together they fill the last-level cache four times."""
    first = make()
    held = sum(t.numel() * t.element_size() for t in rivals.tensors(first))
    count = min(256, -(-4 * cache_bytes(device) // held)) if case.cold else 1
    return [first, *(make() for _ in range(count - 1))]


def randn(*shape: int, like: Case, device: str, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
    return torch.randn(shape, device=device).mul_(scale).to(dtype or like.torch_dtype)


def lora_layer(case: Case, device: str, adapters: int = 1) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """W, bias and (A, B) of each adapter; these are fp32 beside a 16-bit W, as they are trained."""
    k, n = case.n_in, case.n_out
    factors = [
        (
            randn(r, k, like=case, device=device, scale=k**-0.5, dtype=torch.float32),
            randn(n, r, like=case, device=device, scale=0.1, dtype=torch.float32),
        )
        for r in itertools.islice(itertools.cycle(case.ranks), adapters)
    ]
    return (
        randn(n, k, like=case, device=device, scale=k**-0.5),
        randn(n, like=case, device=device),
        [(a.requires_grad_(), b.requires_grad_()) for a, b in factors],
    )


def of_reference(
    op: Op, args: tuple, leaves: tuple[int, ...], g: Tensor | list[Tensor], mode: str
) -> tuple[Callable[[], list[Tensor]], Callable[[], list[Tensor]]]:
    """(plain, truth) of a Problem whose call is one op on these arguments."""

    def results(dtype: torch.dtype | None = None) -> list[Tensor]:
        own, made = with_leaves(Sample("", args, leaves), dtype)
        return evaluate(Run(lambda: outputs(op.reference(*own))[0], tuple(made)), g, mode)

    return results, lambda: results(torch.float64)


def roofline(costs: Sequence[Cost], flops: float, byterate: float) -> float:
    """The least seconds that kernels of these costs take, one after the other."""
    return sum(max(cost.flops / flops, cost.bytes / byterate) for cost in costs)
