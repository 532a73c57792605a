"""QLoRA: LoRA on a quantised base. Dettmers et al. 2023, arXiv:2305.14314.

    y = x Q(W)^T + bias + (alpha/r) drop(x) A^T B^T        Q: NF4 or int8, see pk.quantize; A and B stay dense

and with quantization_aware, W' = Q(W) + (alpha/r) B A being quantised anew at every step,

    y = x Q(W')^T + bias        dy/dA, dy/dB as if Q were the identity (straight-through; Bengio et al. 2013,
                                arXiv:1308.3432)

so that a merge, which stores Q(W'), computes what was trained.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import ops, quant
from ..engine.method import Tuner, promoted
from ..engine.packed import Packed
from ..engine.site import Base, Site
from ..ops._autocast import exact
from .lora import LoRA, LoRATuner


@dataclass(frozen=True)
class QLoRA(
    LoRA,
    roles=("*",),
    lr=2e-3,
    tiny={"rank": 2, "dropout": 0.25, "double_quant": False, "quantization_aware": True},
    kinds=("linear",),
    family="reparametrised",
    kernel="lora nf4",
):
    """LoRA on a base in 4 bits. Dettmers et al. 2023, arXiv:2305.14314.

    Attaching it quantises the model's linear layers in place, as pk.quantize does; layers that are quantised already
    stay as they are. detach takes off the adapter and leaves the quantised model. With quantization_aware, each layer
    whose gradient is wanted holds a packed copy of its weight until the backward, and dropout falls on A's input alone.
    """

    rank: int = 64  # rows of A, columns of B
    dropout: float = 0.1  # of the input of A, in training
    kind: str = "nf4"  # or int8
    double_quant: bool = True  # of nf4: the scales in 8 bits
    blocksize: int = 64  # of nf4: weights that share a scale
    skip: tuple[str, ...] = ("head", "embed")  # roles or globs of what stays dense
    quantization_aware: bool = False  # train through the weight as a merge packs it

    def __post_init__(self):
        super().__post_init__()
        if self.kind not in quant.KINDS:
            raise ValueError(f"QLoRA kind = {self.kind!r}; expected one of {', '.join(quant.KINDS)}")
        if self.quantization_aware:
            object.__setattr__(self, "tuner", AwareTuner)

    def at(self, site: Site) -> LoRA:
        if self.quantization_aware and site.rows is not None:
            raise ValueError(
                f"{site.role} is some rows of {site.name}, whose blocks of weights others share; with "
                f"quantization_aware target the whole of it, as '*.{site.name.rpartition('.')[2]}'"
            )
        return super().at(site)

    def prepare(self, model: nn.Module, whole: tuple[str, ...]) -> bool:
        skip = (*self.skip, *whole)  # a merge would round what is trained in full
        settings = {"double_quant": self.double_quant, "blocksize": self.blocksize, "skip": skip}
        return quant.quantized(model, self.kind, **settings)


class AwareTuner(LoRATuner):
    """LoRA through the weight as a merge packs it; elsewhere than on a packed layer, plain LoRA."""

    rounds = True

    def forward(self, base: Base, x: Tensor) -> Tensor:
        if not isinstance(base.site.module, Packed):
            return super().forward(base, x)
        p, rng = self.draw(x)
        if base.packed is None:  # more than the layer alone lies below: its weight is read
            y = Tuner.forward(self, base, x)
        else:
            grad = torch.is_grad_enabled()
            y = base.packed.linear(x, self._packed(base.packed, keep=not (grad or self.training)))
            if grad:
                update = self._update(x.detach())
                y = y + (update - update.detach())  # zeros, with the gradients of the factors
        return y + self._update(x, p, rng) - self._update(x) if p else y

    def folded_over(self, base: Base) -> tuple[Tensor, Tensor | None]:
        with exact(self.a.device):
            return super().folded_over(base)

    def _packed(self, layer: Packed, keep: bool) -> dict[str, Tensor]:
        """The layer's weight with the update as its format stores it; `keep`: until one of them changes."""

        def packed() -> dict[str, Tensor]:
            with torch.no_grad(), exact(layer.weight.device):
                return layer.quantized(self.fold(layer.dense(promoted(layer.dtype)), None)[0])

        return self._kept.once("packed", packed, [layer.weight, self.a, self.b]) if keep else packed()

    def _update(self, x: Tensor, p: float = 0.0, rng: Tensor | None = None) -> Tensor:
        zero = x.new_zeros(*x.shape[:-1], len(self.b))
        return ops.lora_add(zero, x, self.a, self.b, self.scale, p=p, rng=rng)
