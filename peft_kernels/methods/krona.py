"""KronA: the change of a weight is a Kronecker product, of high rank for its few numbers. Edalati et al. 2022.

    y = W x + bias + s (A kron B) x        A [a1, a2], B [b1, b2], out = a1 b1, in = a2 b2

A kron B is never made: with X = x.view(a2, b2) the change of y is A X B^T. Its rank is rank(A) rank(B), where a product
of two low-rank factors with as many numbers has a rank of one or two: 768 x 768 takes 1,536 numbers of rank 576.

Each of out and in is split into the two divisors nearest its square root. Of the four ways to give them to A and B that
with the fewest numbers is taken, of these the highest rank, and of these the smaller a1; 768 = 24 * 32 makes A 24 x 32
and B 32 x 24. With `factor` A is factor x factor.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..engine.factor import nearest_kronecker
from ..engine.method import Changes, Method, Tuner
from ..engine.site import Base, Site

INITS = ("kaiming", "nearest")


@dataclass(frozen=True)
class KronA(
    Method, roles=("q", "v"), lr=2e-2, tiny={}, kinds=("linear", "conv"), family="reparametrised", kernel="kron"
):
    """A Kronecker product is added to each weight. Edalati et al. 2022, arXiv:2212.10650.

    B is zero at first, so that the model starts as it was.
    """

    factor: int = 0  # A is factor x factor, which must divide both sizes of the layer; 0: near their square roots
    scale: float = 1.0  # of the product; the authors tune it
    init: str = "kaiming"  # of A; "nearest": the left factor of the Kronecker product nearest to the weight

    def __post_init__(self):
        super().__post_init__()
        checked(self, self.factor)
        if self.init not in INITS:
            raise ValueError(f"KronA init = {self.init!r}; expected one of {', '.join(INITS)}")

    def at(self, site: Site) -> Method:
        shapes(self, site, self.factor)
        return self


@dataclass(frozen=True)
class KronARes(
    Method,
    roles=("ffn",),
    lr=2e-2,
    tiny={},
    key="krona_res",
    kinds=("span", "module"),
    family="reparametrised",
    kernel="kron rescale",
):
    """A Kronecker product beside each feed-forward layer, and a residual. Edalati et al. 2022, arXiv:2212.10650.

    y = FFN(x) + s (A kron B) x + s_res x, with s_res learned from zero; B is zero at first, so that the model starts as
    it was. What runs beside a layer with a nonlinearity in it cannot be merged.
    """

    factor: int = 0  # A is factor x factor, which must divide both sizes of the layer; 0: near their square roots
    scale: float = 1.0  # of the product; the authors tune it
    residual: bool = True  # False: without s_res x, the paper's KronA^B

    def __post_init__(self):
        super().__post_init__()
        checked(self, self.factor)

    def at(self, site: Site) -> Method:
        shapes(self, site, self.factor)
        if self.residual and site.n_in != site.n_out:
            raise ValueError(
                f"KronARes at {site.name}, from {site.n_in} to {site.n_out} features: its input cannot be added to "
                "its output; give residual=False, or other targets"
            )
        return self


def split(n: int, most: int = 0) -> tuple[int, int]:
    """n as (small, large): the two divisors nearest its square root; small at most `most`, unless that is 0."""
    root = math.isqrt(n)
    small = next(m for m in range(min(root, most or root), 0, -1) if n % m == 0)
    return small, n // small


def checked(method: Method, factor: int) -> None:
    if factor < 0:
        raise ValueError(f"{type(method).__name__} factor = {factor}; expected a divisor of the layer's sizes, or 0")


def shapes(method: Method, site: Site, factor: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """((a1, a2), (b1, b2)) at the site; ValueError if a factor does not divide its sizes."""
    out, n_in = site.n_out, site.n_in
    if factor:
        if out % factor or n_in % factor:
            raise ValueError(
                f"{type(method).__name__} factor = {factor} at {site.name}, a layer of {out} x {n_in}; "
                f"expected a divisor of {math.gcd(out, n_in)}, or 0"
            )
        return (factor, factor), (out // factor, n_in // factor)
    ways = [((a1, a2), (out // a1, n_in // a2)) for a1, a2 in itertools.product(split(out), split(n_in))]
    return min(ways, key=lambda way: (sum(map(math.prod, way)), -math.prod(map(min, way)), way[0]))


def with_product(base: Base, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """y, which base returned, + scale * (a kron b) x, of a weight a kron b [out, in].  x [..., in]"""
    if base.fresh:
        return ops.kron_linear_(y, x, a.T, b.T, scale=scale)
    return ops.kron_linear(x, a.T, b.T, acc=y, scale=scale)


class _Product(Tuner):
    """scale * (a kron b), zero at first."""

    fresh = True

    def __init__(self, cfg: KronA | KronARes, site: Site):
        super().__init__(cfg, site)
        self.scale = cfg.scale
        left, right = shapes(cfg, site, cfg.factor)
        self.a = site.param(*left, init="kaiming")  # [a1, a2]
        self.b = site.param(*right)  # [b1, b2]


class KronATuner(_Product, method=KronA):
    def __init__(self, cfg: KronA, site: Site):
        super().__init__(cfg, site)
        if cfg.init == "nearest" and not self.a.is_meta and not site.filled:
            with torch.no_grad():
                self.a.copy_(_nearest(site, (self.a.shape[0], self.a.shape[1])))

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.scale * torch.kron(self.a, self.b), bias

    def forward(self, base: Base, x: Tensor) -> Tensor:
        if base.site.kind != "linear":
            return super().forward(base, x)
        return with_product(base, base(x), x, self.a, self.b, self.scale)

    def changes(self) -> Changes:
        return Changes(weight=self.a.numel() * self.b.numel(), rank=min(self.a.shape) * min(self.b.shape))


def _nearest(site: Site, shape: tuple[int, int]) -> Tensor:
    """The left factor, of this shape, of the Kronecker product that is nearest to the site's weight."""
    weight = site.weight.detach()
    if weight.is_meta:
        raise ValueError(f"{site.name} is offloaded and init='nearest' reads its weight; load the whole model")
    a = nearest_kronecker(weight, shape)[0][0]
    if not a.any():  # with B = 0 neither factor would ever get a gradient
        raise ValueError(f"{site.name} has a weight of zeros, to which no product is nearest; give init='kaiming'")
    return a


class KronAResTuner(_Product, method=KronARes):
    def __init__(self, cfg: KronARes, site: Site):
        super().__init__(cfg, site)
        self.residual = site.param(1) if cfg.residual else None

    def forward(self, base: Base, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = with_product(base, base(x, *args, **kwargs), x, self.a, self.b, self.scale)
        if self.residual is None:
            return y
        return y + ops.rescale(x, self.residual.expand(x.shape[-1])).to(y.dtype)
