"""Linear layers whose weights are kept in another format than floating point: what the engine asks of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class Packed(nn.Linear):
    """A frozen linear layer with a packed weight. `weight` is then storage: nobody but the layer's class reads it.

    The layer's own forward takes x [..., in] of any floating dtype and returns a tensor nobody else holds.
    """

    format: ClassVar[str]
    dtype: torch.dtype  # in which the weight is read: what the dense layer had

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [out, in], in `dtype` or the layer's own: a new tensor, no gradient."""
        raise NotImplementedError

    def pack_(self, weight: Tensor) -> None:
        """Writes a weight [out, in], rounded to the format, into the layer's own tensors."""
        raise NotImplementedError

    def rounded(self, weight: Tensor) -> Tensor:
        """What `dense` would return, in weight's dtype, after pack_(weight)."""
        raise NotImplementedError

    def stored(self) -> dict[str, Tensor]:
        """The tensors of the packed weight."""
        raise NotImplementedError

    def lora_linear(self, x: Tensor, a: Tensor, b: Tensor, scale: Any, *, p: float, rng: Tensor | None) -> Tensor:
        """The layer's output with a low-rank update."""
        raise NotImplementedError


def stand_in(module: nn.Module, name: str, p: Tensor) -> Tensor:
    """A tensor with the shape and dtype that the base's tensor stands for: of a packed weight, on the meta device."""
    if isinstance(module, Packed) and name == "weight":
        return torch.empty(module.out_features, module.in_features, dtype=module.dtype, device="meta")
    return p


def unpacked(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the module's own floating tensors, a packed weight as its dense form in fp32 or wider."""
    if isinstance(module, Packed):
        yield "weight", module.dense(torch.promote_types(module.dtype, torch.float32))
        if module.bias is not None:
            yield "bias", module.bias
        return
    for name, t in (*module._parameters.items(), *module._buffers.items()):
        if t is not None and t.is_floating_point():
            yield name, t
