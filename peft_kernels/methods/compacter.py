"""Compacter: adapters whose two projections are sums of Kronecker products that all layers share a factor of.

    h + up(act(down(h)))       down: d -> m, up: m -> d, each a low-rank PHM layer (_phm.py) with the same A [n, n, n]

after the attention and after the feed-forward layer, before their residual addition; Compacter++ after the latter only.
One fused call does it all, with both weights built; where those take more than twice the operations of the thin
products of _phm.py, which is at high widths and low reduction factors, these are what runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import cast

from torch import Tensor

from .. import ops
from ..engine.method import Method, Part, Tuner
from ..engine.site import Base, Site
from ._bottleneck import bottleneck, check_activation
from ._norms import with_norms
from ._phm import PHM, check_division, normal
from ._shared import SharedTuner, share

_LR = 3e-3


@dataclass(frozen=True)
class Compacter(
    Method, roles=("o", "down"), lr=_LR, tiny={"n": 2, "reduction_factor": 2}, family="hybrid", kernel="bottleneck kron"
):
    """Hypercomplex adapters after attention and feed-forward. Mahabadi et al. 2021, arXiv:2106.04647.

    The default targets are those of self-attention; "cross.o" adds cross-attention. The A of all adapters is one
    parameter, drawn from N(0, 1e-8): attached and untrained, the model's function changes by less than rounding.
    With norms=True all LayerNorms are trained beside the adapters. Not mergeable.
    """

    n: int = 4  # Kronecker products in a weight; divides the features and the bottleneck
    reduction_factor: int = 32  # features / bottleneck
    rank: int = 1  # of the larger factors; 0: not of low rank, the paper's PHM-Adapter
    activation: str = "gelu"  # relu, gelu, gelu_tanh (which the authors' code runs), silu, tanh, leaky_relu, identity
    norms: bool = True  # train the LayerNorms too

    def __post_init__(self):
        super().__post_init__()
        check_activation(type(self).__name__, self.activation)
        if self.reduction_factor < 1 or self.rank < 0:
            raise ValueError(
                f"{type(self).__name__} reduction_factor = {self.reduction_factor}, rank = {self.rank}; "
                "expected at least 1 and 0"
            )

    def expand(self, part: Part) -> list[Part]:
        return with_norms(part, self.norms)

    def at(self, site: Site) -> Method:
        bottleneck = site.n_out // self.reduction_factor
        if not bottleneck:
            raise ValueError(
                f"{type(self).__name__} reduction_factor = {self.reduction_factor} leaves nothing of the {site.n_out} "
                f"features of {site.name}; expected at most {site.n_out}"
            )
        other = ", or another reduction_factor"
        where = f"{type(self).__name__} at {site.name}:"
        check_division(where, self.n, other, features=site.n_out, bottleneck=bottleneck)
        return self

    def attached(self, tuners: list[Tuner]) -> None:
        share(cast("list[SharedTuner]", tuners), "a")


@dataclass(frozen=True)
class CompacterPP(
    Compacter, roles=("down",), lr=_LR, tiny={"n": 2, "reduction_factor": 2}, family="hybrid", kernel="bottleneck kron"
):
    """Compacter++: hypercomplex adapters after the feed-forward layers alone. Mahabadi et al. 2021, arXiv:2106.04647.

    Otherwise as Compacter.
    """


class CompacterTuner(SharedTuner, method=Compacter):
    fresh = True
    lender: CompacterTuner

    def __init__(self, cfg: Compacter, site: Site):
        super().__init__(cfg, site)
        d, m = site.n_out, site.n_out // cfg.reduction_factor
        self.activation = cfg.activation
        self.a = site.param(cfg.n, cfg.n, cfg.n, init=normal(1e-4))
        self.down = PHM(d, m, cfg.n, cfg.rank, True, site.param)
        self.up = PHM(m, d, cfg.n, cfg.rank, True, site.param)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        h = base(x)
        a = self.lender.a.to(h.device)
        if self.down.thinness < 0.5:
            return bottleneck(h, partial(self.down.call, a=a), partial(self.up.call, a=a), self.activation)
        down, up = self.down.weight(a), self.up.weight(a)
        return ops.bottleneck(h, down, self.down.bias, up, self.up.bias, act=self.activation)
