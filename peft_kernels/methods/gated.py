"""Gated: a method whose effect is scaled by a learned function of the input. Mao et al. 2021, arXiv:2110.07577.

    y + g (tuned - y)       g = sigmoid(w x + b)

In a bidirectional stack g is one number per row of the batch, its mean over all positions that are no padding. In a
causal one each position has its own: a mean would let a position see those behind it, and decoding with a key-value
cache, where a call has one position, could not repeat it.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..engine.method import Method, Part, Phase, Source, Tuner
from ..engine.rows import refuse_cache
from ..engine.site import Base, Site
from ..engine.stack import Known
from .lora import LoRA

_READS = ("input", "output")


@dataclass(frozen=True)
class Gated(
    Method, roles=(), lr=2e-3, tiny={"inner": LoRA(rank=2)}, kinds=("linear", "span", "module"), family="hybrid"
):
    """A method scaled by a learned gate, one number per row of the batch. Mao et al. 2021, arXiv:2110.07577.

    y + g (tuned - y) with g = mean of sigmoid(w x + b) over the sequence without its padding; in decoders each position
    has a gate of its own, since a mean would look ahead. The gate depends on the input, so a gated method cannot be
    merged. What it trains beside itself (Compacter's LayerNorms) has no gate.
    """

    inner: Method  # the gated one; its targets and learning rate hold
    reads: str = "input"  # what x is: the input of the module, or "output": what it returns without the method

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.inner, Method) or not hasattr(self.inner, "tuner"):
            raise ValueError(
                f"Gated got {self.inner!r}; expected one method such as pk.LoRA(); gate each member of a union"
            )
        if self.reads not in _READS:
            raise ValueError(f"Gated reads = {self.reads!r}; expected one of {', '.join(_READS)}")
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
        self.reads, self.each, self.masked = cfg.reads, bool(site.causal), site.padding is not None
        self.w = site.param(site.n_in if cfg.reads == "input" else site.n_out, init="kaiming")  # [in] or [out]
        self.b = site.param(1)

    def sources(self, site: Site) -> list[Source]:
        if site.padding is None:
            return []
        named = inspect.signature(site.padding.forward).parameters
        return [Source("padding", site.padding, argument="mask" if "mask" in named else "attention_mask")]  # T5's

    def forward(self, base: Base, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        known: Any = base
        if self.inner.opaque:  # it runs its own module beside the frozen one
            refuse_cache(base.site, args, kwargs, "which two modules would fill")
        if not self.inner.gated or self.reads == "output":
            y = base(x, *args, **kwargs)
            known = Known(base, ((x, *args), kwargs), y)
        if self.inner.gated:
            gate = self._gate(base, x if self.reads == "input" else _first(y), x.shape)
            return self.inner(known, x, *args, gate=gate, **kwargs)
        tuned = self.inner(known, x, *args, **kwargs)
        out = _first(y)
        gate = self._gate(base, x if self.reads == "input" else out, out.shape)
        if isinstance(y, tuple):  # attention returns its weights too
            return (_between(out, tuned[0], gate), *tuned[1:])
        return _between(out, tuned, gate)

    def _gate(self, base: Base, x: Tensor, shape: torch.Size) -> Tensor:
        """[B, S, 1] of positions or [B, 1, 1] of rows, which scale what has this shape; [..., 1] of features alone."""
        gate = torch.sigmoid((x * self.w).sum(-1, keepdim=True) + self.b)
        if gate.dim() < 3 or self.each and shape[:-1] == gate.shape[:-1]:
            return gate
        gate = gate.flatten(1, -2)  # [B, S, 1]
        seen = _seen(base.seen("padding") if self.masked else None)
        if seen is None:
            return gate.mean(1, keepdim=True)
        if seen.shape[1] != gate.shape[1]:
            raise RuntimeError(
                f"{self.site_name}: the gate reads {gate.shape[1]} positions, the attention mask speaks of "
                f"{seen.shape[1]}; gate a module in a block"
            )
        kept = seen.unsqueeze(-1)
        return torch.where(kept, gate, 0).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1)


def _seen(mask: Tensor | None) -> Tensor | None:
    """Which positions are no padding, bool [B or 1, S], by a mask [B, S] or [B, 1, queries, S] as attention gets it."""
    if mask is None or mask.dim() == 2:
        return None if mask is None else mask > 0
    # Added to the scores, or true (1) where a query sees a key.
    seen = mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask > 0
    return seen.flatten(1, -2).any(1)


def _first(y: Any) -> Tensor:
    return y[0] if isinstance(y, tuple) else y


def _between(y: Tensor, tuned: Tensor, gate: Tensor) -> Tensor:
    """y + gate (tuned - y), the gate with as many dimensions as y."""
    if gate.dim() != y.dim():
        gate = gate.reshape(-1, *[1] * (y.dim() - 1))
    return torch.lerp(y, tuned, gate.to(y.dtype))
