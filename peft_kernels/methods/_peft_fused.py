"""Forwards of layers of Hugging Face PEFT on our kernels."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..engine.packed import Packed
from ._kept import Kept
from ._rng import seeds

_TABLES = 64  # of mixed batches that are kept


class Fused:
    """The forward of one layer of PEFT."""

    def __init__(self, module: nn.Module):
        self.module: Any = module
        self.kept = Kept()  # the factors of the last mixed batch, side by side

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        usual = not (args or module.disable_adapters or module.merged)
        out = self.fused(x, **kwargs) if usual and getattr(module, "cast_input_dtype_enabled", True) else None
        return type(module).forward(module, x, *args, **kwargs) if out is None else out

    def fused(self, x: Tensor, **kwargs: Any) -> Tensor | None:
        """The layer's output on the kernels, or None where they do not compute it."""
        raise NotImplementedError

    def unfit(self) -> str:
        """Why the kernels do not compute the active adapters, or ""."""
        raise NotImplementedError


class FusedLoRA(Fused):
    def fused(self, x: Tensor, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Tensor | None:
        if any(value is not None for value in kwargs.values()):
            return None
        if adapter_names is not None:
            return self.mixed(x, adapter_names)
        names = self.running()
        if not names or self.unfit() or not all(_wide(self.module.lora_A[name].weight, x) for name in names):
            return None
        base, y = self.module.base_layer, None
        for name in names:
            a, b, scale = self.module.lora_A[name].weight, self.module.lora_B[name].weight, self.module.scaling[name]
            p = self.dropout(name)
            rng = seeds(x) if p else None
            if y is not None:
                y = ops.lora_add_(y, x, a, b, scale, p=p, rng=rng)
            elif _bare(base, x):
                y = ops.lora_linear(x, base.weight, base.bias, a, b, scale, p=p, rng=rng)
            elif isinstance(base, Packed) and _unhooked(base):
                y = base.lora_linear(x, a, b, scale, p=p, rng=rng)
            else:
                y = ops.lora_add(base(x), x, a, b, scale, p=p, rng=rng)
        return y

    def running(self) -> list[str]:
        return [name for name in self.module.active_adapters if name in self.module.lora_A]

    def dropout(self, name: str) -> float:
        layer = self.module.lora_dropout[name]
        return layer.p if isinstance(layer, nn.Dropout) and layer.training else 0.0

    def unfit(self) -> str:
        return next(filter(None, map(self._unfit, self.running())), "")

    def _unfit(self, name: str) -> str:
        module = self.module
        if variant := module.lora_variant.get(name):
            return f"{name!r} is a {type(variant).__name__}, which is more than LoRA"
        a, b = module.lora_A[name], module.lora_B[name]
        if not (_plain(a) and _plain(b)):
            return f"lora_A and lora_B of {name!r} are no plain linears, or have hooks"
        if a.bias is not None or b.bias is not None:
            return f"{name!r} has lora_bias"
        if type(module.lora_dropout[name]) not in (nn.Dropout, nn.Identity):
            return f"the dropout of {name!r} is a {type(module.lora_dropout[name]).__name__}"
        return ""

    def mixed(self, x: Tensor, names: Sequence[str]) -> Tensor | None:
        """Of a batch whose rows have these adapters; "__base__" is none."""
        module = self.module
        module._check_forward_args(x, adapter_names=names)
        own = [name for name in dict.fromkeys(names) if name in module.lora_A]
        if any(map(self._unfit, own)) or any(map(self.dropout, own)) or x.dim() < 2:
            return None
        if not own:
            return module.base_layer(x)
        a, b = ([layers[name].weight for name in own] for layers in (module.lora_A, module.lora_B))
        if len({t.dtype for t in a}) > 1 or not _wide(a[0], x):
            return None
        ranks, scales = tuple(map(len, a)), tuple(float(module.scaling[name]) for name in own)
        make = _tables.__wrapped__ if torch.compiler.is_compiling() else _tables
        ids, indptr, scaling = make(tuple(names), tuple(own), ranks, scales, a[0].dtype, x.device)

        def together() -> tuple[Tensor, Tensor]:
            return torch.cat(a), torch.cat([t.T for t in b])

        bank = together() if torch.is_grad_enabled() else self.kept.once("bank", together, [*a, *b])
        factors, base = (*bank, indptr, scaling, ids), module.base_layer
        if _bare(base, x):
            return ops.multi_lora_linear(x, base.weight, base.bias, *factors, r_max=max(ranks))
        return ops.multi_lora_add(base(x), x, *factors, r_max=max(ranks))


class FusedLoKr(Fused):
    def fused(self, x: Tensor, **kwargs: Any) -> Tensor | None:
        module, names = self.module, self.running()
        if kwargs or not names or module.training and any(map(self.dropped, names)):
            return None
        pairs = [(self.left(name), self.right(name), module.scaling[name]) for name in names]
        if not all(_wide(left, x) and left.dtype == right.dtype for left, right, _ in pairs):
            return None
        y = module.base_layer(x)
        for number, (left, right, scale) in enumerate(pairs):
            if number or _plain(module.base_layer):  # nobody else holds y
                y = ops.kron_linear_(y, x, left.T, right.T, scale=scale)
            else:
                y = ops.kron_linear(x, left.T, right.T, acc=y, scale=scale)
        return y.to(x.dtype)

    def running(self) -> list[str]:
        return [name for name in self.module.active_adapters if name in self.module._available_adapters]

    def dropped(self, name: str) -> bool:
        return bool(self.module.rank_dropout[name] or self.module.module_dropout[name])

    def unfit(self) -> str:
        name = next(filter(self.dropped, self.running()), None)
        return "" if name is None else f"{name!r} has rank_dropout or module_dropout, and is fused in eval mode alone"

    def left(self, name: str) -> Tensor:
        module = self.module
        return module.lokr_w1[name] if name in module.lokr_w1 else _times(module.lokr_w1_a, module.lokr_w1_b, name)

    def right(self, name: str) -> Tensor:
        module = self.module
        return module.lokr_w2[name] if name in module.lokr_w2 else _times(module.lokr_w2_a, module.lokr_w2_b, name)


KINDS: dict[str, type[Fused]] = {"lora": FusedLoRA, "lokr": FusedLoKr}  # module of PEFT -> of its Linear


def _times(a: Any, b: Any, name: str) -> Tensor:
    return (a[name] @ b[name]).to(a[name].dtype)  # autocast makes less


def _plain(layer: nn.Module) -> bool:
    """Whether calling a linear is F.linear of its tensors and nothing else."""
    return type(layer) is nn.Linear and _unhooked(layer) and type(layer.weight) in (nn.Parameter, Tensor)


def _unhooked(layer: nn.Module) -> bool:
    hooked = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return not hooked and "forward" not in layer.__dict__


def _bare(base: nn.Module, x: Tensor) -> bool:
    """Whether an op may do the product of the base, in place of calling it."""
    if not _plain(base):
        return False
    return base.weight.dtype == x.dtype or torch.is_autocast_enabled(x.device.type)


def _wide(factor: Tensor, x: Tensor) -> bool:
    """Whether a factor has the dtype of x or a wider one."""
    return torch.promote_types(factor.dtype, x.dtype) == factor.dtype


@functools.lru_cache(_TABLES)
def _tables(
    names: tuple[str, ...],
    own: tuple[str, ...],
    ranks: tuple[int, ...],
    scales: tuple[float, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """(the number of each row's adapter, or -1; the first rank of each adapter; its scale)"""
    with torch.inference_mode(False):
        ids = torch.tensor([own.index(name) if name in own else -1 for name in names], dtype=torch.int32)
        indptr = torch.tensor([0, *itertools.accumulate(ranks)])
        scaling = torch.tensor(scales, dtype=torch.promote_types(dtype, torch.float32))
        return ids.to(device), indptr.to(device), scaling.to(device)
