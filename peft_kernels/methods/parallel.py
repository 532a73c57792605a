"""Parallel adapters: a bottleneck beside each feed-forward layer.

y = FFN(x) + s up(act(down(x)))       x the input of the feed-forward layer, behind a LayerNorm that comes before it
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..engine.method import Tuner
from ..engine.site import Base, Site
from ._bottleneck import Bottleneck, Bottlenecked


@dataclass(frozen=True)
class ParallelAdapter(
    Bottlenecked,
    roles=("ffn",),
    lr=1e-3,
    tiny={"reduction_factor": 2},
    key="parallel",
    kinds=("span", "module"),
    family="additive",
    kernel="bottleneck",
):
    """A scaled bottleneck adapter beside each feed-forward layer. He et al. 2022, arXiv:2110.04366.

    With init="zero", as in the paper, the model starts as it was. Not mergeable.
    """

    reduction_factor: int = 2  # features / bottleneck
    scale: float = 4.0  # of the adapter's output
    learned: bool = False  # the scale is one number per layer instead, learned from 1


class ParallelAdapterTuner(Tuner, method=ParallelAdapter):
    fresh = True

    def __init__(self, cfg: ParallelAdapter, site: Site):
        super().__init__(cfg, site)
        self.adapter = Bottleneck(cfg, site, site.n_in)
        self.scale = site.param(init="ones") if cfg.learned else cfg.scale

    def forward(self, base: Base, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.adapter(x, base(x, *args, **kwargs), fresh=base.fresh, scale=self.scale)
