"""LoRA: y = Wx + (alpha/r) B A x. Hu et al. 2021, arXiv:2106.09685."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..engine.method import Changes, Tuner
from ..engine.rows import Routing, by_rows
from ..engine.site import Base, Site
from ._kept import Kept
from ._patterns import Ranked
from ._rng import seeds
from ._routed import in_one_op


@dataclass(frozen=True)
class LoRA(
    Ranked,
    roles=("q", "v"),
    lr=2e-3,
    tiny={"rank": 2, "dropout": 0.25},
    kinds=("linear", "conv", "embedding"),
    family="reparametrised",
    kernel="lora",
):
    """Low-rank update of linear layers, convolutions and embeddings. Hu et al. 2021, arXiv:2106.09685.

    rsLoRA is Kalajdzievski 2023, arXiv:2312.03732.
    """

    rank: int = 8  # rows of A, columns of B
    alpha: float = 16.0  # the update is scaled by alpha / rank
    dropout: float = 0.0  # of the input of A, in training
    rslora: bool = False  # scale by alpha / sqrt(rank) instead
    rank_pattern: dict[str, int] = field(default_factory=dict)  # role or glob -> rank there
    alpha_pattern: dict[str, float] = field(default_factory=dict)  # role or glob -> alpha there

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"{type(self).__name__} dropout = {self.dropout}; expected a probability from 0 to 1")

    def at(self, site: Site) -> LoRA:
        own, limit = cast(LoRA, super().at(site)), min(site.n_in, site.n_out)
        if own.rank > limit:
            raise ValueError(
                f"{type(self).__name__} rank = {own.rank} at {site.name}; "
                f"a {site.n_out} x {site.n_in} layer takes at most {limit}"
            )
        return own

    @property
    def scale(self) -> float:
        """Of the update B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def with_ranks(self, ranks: dict[str, int]) -> LoRA:
        rank = statistics.mode(ranks.values())
        pattern = {where: r for where, r in ranks.items() if r != rank}
        return replace(self, rank=rank, alpha=float(rank), rslora=False, rank_pattern=pattern, alpha_pattern={})


def _normal(tensor: Tensor, generator: torch.Generator) -> Tensor:
    return tensor.normal_(generator=generator)


class LoRATuner(Tuner, method=LoRA):
    fresh = True

    def __init__(self, cfg: LoRA, site: Site):
        super().__init__(cfg, site)
        self.scale = cfg.scale
        self.dropout = cfg.dropout
        self._kept = Kept()
        # An embedding reads few columns of A: with B = 0 they would hardly learn, so there A is 0 and B is drawn.
        inits: tuple[Any, Any] = ("zeros", _normal) if site.kind == "embedding" else ("kaiming", "zeros")
        self.a = site.param(cfg.rank, site.n_in, init=inits[0])  # [r, in]
        self.b = site.param(site.n_out, cfg.rank, init=inits[1])  # [out, r]

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.scale * (self.b @ self.a), bias

    def draw(self, x: Tensor) -> tuple[float, Tensor | None]:
        """(p, rng) of the dropout of one call."""
        if not (self.training and self.dropout):
            return 0.0, None
        return self.dropout, seeds(x)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        if base.site.kind != "linear":
            return self._elsewhere(base, x)
        p, rng = self.draw(x)
        if base.innermost:
            return ops.lora_linear(x, *base.effective(), self.a, self.b, self.scale, p=p, rng=rng)
        if base.packed is not None:
            return base.packed.lora_linear(x, self.a, self.b, self.scale, p=p, rng=rng)
        add = ops.lora_add_ if base.fresh else ops.lora_add
        return add(base(x), x, self.a, self.b, self.scale, p=p, rng=rng)

    @classmethod
    def forward_many(cls, base: Any, tuners: dict[int, Any], route: Routing, *args: Any, **kwargs: Any) -> Any:
        """All adapters in one op, where they are of a linear and have one dropout."""
        made = in_one_op(base, tuners, route, args, kwargs) if cls.forward is LoRATuner.forward else None
        return by_rows(base, tuners, route, args, kwargs) if made is None else made[0]

    def _elsewhere(self, base: Base, x: Tensor) -> Tensor:
        """At a convolution A is its kernel, down to r channels, and B is 1 x 1; at an embedding A is the table."""
        site, groups = base.site, getattr(base.site.module, "groups", 1)
        if groups > 1:
            return super().forward(base, x)  # A mixes channels across groups: only the sum is a convolution
        dropped = F.dropout(x, self.dropout, self.training) if site.kind == "conv" else x
        h = site.apply(self.a, None, dropped)  # [..., r] or [..., r, *spatial]
        channels = site.channels(h)
        delta = F.linear(h.movedim(channels, -1), self.b.to(h.dtype)).movedim(-1, channels)
        return base(x) + self.scale * delta

    def factors(self) -> tuple[Tensor, Tensor]:
        root = math.sqrt(abs(self.scale))
        return self.a.detach().double() * root, self.b.detach().double() * math.copysign(root, self.scale)

    def set_factors(self, a: Tensor, b: Tensor) -> None:
        with torch.no_grad():
            self.a.copy_(a)
            self.b.copy_(b / self.scale)

    def train(self, mode: bool = True) -> LoRATuner:
        if mode != self.training:
            self._kept.clear()  # between the modes lie writes that no version counts
        return super().train(mode)

    def changes(self) -> Changes:
        rank, n_in = self.a.shape
        return Changes(weight=self.b.shape[0] * n_in, rank=rank)
