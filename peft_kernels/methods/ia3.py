"""(IA)^3: keys, values and the hidden units of the feed-forward layer rescaled. Liu et al. 2022, arXiv:2205.05638."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..engine.method import Changes, Method, Tuner
from ..engine.site import Base, Site


@dataclass(frozen=True)
class IA3(Method, roles=("k", "v", "down"), lr=3e-3, tiny={}, family="additive", kernel="rescale"):
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
        if self._scales_weight(base, x):
            weight, bias = base.effective()
            if self.on_input:
                return base.site.apply(ops.rescale(weight, self.l), bias, x)
            return base.site.apply(*self.fold(weight, bias), x)
        if self.on_input:
            return base(ops.rescale(x, self.l))
        rescale = ops.rescale_ if base.fresh else ops.rescale
        return rescale(base(x), self.l)

    def _scales_weight(self, base: Base, x: Tensor) -> bool:
        """Is l W less work than l and the activation, as in a long prompt? Its gradient would be a product more."""
        if torch.is_grad_enabled() or not base.innermost or x.device.type != "cpu":
            return False
        tokens, (n_out, n_in) = x.shape[:-1].numel(), self.shape
        # Columns of a 16-bit W have a kernel beside an fp32 l, rows have none.
        return tokens > n_out if self.on_input else tokens > n_in and base.site.dtype == self.l.dtype

    def changes(self) -> Changes:
        return Changes(self.shape[0] * self.shape[1], self.scaled_biases, min(self.shape))
