"""LoRA layers of Hugging Face PEFT on our kernels."""

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
from ._peft_fused import Fused, bare, plain, unhooked, weight, wide
from ._rng import seeds

_TABLES = 64  # of mixed batches that are kept


class FusedLoRA(Fused):
    def __init__(self, module: nn.Module):
        super().__init__(module)
        self.kept = Kept()  # the factors of the last mixed batch, side by side

    def fused(self, x: Tensor, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Tensor | None:
        if any(value is not None for value in kwargs.values()):
            return None
        if adapter_names is not None:
            return self.mixed(x, adapter_names)
        own = [(name, *self.layers(name)) for name in self.running()]
        for name, down, up, dropout in own:
            if self._unfit(name, down, up, dropout) or not wide(weight(down), x):
                return None
        base, y = self.module._modules["base_layer"], None
        for name, down, up, dropout in own:
            a, b, scale, p = weight(down), weight(up), self.module.scaling[name], _probability(dropout)
            rng = seeds(x) if p else None
            if y is not None:
                y = ops.lora_add_(y, x, a, b, scale, p=p, rng=rng)
            elif bare(base, x):
                y = ops.lora_linear(x, weight(base), base._parameters["bias"], a, b, scale, p=p, rng=rng)
            elif isinstance(base, Packed) and unhooked(base):
                y = base.lora_linear(x, a, b, scale, p=p, rng=rng)
            else:
                y = ops.lora_add(base(x), x, a, b, scale, p=p, rng=rng)
        return y

    def running(self) -> list[str]:
        known = self.module._modules["lora_A"]._modules
        return [name for name in self.module.active_adapters if name in known]

    def layers(self, name: str) -> tuple[nn.Module, nn.Module, nn.Module]:
        """lora_A, lora_B and the dropout of an adapter; not by attribute, which takes longer than a small product."""
        own = self.module._modules
        return own["lora_A"]._modules[name], own["lora_B"]._modules[name], own["lora_dropout"]._modules[name]

    def unfit(self) -> str:
        return next(filter(None, (self._unfit(name, *self.layers(name)) for name in self.running())), "")

    def _unfit(self, name: str, down: nn.Module, up: nn.Module, dropout: nn.Module) -> str:
        if name in self.module.lora_variant:
            return f"{name!r} is a {type(self.module.lora_variant[name]).__name__}, which is more than LoRA"
        if not (plain(down) and plain(up)):
            return f"lora_A and lora_B of {name!r} are no plain linears, or have hooks"
        if down._parameters["bias"] is not None or up._parameters["bias"] is not None:
            return f"{name!r} has lora_bias"
        if type(dropout) not in (nn.Dropout, nn.Identity):
            return f"the dropout of {name!r} is a {type(dropout).__name__}"
        return ""

    def mixed(self, x: Tensor, names: Sequence[str]) -> Tensor | None:
        """Of a batch whose rows have these adapters; "__base__" is none."""
        module = self.module
        module._check_forward_args(x, adapter_names=names)
        own = [name for name in dict.fromkeys(names) if name in module.lora_A]
        if not own:
            return module.base_layer(x)
        layers = [self.layers(name) for name in own]
        unfit = any(self._unfit(name, *one) or _probability(one[2]) for name, one in zip(own, layers, strict=True))
        if unfit or x.dim() < 2:
            return None
        a, b = ([weight(one[i]) for one in layers] for i in (0, 1))
        if len({t.dtype for t in a}) > 1 or not wide(a[0], x):
            return None
        ranks, scales = tuple(map(len, a)), tuple(float(module.scaling[name]) for name in own)
        make = _tables.__wrapped__ if torch.compiler.is_compiling() else _tables
        ids, indptr, scaling = make(tuple(names), tuple(own), ranks, scales, a[0].dtype, x.device)

        def together() -> tuple[Tensor, Tensor]:
            return torch.cat(a), torch.cat([t.T for t in b])

        bank = together() if torch.is_grad_enabled() else self.kept.once("bank", together, [*a, *b])
        factors, base = (*bank, indptr, scaling, ids), module.base_layer
        if bare(base, x):
            return ops.multi_lora_linear(x, weight(base), base.bias, *factors, r_max=max(ranks))
        return ops.multi_lora_add(base(x), x, *factors, r_max=max(ranks))


def _probability(dropout: nn.Module) -> float:
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


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
