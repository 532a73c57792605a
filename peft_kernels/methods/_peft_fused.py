"""Layers of Hugging Face PEFT on our kernels: what all kinds of them have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..ops._autocast import autocasting


class Fused(ABC):
    """The forward of one layer of PEFT."""

    def __init__(self, module: nn.Module):
        self.module: Any = module

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        usual = not (args or module._disable_adapters or module.merged_adapters)
        out = self.fused(x, **kwargs) if usual and getattr(module, "cast_input_dtype_enabled", True) else None
        return type(module).forward(module, x, *args, **kwargs) if out is None else out

    @abstractmethod
    def fused(self, x: Tensor, **kwargs: Any) -> Tensor | None:
        """The layer's output on the kernels, or None where they do not compute it."""

    @abstractmethod
    def unfit(self) -> str:
        """Why the kernels do not compute the active adapters, or ""."""


def plain(layer: nn.Module) -> bool:
    """Whether calling a linear is F.linear of its tensors and nothing else."""
    return type(layer) is nn.Linear and unhooked(layer) and type(weight(layer)) in (nn.Parameter, Tensor)


def unhooked(layer: nn.Module) -> bool:
    hooked = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return not hooked and "forward" not in layer.__dict__


def bare(base: nn.Module, x: Tensor) -> bool:
    """Whether an op may do the product of the base, in place of calling it."""
    if not plain(base):
        return False
    return weight(base).dtype == x.dtype or autocasting(x.device)


def wide(factor: Tensor, x: Tensor) -> bool:
    """Whether a factor has the dtype of x or a wider one."""
    return factor.dtype == x.dtype or torch.promote_types(factor.dtype, x.dtype) == factor.dtype


def weight(layer: nn.Module) -> Tensor:
    found = layer._parameters.get("weight")
    return cast(nn.Linear, layer).weight if found is None else found  # while FSDP has it unsharded, no parameter
