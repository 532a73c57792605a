"""SVD: each weight is replaced by the factors of its best low-rank approximation, which are trained.

    y = B A x + bias        A [r, in], B [out, r]        B A = U_r S_r V_r^T of W = U S V^T, shared evenly by both

No matrix of rank r is nearer to W (Eckart & Young 1936). With the form "kron" the r terms are Kronecker products,

    y = sum_i (A_i kron B_i) x + bias        A_i [a1, a2], B_i [b1, b2], out = a1 b1, in = a2 b2

the nearest sum of r of them (Van Loan & Pitsianis 1993), with A_i of the shape that KronA's A has.

The factors have fewer numbers than W only while r < in out / (in + out), for "kron" in out / (a1 a2 + b1 b2). A layer
where they would have as many or more is left as it is, with nothing to train.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..engine.attach import names_of
from ..engine.factor import rearranged, truncated_svd
from ..engine.life import all_tuners, unmerged
from ..engine.method import Changes, Method, Tuner
from ..engine.site import Base, Site
from ._factor import SVDReport, bare
from .krona import checked, shapes

_ROLES = ("q", "k", "v", "o", "up", "gate", "down")


@dataclass(frozen=True)
class SVD(
    Method,
    roles=_ROLES,
    lr=3e-4,
    tiny={"rank": 2},
    kinds=("linear", "conv", "embedding"),
    family="reparametrised",
    kernel="kron",
):
    """Each weight becomes a product of two thin factors, which are trained. Eckart & Young 1936, Psychometrika.

    Attaching computes the factors, in fp64; `pk.SVD.report(model)` says how far they are from each weight, and which
    layers are left as they are because factors would save nothing there. The frozen weights stay in memory; the saved
    factors stand for them, and a merge writes their product. What an adapter below changes in the weight is added.
    """

    identity = False

    rank: int = 0  # terms that are kept; 0: as few as keep the energy
    energy: float = 0.9  # without a rank: the part of the squared norm of each weight that is kept
    form: str = "svd"  # or "kron": the terms are Kronecker products
    factor: int = 0  # of "kron": as KronA's

    def __post_init__(self):
        super().__post_init__()
        checked(self, self.factor)
        if self.rank < 0 or not 0 < self.energy <= 1:
            raise ValueError(
                f"SVD rank = {self.rank}, energy = {self.energy}; expected a rank of at least 0, an energy in (0, 1]"
            )
        if self.form not in ("svd", "kron"):
            raise ValueError(f"SVD form = {self.form!r}; expected 'svd' or 'kron'")

    def at(self, site: Site) -> Method:
        if self.form == "svd":
            return self
        shapes(self, site, self.factor)
        return _Kron(**asdict(self))

    @staticmethod
    def report(model: nn.Module, name: str | None = None) -> SVDReport:
        """How far the factors of one adapter (None: all) are from the weights: |W - B A| / |W| (Frobenius) by layer.

        print() gives a table; the rows are dict(site, rank, most, numbers, dense, error) with the numbers of factors
        and weight and the largest rank that saves any; rank 0: the layer is left as it is. RuntimeError while merged.
        """
        unmerged(model, "the report")
        found = [t for n in names_of(model, name) for t in all_tuners(model, n) if isinstance(t, SVDTuner)]
        return SVDReport(t.row() for t in found)

    def attached(self, tuners: list[Tuner]) -> None:
        own = cast("list[SVDTuner]", tuners)
        if any(t.rank for t in own):
            return
        (n_out, n_in), asked = own[0].shape, f"rank = {self.rank}" if self.rank else f"energy = {self.energy}"
        raise ValueError(
            f"SVD {asked} makes none of the targets smaller: a {n_out} x {n_in} layer takes a rank of at most "
            f"{own[0].most}; give a lower one"
        )


class _Kron(SVD):
    """SVD of the form "kron"."""


class SVDTuner(Tuner, method=SVD):
    """a [r, in] and b [out, r] fp32; r = 0: the layer is left as it is."""

    site: Site

    def __init__(self, cfg: SVD, site: Site):
        super().__init__(cfg, site)
        vars(self)["site"] = site  # its weight is read; past nn.Module, which would take its module for ours
        self.shape = (site.n_out, site.n_in)
        numbers = sum(map(math.prod, self.sizes(1)))  # of a term
        self.most = (math.prod(self.shape) - 1) // numbers  # terms that have fewer than W
        weight = site.weight.detach()
        if weight.is_meta and not (cfg.rank and site.param(0).is_meta):
            raise ValueError(
                f"{site.name} is offloaded or on the meta device, and SVD reads its weight; load the whole model"
            )
        rank = max(cfg.rank, int(site.filled))  # of an energy any: `reshape` gives the file's
        a, b = (torch.empty(size, device="meta") for size in self.sizes(rank if rank <= self.most else 0))
        if not weight.is_meta and cfg.rank <= self.most and not site.filled:
            found = self.factored(weight, cfg.rank, 0.0 if cfg.rank else cfg.energy)
            a, b = found if len(found[0]) <= self.most else (a, b)
        self.a = site.param(*a.shape, init=lambda p, _: p if a.is_meta else p.copy_(a))
        self.b = site.param(*b.shape, init=lambda p, _: p if b.is_meta else p.copy_(b))

    def sizes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the factors of so many terms."""
        return (rank, self.shape[1]), (self.shape[0], rank)

    def factored(self, weight: Tensor, rank: int, energy: float) -> tuple[Tensor, Tensor]:
        a, b, _ = truncated_svd(weight, rank, energy)
        return a, b

    @property
    def rank(self) -> int:
        return len(self.a)

    def product(self) -> Tensor:
        """What replaces W."""
        return self.b @ self.a

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if not self.rank:
            return weight, bias
        below = weight - self.site.weight.to(weight.dtype)  # zeros, or what an adapter below changes
        return below + self.product(), bias

    def forward(self, base: Base, x: Tensor) -> Tensor:
        site = base.site
        if not self.rank:
            return base(x)
        if not bare(base) or not site.plain or getattr(site.module, "groups", 1) > 1:
            return super().forward(base, x)  # of groups a convolution with A would mix the channels
        return self.thin(site, x)

    def thin(self, site: Site, x: Tensor) -> Tensor:
        """The layer as two thin ones."""
        h = site.apply(self.a, None, x)  # [..., r] or [..., r, *spatial]
        channels, bias = site.channels(h), site.bias
        y = F.linear(h.movedim(channels, -1), self.b.to(h.dtype), None if bias is None else bias.to(h.dtype))
        return y.movedim(-1, channels)

    @torch.no_grad()
    def row(self) -> dict[str, Any]:
        """Of the report."""
        site, dense = self.site, math.prod(self.shape)
        weight = site.weight.to(self.a.dtype)
        error = ((weight - self.product()).norm() / weight.norm().clamp_min(1e-30)).item() if self.rank else 0.0
        numbers = self.a.numel() + self.b.numel() or dense
        where = site.name if site.rows is None else site.address
        return dict(site=where, rank=self.rank, most=self.most, numbers=numbers, dense=dense, error=error)

    def reshape(self, values: dict[str, Tensor]) -> None:
        a, b = values.get("a"), values.get("b")
        if a is None or b is None or (a.shape, b.shape) == (self.a.shape, self.b.shape):
            return
        if not a.dim() or (tuple(a.shape), tuple(b.shape)) != self.sizes(len(a)):
            one = " and ".join(map(str, self.sizes(1)))
            raise ValueError(f"a is {tuple(a.shape)} and b {tuple(b.shape)}; expected {one}, or of more terms")
        self.a = nn.Parameter(self.a.new_empty(a.shape), self.a.requires_grad)
        self.b = nn.Parameter(self.b.new_empty(b.shape), self.b.requires_grad)

    def changes(self) -> Changes:
        return Changes(math.prod(self.shape), 0, self.rank) if self.rank else Changes()


