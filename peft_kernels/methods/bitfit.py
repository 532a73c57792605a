"""BitFit: only the biases are tuned. Ben Zaken et al. 2021, arXiv:2106.10199."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..engine.method import Changes, Method, Tuner
from ..engine.site import Base, Site


@dataclass(frozen=True)
class BitFit(Method, roles=("*",), lr=1e-3, tiny={}, family="selective"):
    """Tunes every bias (linear, convolution and LayerNorm). Ben Zaken et al. 2021, arXiv:2106.10199.

    A model without any bias (Llama, T5) gets new ones, zero at first, on its linear layers; so does an embedding that
    is targeted alone, where the bias is added to every row of the table.
    """

    def select(self, sites: list[Site]) -> list[Site]:
        kinds = ("linear", "conv", "embedding")
        tunable = [s for s in sites if s.kind in kinds or isinstance(s.module, nn.LayerNorm)]
        linear = [s for s in tunable if s.kind == "linear"]
        return [s for s in tunable if s.bias is not None] or linear or tunable


class BitFitTuner(Tuner, method=BitFit):
    additive = True

    def __init__(self, cfg: BitFit, site: Site):
        super().__init__(cfg, site)
        self.embedding = site.kind == "embedding"
        self.changed = Changes(weight=site.weight.numel(), rank=1) if self.embedding else Changes()
        if site.bias is not None:
            self.changed = Changes(bias=site.n_out)
        self.bias = site.param(site.n_out)  # [out], added to the frozen bias

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.embedding:
            return weight + self.bias[:, None], None
        return weight, self.bias if bias is None else bias + self.bias

    def forward(self, base: Base, *args: Any) -> Any:
        site = base.site
        if base.innermost or site.kind == "embedding":
            return super().forward(base, *args)  # the linear adds the folded bias at no cost
        y = base(*args)
        if site.kind == "conv":
            return y + self.bias.view(-1, *[1] * (y.dim() - 1 - site.channels(y))).to(y.dtype)
        return y + self.bias.to(y.dtype)

    def changes(self) -> Changes:
        return self.changed
