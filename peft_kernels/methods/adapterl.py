"""AdapterL: a bottleneck with a LayerNorm of its own after each feed-forward layer.

o + up(act(down(LN(o))))       o the output of the feed-forward layer's last linear, LN trained with the rest
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..engine.method import Tuner
from ..engine.site import Base, Site
from ._bottleneck import Bottleneck, Bottlenecked

_EPS = 1e-5


@dataclass(frozen=True)
class AdapterL(
    Bottlenecked, roles=("down",), lr=1e-3, tiny={"reduction_factor": 2}, family="additive", kernel="bottleneck"
):
    """A LayerNorm and a bottleneck after each feed-forward layer. Lin et al. 2020, arXiv:2004.03829.

    The LayerNorm is the adapter's own and starts as (1, 0). Not mergeable.
    """


class AdapterLTuner(Tuner, method=AdapterL):
    fresh = True

    def __init__(self, cfg: AdapterL, site: Site):
        super().__init__(cfg, site)
        self.adapter = Bottleneck(cfg, site)
        self.norm_weight = site.param(site.n_out, init="ones")
        self.norm_bias = site.param(site.n_out)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        return self.adapter(base(x), ln=(self.norm_weight, self.norm_bias, _EPS))
