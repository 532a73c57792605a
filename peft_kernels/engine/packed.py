"""Linear layers whose weights are kept in another format than floating point: what the engine asks of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

Stored = Mapping[str, Tensor]  # attribute -> tensor: together they are one packed weight


class Packed(nn.Linear):
    """A frozen linear layer with a packed weight. `weight` is then storage: nobody but the layer's class reads it.

    The layer's own forward takes x [..., in] of any floating dtype and returns a tensor nobody else holds.
    """

    format: ClassVar[str]
    dtype: torch.dtype  # in which the weight is read: what the dense layer had

    def stored(self) -> dict[str, Tensor]:
        """The tensors of the packed weight."""
        raise NotImplementedError

    def quantized(self, weight: Tensor) -> dict[str, Tensor]:
        """A weight [out, in] as `stored` tensors, rounded to the format; no gradient."""
        raise NotImplementedError

    def read(self, stored: Stored, dtype: torch.dtype) -> Tensor:
        """`stored` tensors of a layer of this shape as a new [out, in] in `dtype`."""
        raise NotImplementedError

    def linear(self, x: Tensor, stored: Stored) -> Tensor:
        """The layer's output with these tensors for its weight; differentiable in x."""
        raise NotImplementedError

    def lora_linear(self, x: Tensor, a: Tensor, b: Tensor, scale: Any, *, p: float, rng: Tensor | None) -> Tensor:
        """The layer's output with a low-rank update."""
        raise NotImplementedError

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [out, in], in `dtype` or the layer's own: a new tensor, no gradient."""
        return self.read(self.stored(), dtype or self.dtype)

    def rounded(self, weight: Tensor) -> Tensor:
        """What `dense` would return, in weight's dtype, after pack_(weight)."""
        return self.read(self.quantized(weight), weight.dtype)

    def pack_(self, weight: Tensor) -> None:
        """Writes a weight [out, in], rounded to the format, into the layer's own tensors."""
        values = self.quantized(weight)
        for name, own in self.stored().items():
            value = values[name].contiguous().view(-1).view(torch.uint8)
            own.detach().view(-1).view(torch.uint8)[: len(value)].copy_(value)  # it may have another dtype, and padding

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x, self.stored())


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