class _KronTuner(SVDTuner, method=_Kron):
    """a [r, a1, a2] and b [r, b1, b2]."""

    def sizes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        left, right = shapes(self.cfg, self.site, cast(SVD, self.cfg).factor)
        return (rank, *left), (rank, *right)

    def factored(self, weight: Tensor, rank: int, energy: float) -> tuple[Tensor, Tensor]:
        (_, *left), (_, *right) = self.sizes(1)
        b, a, _ = truncated_svd(rearranged(weight, (left[0], left[1])), rank, energy)
        return a.T.reshape(-1, *left), b.reshape(-1, *right)

    def product(self) -> Tensor:
        return torch.einsum("nij,nkl->ikjl", self.a, self.b).reshape(self.shape)

    def thin(self, site: Site, x: Tensor) -> Tensor:
        (out, n_in), (_, a1, a2), (_, b1, b2) = self.shape, self.a.shape, self.b.shape
        rows, term = x.numel() // n_in, min(a2 * b1 * (b2 + a1), a1 * b2 * (a2 + b1))  # operations of a row
        if site.kind != "linear" or self.rank * rows * term > (self.rank + rows) * out * n_in:
            return site.apply(ops.kron_sum_weight(self.a, self.b), site.bias, x)
        (first, second), *others = zip(self.a, self.b, strict=True)
        y = ops.kron_linear(x, first.T, second.T, bias=None if site.bias is None else site.bias.to(x.dtype))
        for a, b in others:
            y = ops.kron_linear_(y, x, a.T, b.T)
        return y

    def changes(self) -> Changes:
        return super().changes()._replace(rank=min(self.shape)) if self.rank else Changes()
