"""(IA)^3: keys, values and the hidden units of the feed-forward layer rescaled. Liu et al. 2022, arXiv:2205.05638."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .. import ops
from ..engine.method import Changes, Method, Tuner
from ..engine.site import Base, Site


@dataclass(frozen=True)
class IA3(Method, roles=("k", "v", "down"), lr=3e-3, tiny={}):
    """Learned rescaling of keys, values and feed-forward units; merges exactly. Liu et al. 2022, arXiv:2205.05638."""

    # Roles or globs of the layers whose input is rescaled (the hidden units); elsewhere the output is.
    feedforward: tuple[str, ...] = ("down",)


class IA3Tuner(Tuner, method=IA3):
    additive = True

    def __init__(self, cfg: IA3, site: Site):
        super().__init__(cfg, site)
        self.on_input = site.matches(cfg.feedforward)
        self.fresh = not self.on_input  # else the output is whatever the base returned
        self.shape = (site.n_out, site.n_in)
        self.scaled_biases = 0 if self.on_input or site.bias is None else site.n_out
        self.l = site.param(site.n_in if self.on_input else site.n_out, init="ones")

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.on_input:
            return weight * self.l, bias  # columns; the bias comes after
        return weight * self.l[:, None], None if bias is None else bias * self.l

    def forward(self, base: Base, x: Tensor) -> Tensor:
        if self.on_input:
            return base(ops.rescale(x, self.l))
        return ops.rescale(base(x), self.l)

    def changes(self) -> Changes:
        return Changes(self.shape[0] * self.shape[1], self.scaled_biases, min(self.shape))
