"""AdaMix: a mixture of adapters of which each training step runs one, drawn at random; what is kept is their mean.

    o + up_j(act(down_i(o)))       i, j drawn from the experts, for each layer in each forward of a training
    loss + c [KL(q || p) + KL(p || q)] / 2       p and q predicted in two passes with draws of their own

o is the output of the feed-forward layer's last linear, before its dropout, its residual addition and, where one comes
after that, its LayerNorm. In KL the distribution to the left gets no gradient. Outside of training, and in what is
saved, each projection is the mean of its experts: for a shared up-projection and no nonlinearity that is the mean of
what the experts compute, otherwise near it, as far as the consistency term has drawn them together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..engine.batches import logits_of
from ..engine.losses import counted, symmetric_kl
from ..engine.method import Phase, Tuner
from ..engine.site import Base, Site
from ._bottleneck import Bottleneck, Bottlenecked


@dataclass(frozen=True)
class AdaMix(
    Bottlenecked, roles=("down",), lr=3e-4, tiny={"size": 4, "experts": 3}, family="additive", kernel="bottleneck"
):
    """Adapters after each feed-forward layer, drawn from a mixture and averaged. Wang et al. 2022, arXiv:2205.12410.

    A training step runs the model twice where consistency is not 0 and there is a choice of classes to predict; the
    second pass counts for that term alone. At its end `pk.fit` leaves one adapter, the mean, which evaluation ran from
    the start. average=False keeps the experts, as transformers' Trainer needs it; then

        for module in model.modules():
            if isinstance(module, pk.AdaMix.tuner):
                module.train()  # draws, in a model that else is in eval mode

    shows what drawn experts do, so what averaging costs; model.eval() is the mean again. Not mergeable.
    """

    size: int = 16  # of the bottleneck; 0: features // reduction_factor
    activation: str = "gelu"  # relu, gelu, gelu_tanh, silu (or swish, the same), tanh, leaky_relu, identity
    experts: int = 4  # of each projection that is not shared
    share_up: bool = True  # one up-projection for all experts
    share_down: bool = False  # one down-projection for all experts
    consistency: float = 1.0  # c; 0: one pass
    average: bool = True  # at the end of a training

    def __post_init__(self):
        super().__post_init__()
        if self.experts < 1 or self.consistency < 0:
            raise ValueError(
                f"AdaMix experts = {self.experts}, consistency = {self.consistency}; expected at least 1 and 0"
            )
        if self.share_up and self.share_down:
            raise ValueError("AdaMix share_up = True and share_down = True leave one adapter; share one of the two")

    def phases(self, total_steps: int) -> list[Phase]:
        return [Phase("train", total_steps), *([Phase("average", 0)] if self.average else [])]

    def enter(self, tuners: list[Tuner], phase: str) -> None:
        if phase == "average":
            for tuner in cast("list[AdaMixTuner]", tuners):
                tuner.adapter.average()

    def loss(self, model: nn.Module, batch: Any, outputs: Any) -> Tensor | None:
        first = logits_of(outputs)
        if not self.consistency or first is None or first.shape[-1] < 2:
            return None
        again = logits_of(model(**batch) if isinstance(batch, Mapping) else model(batch[0]))
        return self.consistency * symmetric_kl(first, cast(Tensor, again), counted(model, batch, first))


class Experts(Bottleneck):
    """Bottlenecks of which the projections that they do not share have a dimension more in front, [experts, ...]."""

    def __init__(self, cfg: AdaMix, site: Site):
        super().__init__(cfg, site)
        others = [Bottleneck(cfg, site) for _ in range(cfg.experts - 1)]
        for name in _NAMES:
            if not (cfg.share_down if name.startswith("down") else cfg.share_up):
                self.put(name, torch.stack([getattr(expert, name).detach() for expert in (self, *others)]))

    def put(self, name: str, value: Tensor) -> None:
        """A parameter of another shape."""
        setattr(self, name, nn.Parameter(value, requires_grad=getattr(self, name).requires_grad))

    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        pick = _drawn if self.training else _mean
        return *pick(self.down_weight, self.down_bias), *pick(self.up_weight, self.up_bias)

    def average(self) -> None:
        means = *_mean(self.down_weight, self.down_bias), *_mean(self.up_weight, self.up_bias)
        for name, mean in zip(_NAMES, means, strict=True):
            if mean.shape != getattr(self, name).shape:
                self.put(name, mean.detach())


_NAMES = ("down_weight", "down_bias", "up_weight", "up_bias")


def _mean(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return (weight, bias) if weight.dim() == 2 else (weight.mean(0), bias.mean(0))


def _drawn(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """One expert. The draw is from torch's generator, whose state a checkpoint restores for its recomputation."""
    if weight.dim() == 2:
        return weight, bias
    number = torch.randint(len(weight), (1,), device=weight.device)
    return weight.index_select(0, number)[0], bias.index_select(0, number)[0]


class AdaMixTuner(Tuner, method=AdaMix):
    fresh = True

    def __init__(self, cfg: AdaMix, site: Site):
        super().__init__(cfg, site)
        self.adapter = Experts(cfg, site)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        return self.adapter(base(x))

    def reshape(self, values: dict[str, Tensor]) -> None:
        for name in _NAMES:  # the file may hold the mean
            own, given = getattr(self.adapter, name), values.get(f"adapter.{name}")
            if given is not None and given.shape == own.shape[1:]:
                self.adapter.put(name, own.detach()[0].clone())
