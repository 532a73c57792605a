"""LoRA on the C++ launchers of the ops library, CPU and CUDA."""

from __future__ import annotations

import torch

from ..common.library import unavailable as unavailable
from ._compose import compose, compose_multi, compose_slices, one_by_one
from ._compose import why_not as why_not
from .plan import plan as make_plan

VERIFIED_ON: frozenset[str] = frozenset()  # compute capabilities with a correct run under benchmarks/results
# The ops with CUDA launchers; all have CPU ones.
ON_CUDA = frozenset(
    lora + op for lora in ("lora", "multi_lora") for op in ("_add", "_add_backward", "_linear", "_linear_backward")
) | {"lora_linear_slices", "lora_linear_slices_backward"}

_ops = torch.ops._peft_kernels


def _of_cuda(t):
    """Whether the launchers are CUDA's: on a GPU, or in their emulation."""
    return t.is_cuda or _ops is not torch.ops._peft_kernels


def add_(*args):
    return _ops.lora_add_.default(*args)


def backward_(*args):
    return _ops.lora_backward_.default(*args)


_one_by_one = one_by_one(add_, backward_)


def slices_add_(ys, x, *args):
    return _one_by_one[0](ys, x, *args) if _of_cuda(x) else _ops.lora_slices_add_.default(ys, x, *args)


def slices_backward_(dx, gs, x, *args):
    return _one_by_one[1](dx, gs, x, *args) if _of_cuda(x) else _ops.lora_slices_backward_.default(dx, gs, x, *args)


def _planned(args):
    """The arguments of a primitive of many adapters, behind y or dx, with a plan if the kernels are CUDA's."""
    *lead, r_indptr, scaling, ids, plan, r_max = args
    if plan is None and _of_cuda(ids):
        # Where adapters have few rows each, large tiles would be mostly empty.
        plan = make_plan(ids, r_indptr, 16 if len(ids) <= max(64, 16 * len(scaling)) else 64)
    return *lead, r_indptr, scaling, ids, plan, r_max


def multi_add_(*args):
    _ops.multi_lora_add_.default(*_planned(args[:9]), *args[9:])


def apply_(*args):
    _ops.lora_apply_.default(*args)


def multi_backward_(*args):
    return _ops.multi_lora_backward_.default(*_planned(args[:10]), *args[10:])


lora_add, lora_add_, lora_add_backward, lora_linear, lora_linear_backward = compose(add_, backward_)
(
    multi_lora_add,
    multi_lora_add_,
    multi_lora_add_backward,
    multi_lora_linear,
    multi_lora_linear_backward,
    lora_apply,
    lora_apply_,
) = compose_multi(multi_add_, multi_backward_, apply_)
lora_linear_slices, lora_linear_slices_backward = compose_slices(slices_add_, slices_backward_)
