"""Gated: a method whose effect is scaled by a learned function of the input. Mao et al. 2021, arXiv:2110.07577."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..engine.method import Method, Part, Phase, Tuner
from ..engine.rows import refuse_cache
from ..engine.site import Base, Site
from ..engine.stack import Known
from .lora import LoRA


@dataclass(frozen=True)
class Gated(
    Method, roles=(), lr=2e-3, tiny={"inner": LoRA(rank=2)}, kinds=("linear", "span", "module"), family="hybrid"
):
    """A method scaled by a learned gate, one number per row of the batch. Mao et al. 2021, arXiv:2110.07577.

    y + g (tuned - y) with g = mean over the sequence of sigmoid(w x + b), padding included. The gate depends on the
    input, so a gated method cannot be merged. What it trains beside itself (Compacter's LayerNorms) has no gate.
    """

    inner: Method  # the gated one; its targets and learning rate hold

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.inner, Method) or not hasattr(self.inner, "tuner"):
            raise ValueError(
                f"Gated got {self.inner!r}; expected one method such as pk.LoRA(); gate each member of a union"
            )
        object.__setattr__(self, "roles", self.inner.roles)
        object.__setattr__(self, "lr", self.inner.lr)

    def expand(self, part: Part) -> list[Part]:
        own, *others = self.inner.expand(replace(part, method=self.inner))
        return [replace(own, method=self), *others]

    def ejected(self) -> Gated:
        return replace(self, inner=self.inner.ejected())

    def select(self, sites: list[Site]) -> list[Site]:
        return super().select(self.inner.select(sites))

    def prepare(self, model: nn.Module, whole: tuple[str, ...]) -> bool:
        return self.inner.prepare(model, whole)

    def at(self, site: Site) -> Gated:
        return replace(self, inner=self.inner.at(site))

    def phases(self, total_steps: int) -> list[Phase]:
        return self.inner.phases(total_steps)

    def attached(self, tuners: list[Tuner]) -> None:
        self.inner.attached([cast(GatedTuner, tuner).inner for tuner in tuners])

    def enter(self, tuners: list[Tuner], phase: str) -> None:
        self.inner.enter([cast(GatedTuner, tuner).inner for tuner in tuners], phase)

    def loss(self, model: nn.Module, batch: Any, outputs: Any) -> Tensor | None:
        return self.inner.loss(model, batch, outputs)


class GatedTuner(Tuner, method=Gated):
    def __init__(self, cfg: Gated, site: Site):
        super().__init__(cfg, site)
        self.inner = cfg.inner.tuner(cfg.inner, site)
        self.w = site.param(site.n_in, init="kaiming")  # [in]
        self.b = site.param(1)

    def forward(self, base: Base, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.inner.opaque:  # it runs its own module beside the frozen one
            refuse_cache(base.site, args, kwargs, "which two modules would fill")
        y = base(x, *args, **kwargs)
        tuned = self.inner(Known(base, ((x, *args), kwargs), y), x, *args, **kwargs)
        gate = torch.sigmoid((x * self.w).sum(-1) + self.b)  # [batch, ...]
        if gate.dim() > 1:
            gate = gate.flatten(1).mean(1)
        if isinstance(y, tuple):  # attention returns its weights too
            return (_between(y[0], tuned[0], gate), *tuned[1:])
        return _between(y, tuned, gate)


def _between(y: Tensor, tuned: Tensor, gate: Tensor) -> Tensor:
    """y + gate (tuned - y) with a number per row: gate [batch] or, of one row without a batch, [1]."""
    return torch.lerp(y, tuned, gate.view(-1, *[1] * (y.dim() - 1)).to(y.dtype))
