"""BitFit: only the biases are tuned. Ben Zaken et al. 2021, arXiv:2106.10199."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..engine.method import Method, Tuner
from ..engine.site import Base, Site


@dataclass(frozen=True)
class BitFit(Method, roles=("*",), lr=1e-3, tiny={}):
    """Tunes every bias (linear and LayerNorm). Ben Zaken et al. 2021, arXiv:2106.10199.

    A model without any bias (Llama, T5) gets new ones, zero at first, on its linear layers.
    """

    def select(self, sites: list[Site]) -> list[Site]:
        tunable = [s for s in sites if s.kind == "linear" or isinstance(s.module, nn.LayerNorm)]
        return [s for s in tunable if s.bias is not None] or [s for s in tunable if s.kind == "linear"]


class BitFitTuner(Tuner, method=BitFit):
    additive = True

    def __init__(self, cfg: BitFit, site: Site):
        super().__init__(cfg, site)
        self.existing = site.bias is not None
        self.bias = site.param(site.n_out)  # [out], added to the frozen bias

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight, self.bias if bias is None else bias + self.bias

    def forward(self, base: Base, *args: Any) -> Any:
        if base.innermost:
            return super().forward(base, *args)  # the linear adds the folded bias at no cost
        y = base(*args)
        return y + self.bias.to(y.dtype)

    def changes(self) -> tuple[int, int]:
        return (self.bias.numel() if self.existing else 0), 0
