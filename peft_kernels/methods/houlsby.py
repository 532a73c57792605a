"""Houlsby's adapters: a bottleneck after each sublayer.

    o + up(act(down(o)))       down: d -> m, up: m -> d, o the output of the sublayer's last linear

before its dropout, its residual addition and, where one comes after that, its LayerNorm.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..engine.method import Part, Tuner
from ..engine.site import Base, Site
from ._bottleneck import Bottleneck, Bottlenecked
from ._norms import with_norms


@dataclass(frozen=True)
class Houlsby(
    Bottlenecked, roles=("o", "down"), lr=1e-3, tiny={"reduction_factor": 2}, family="additive", kernel="bottleneck"
):
    """Bottleneck adapters after attention and after the feed-forward layer. Houlsby et al. 2019, arXiv:1902.00751.

    The default targets are those of self-attention; "cross.o" adds cross-attention. With norms=True all LayerNorms are
    trained beside the adapters, as in the paper, which starts from init="normal" and tries sizes from 8 to 256. Not
    mergeable.
    """

    activation: str = "silu"  # relu, gelu, gelu_tanh, silu (or swish, the same), tanh, leaky_relu, identity
    norms: bool = True  # train the LayerNorms too

    def expand(self, part: Part) -> list[Part]:
        return with_norms(part, self.norms)


class HoulsbyTuner(Tuner, method=Houlsby):
    fresh = True

    def __init__(self, cfg: Houlsby, site: Site):
        super().__init__(cfg, site)
        self.adapter = Bottleneck(cfg, site)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        return self.adapter(base(x))
