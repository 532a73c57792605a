"""Pfeiffer's adapters: one bottleneck per layer, after the feed-forward layer.

    h = LN(o + residual)       y = o + up(act(down(h)))        then the model's own: LN(y + residual)

o is the output of the sublayer's last linear, before its dropout, residual what the model adds to it, and LN the same
module both times. Where the LayerNorm comes before the sublayer there is none after the addition: h = o + residual. In
a layer whose attention runs beside the feed-forward layer, h lacks what that attention adds; Gemma 2 and 3 normalise y
once more before they add it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..engine.method import Method, Tuner
from ..engine.site import Base, Site
from ._bottleneck import Bottleneck, Bottlenecked


@dataclass(frozen=True)
class Pfeiffer(
    Bottlenecked, roles=("down",), lr=1e-3, tiny={"reduction_factor": 2}, family="additive", kernel="bottleneck"
):
    """A bottleneck adapter after each feed-forward layer. Pfeiffer et al. 2021, arXiv:2005.00247.

    Its input has been through the residual addition and LayerNorm that follow, its output is added before them. Needs
    a model family whose residual is known (ValueError). Not mergeable.
    """

    def at(self, site: Site) -> Method:
        if site.residual is None:
            raise ValueError(
                f"{type(self).__name__} at {site.name}: what the model adds to that output is not known; give a role "
                "of a known model family such as 'down', or take Houlsby or AdapterL, which need no residual"
            )
        return self


class PfeifferTuner(Tuner, method=Pfeiffer):
    fresh = True
    needs_residual = True
    gated = True
    norm: nn.Module | None

    def __init__(self, cfg: Pfeiffer, site: Site):
        super().__init__(cfg, site)
        self.adapter = Bottleneck(cfg, site)
        vars(self)["norm"] = site.norm if site.prenorm is False else None  # past nn.Module: the model has it already

    def forward(self, base: Base, x: Tensor, **how: Any) -> Tensor:
        o = base(x)
        h = o + base.seen("residual")
        return self.adapter(h if self.norm is None else base.beside(self.norm, h), o, fresh=base.fresh, **how)
