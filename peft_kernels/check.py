"""check: the numeric law of every op, and a self-test that applies it to every backend of this machine.

The law: at most twice the error that plain torch makes in the same dtype, plus two units in the last place of the
largest number; both errors are against the reference in fp64.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .ops._op import BackendError, Op, Sample, backend

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SAMPLES = 6  # of each op and dtype: enough to find a kernel that is wrong on this machine, few enough for seconds


# -- the law ----------------------------------------------------------------------------------------------------------


def compare(out: Tensor, plain: Tensor, truth: Tensor) -> tuple[float, str]:
    """(error over what the law allows, "" or what is wrong) of `out`.

    plain: the reference in the dtype of `out`.   truth: the reference in fp64.
    """
    if out.shape != truth.shape:
        return torch.inf, f"shape {tuple(out.shape)}, expected {tuple(truth.shape)}"
    if out.dtype != plain.dtype:
        return torch.inf, f"dtype {out.dtype}, expected {plain.dtype}"
    if not out.isfinite().all() and truth.isfinite().all():
        return torch.inf, "not finite"
    scale = truth.abs().max().item() if truth.numel() else 0.0
    eps = torch.finfo(out.dtype).eps if out.is_floating_point() else 0.0  # integers are right or wrong
    allowed = 2 * _error(plain, truth) + 2 * eps * scale
    error = _error(out, truth)
    wrong = "" if error <= allowed else f"error {error:.3g}, allowed {allowed:.3g}"
    return (error / allowed if allowed else torch.inf if error else 0.0), wrong


def _error(out: Tensor, truth: Tensor) -> float:
    return (out.double() - truth).abs().max().item() if out.numel() else 0.0


def outputs(out: Any) -> list[Tensor]:
    """What an op returned, as a list; several results, which come as a list, are one vector in it."""
    outs = out if isinstance(out, tuple) else (out,)
    return [o if isinstance(o, Tensor) else torch.cat([t.flatten() for t in o]) for o in outs]


def double(args: tuple) -> tuple:
    """The arguments with every floating tensor in fp64."""
    return tree_map(lambda a: a.double() if isinstance(a, Tensor) and a.is_floating_point() else a, args)


def with_leaves(sample: Sample, dtype: torch.dtype | None = None) -> tuple[list, list[Tensor]]:
    """The sample's arguments with fresh leaves where it is differentiable, and those leaves."""
    args = list(double(sample.args) if dtype == torch.float64 else sample.args)
    for i in sample.differentiable:
        args[i] = args[i].detach().clone(memory_format=torch.preserve_format).requires_grad_()
    return args, [args[i] for i in sample.differentiable]


def forward(call: Callable, sample: Sample, dtype: torch.dtype | None = None) -> list[Tensor]:
    """What `call` returns for the sample; dtype fp64: computed in fp64."""
    return outputs(call(*(double(sample.args) if dtype == torch.float64 else sample.args)))


def gradients(call: Callable, sample: Sample, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """The gradients of the sample's differentiable arguments, for one fixed cotangent; dtype fp64: computed in fp64."""
    args, own = with_leaves(sample, dtype)
    out = outputs(call(*args))[0]
    made = torch.Generator().manual_seed(1)
    # Rounded as the op's own output is, so that the fp64 truth starts from the same numbers.
    cotangent = torch.randn(out.shape, generator=made, dtype=torch.float64).to(sample.args[0].dtype)
    return torch.autograd.grad(out, own, cotangent.to(out.device, out.dtype))


# -- the self-test ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What the self-test found for one backend.

    state: "ok", "failed", or "absent" for what cannot run here; then dtype may be None, for all dtypes.
    ratio: the largest error over what the law allows; None where nothing was compared or it is not finite.
    why: what is wrong and where, or why it is absent; beside "ok", why it refused some of the samples.
    """

    op: str
    backend: str
    device: str
    dtype: str | None
    state: str
    ratio: float | None = None
    why: str = ""


def check(op: Op, backends: Collection[str] | None = None) -> Iterator[Result]:
    """Runs a few samples of `op`, forward, in place and gradients, on each of `backends` (None: all) in each dtype."""
    for device in ("cpu", "cuda"):
        for name, absent in op.backends(device).items():
            if backends is not None and name not in backends:
                continue
            if absent:
                yield Result(op.name, name, device, None, "absent", why=absent)
            elif device == "cpu" or torch.cuda.is_available():
                yield from (_checked(op, name, device, dtype) for dtype in DTYPES)


def _checked(op: Op, name: str, device: str, dtype: torch.dtype) -> Result:
    where = op.name, name, device, str(dtype).removeprefix("torch.")
    samples = list(op.samples(dtype, device))
    if len(samples) > SAMPLES:  # spread over all of them, because neighbours are alike
        samples = [samples[i * (len(samples) - 1) // (SAMPLES - 1)] for i in range(SAMPLES)]
    steps: list[tuple[str, Callable, Callable]] = [
        ("output", forward, op.run),
        ("output in place", forward, lambda *args: op.run(*_copied(args), inplace=True)),
        *([("gradient", gradients, op)] if op.gradient else []),
    ]
    worst, refused, ran = 0.0, "" if samples else "no samples in this dtype", False
    for sample, (what, compute, call) in itertools.product(samples, steps):
        try:
            with backend(name):
                ours = compute(call, sample)
            ran = True
            plain, truth = compute(op.reference, sample), compute(op.reference, sample, torch.float64)
            found = [compare(*tensors) for tensors in zip(ours, plain, truth, strict=True)]
        except BackendError as error:
            refused = str(error)
            continue
        except Exception as error:  # whatever a broken kernel or driver raises is what the self-test is for
            return Result(*where, "failed", why=f"{sample.id}: {type(error).__name__}: {' '.join(str(error).split())}")
        worst = max(worst, *(ratio for ratio, _ in found))
        if wrong := [f"{sample.id}, {what} {i}: {text}" for i, (_, text) in enumerate(found) if text]:
            return Result(*where, "failed", worst if worst < torch.inf else None, wrong[0])
    return Result(*where, "ok", worst, refused) if ran else Result(*where, "absent", why=refused)


def _copied(args: tuple) -> list:
    return [a.clone() if isinstance(a, Tensor) else a for a in args]


def rows(results: Collection[Result]) -> list[tuple[str, ...]]:
    """The results as a table, one line per op and backend."""
    groups: dict[tuple[str, ...], list[Result]] = {}
    for r in results:
        groups.setdefault((r.op, r.backend, r.device), []).append(r)
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    table = [("op", "backend", "on", *names, "")]
    for group, found in groups.items():
        ratios = {r.dtype: "-" if r.ratio is None else f"{r.ratio:.2f}" for r in found}
        table.append((*group, *(ratios.get(name, "-") for name in names), _status(found)))
    return table


def _status(found: list[Result]) -> str:
    if failed := [f"{r.dtype} {r.why}" for r in found if r.state == "failed"]:
        return f"FAILED: {'; '.join(failed)}"
    reasons = [*(["ok"] if any(r.state == "ok" for r in found) else []), *(r.why for r in found if r.why)]
    return "; ".join(dict.fromkeys(reasons))


def verdict(results: Collection[Result]) -> str:
    """One line: how many of what ran failed, and what the numbers of the table are."""
    ran, failed = (sum(r.state in states for r in results) for states in (("ok", "failed"), ("failed",)))
    return f"{failed} of {ran} failed; numbers: the largest error over the allowed one (at most 1 is right)"
