"""LoRA on the C++ launchers of the ops library, CPU and CUDA."""

from __future__ import annotations

import torch

from ..common.library import unavailable as unavailable
from ._compose import compose, compose_multi, compose_slices, one_by_one
from ._compose import why_not as why_not

VERIFIED_ON: frozenset[str] = frozenset()  # compute capabilities with a correct run under benchmarks/results


def add_(*args):
    return torch.ops._peft_kernels.lora_add_.default(*args)


def backward_(*args):
    return torch.ops._peft_kernels.lora_backward_.default(*args)


_one_by_one = one_by_one(add_, backward_)


def slices_add_(ys, x, *args):
    if x.is_cpu:
        return torch.ops._peft_kernels.lora_slices_add_.default(ys, x, *args)
    return _one_by_one[0](ys, x, *args)


def slices_backward_(dx, gs, x, *args):
    if x.is_cpu:
        return torch.ops._peft_kernels.lora_slices_backward_.default(dx, gs, x, *args)
    return _one_by_one[1](dx, gs, x, *args)


def multi_add_(*args):
    torch.ops._peft_kernels.multi_lora_add_.default(*args)


def apply_(*args):
    torch.ops._peft_kernels.lora_apply_.default(*args)


def why_not_lora_apply(y, *args):
    return why_not(y, *args) if y.is_cpu else "the CUDA kernels take no slices"


def multi_backward_(*args):
    return torch.ops._peft_kernels.multi_lora_backward_.default(*args)


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
