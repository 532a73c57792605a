"""DoRA: the direction of each row of W moves by a low-rank update, its length is a number of its own.

    W' = m * (W + s B A) / n      n_o = ||W_o + s b_o A||, a constant in the backward      m, n [out], row by row

Liu et al. 2024, arXiv:2402.09353 (section 4.3 is the detached norm). With g = m / n a layer is

    y = g * (W x + s B A drop(x)) + bias

and its norm needs no second weight, since n_o^2 = ||W_o||^2 + 2 s <W_o, b_o A> + s^2 ||b_o A||^2 with
<W_o, b_o A> = b_o . (W A^T)_o and ||b_o A||^2 = b_o (A A^T) b_o^T.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..engine.method import Changes, promoted
from ..engine.rows import Routing, by_rows
from ..engine.site import Base, Site
from ..ops._autocast import exact
from ._routed import in_one_op
from .lora import LoRA, LoRATuner

_BLOCK = 2**22  # numbers of a 16-bit weight that are widened at a time


@dataclass(frozen=True)
class DoRA(
    LoRA, roles=("q", "v"), lr=1e-3, tiny={"rank": 2, "dropout": 0.25}, family="reparametrised", kernel="lora rescale"
):
    """LoRA on the directions of the rows, with learned row norms. Liu et al. 2024, arXiv:2402.09353.

    Fields are LoRA's. dropout is of the input of A alone; the authors' code drops that of the frozen path as well.
    The norms start as those of the module's own weight: it starts as the identity unless an adapter below changes them.
    """


class DoRATuner(LoRATuner, method=DoRA):
    def __init__(self, cfg: DoRA, site: Site):
        super().__init__(cfg, site)
        if site.weight.is_meta and not self.a.is_meta:
            raise ValueError(f"{site.name} is offloaded and DoRA needs the norms of its rows; load the whole model")
        self.m = site.param(site.n_out, init=lambda m, _: m.copy_(_root(_squares(site.weight))))  # [out]

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        directions, bias = super().fold(weight, bias)
        norm = _root(_squares(directions.detach()))
        return directions * (self.m / norm)[:, None], bias

    def forward(self, base: Base, x: Tensor) -> Tensor:
        weight, bias = base.effective()
        g = self.m / self._norm(weight)
        if base.innermost:
            p, rng = self.draw(x)
            y = ops.lora_linear(x, weight, None, self.a, self.b, self.scale, p=p, rng=rng)
        else:
            y = super().forward(base, x)
            bias = None if bias is None else bias - bias * g  # the base adds it ahead of g
        y = ops.rescale_(y, g)
        return y if bias is None else y.add_(bias)

    @classmethod
    def forward_many(cls, base: Any, tuners: dict[int, Any], route: Routing, *args: Any, **kwargs: Any) -> Any:
        """All adapters in one op and a rescaling of every row, where LoRA's updates can be made in one op."""
        made = in_one_op(base, tuners, route, args, kwargs) if cls.forward is DoRATuner.forward else None
        return by_rows(base, tuners, route, args, kwargs) if made is None else _rescaled(base.site, route, *made)

    def factors(self) -> None:  # type: ignore[override]
        return None  # the norms make the change another than B A

    def changes(self) -> Changes:
        shape = self.b.shape[0], self.a.shape[1]
        return Changes(weight=shape[0] * shape[1], rank=min(shape))

    def _norm(self, weight: Tensor) -> Tensor:
        """||W + s B A|| of every row, [out], a constant."""
        if self.training or torch.is_grad_enabled():
            return _norms([self], weight)[0]
        return self._kept.once("norm", lambda: _norms([self], weight)[0], [weight, self.a, self.b])


# -- several adapters in a batch --------------------------------------------------------------------------------------


def _rescaled(site: Site, route: Routing, y: Tensor, tuners: dict[int, DoRATuner], ids: Tensor, keep: bool) -> Tensor:
    """g_l (y - bias) + bias for the rows of adapter l as y g_l + c_l; others keep their bits.  y [rows, ..., out]"""
    if not tuners:
        return y
    own = [tuners[number] for number in sorted(tuners)]

    def together() -> Tensor:
        return _affine(own, site.weight, site.bias)

    sources = [p for p in (site.weight, site.bias, *(p for t in own for p in (t.a, t.b, t.m))) if p is not None]
    table = own[0]._kept.once("affine", together, sources) if keep else together()
    places = [len(own)] * (max(tuners) + 2)  # the last also for -1, wherever the numbers end
    for place, number in enumerate(sorted(tuners)):
        places[number] = place
    where = route.once(("places", ids.device, *places), lambda: torch.tensor(places, device=ids.device))
    index = where[ids.clamp(max=len(places) - 1)]
    rows = table.index_select(1, index).view(len(table), len(index), *[1] * (y.dim() - 2), y.shape[-1])
    return (y * rows[0] if len(rows) == 1 else torch.addcmul(rows[1], y, rows[0])).to(y.dtype)


def _affine(tuners: list[DoRATuner], weight: Tensor, bias: Tensor | None) -> Tensor:
    """g and c, [2, L + 1, out], or without a bias g alone; the last adapter is none: y * 1 + -0.0 has the bits of y."""
    g = torch.stack([t.m / norm for t, norm in zip(tuners, _norms(tuners, weight), strict=True)])
    none = g.new_ones(1, g.shape[1])
    if bias is None:
        return torch.cat([g, none])[None]
    return torch.stack([torch.cat([g, none]), torch.cat([bias - bias * g, none * -0.0])])


# -- the norms of the rows --------------------------------------------------------------------------------------------


def _norms(tuners: list[DoRATuner], weight: Tensor) -> list[Tensor]:
    """||W + s B A|| of every row for each tuner, [out], constants; the weight is read once for all."""
    source, weight = weight, weight.detach()
    with torch.no_grad(), exact(weight.device):  # the products would be rounded to 16 bits
        squares = [t._kept.once("squares", lambda: _squares(weight), [source]) for t in tuners]
        return _updated(tuners, squares, weight)


def _updated(tuners: list[DoRATuner], squares: list[Tensor], weight: Tensor) -> list[Tensor]:
    dtype = functools.reduce(torch.promote_types, [t.a.dtype for t in tuners], squares[0].dtype)
    factors = [(t.a.detach().to(dtype), t.b.detach().to(dtype)) for t in tuners]
    every = torch.cat([a for a, _ in factors])
    was = torch.cat([rows @ every.T for rows in _blocks(weight, dtype)]).split([len(a) for a, _ in factors], 1)
    return [
        _root(square + t.scale * (b * (2 * wa + t.scale * (b @ (a @ a.T)))).sum(1))
        for t, square, wa, (a, b) in zip(tuners, squares, was, factors, strict=True)  # wa [out, r]
    ]


def _blocks(weight: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """The weight in `dtype`, all of it or some rows at a time: no widened weight is held."""
    rows = weight.shape[0] if weight.dtype == dtype else max(_BLOCK // weight.shape[1], 1)
    return (block.to(dtype) for block in weight.split(rows))


def _squares(weight: Tensor) -> Tensor:
    """||W_o||^2 of every row, [out], in fp32 or wider."""
    return torch.cat([torch.linalg.vector_norm(b, dim=1).square() for b in _blocks(weight, promoted(weight.dtype))])


def _root(squares: Tensor) -> Tensor:
    """Their norms; a row of zeros gets a tiny one, to be divided by."""
    return squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()
