"""DoRA: the direction of each row of W moves by a low-rank update, its length is a number of its own.

    W' = m * (W + s B A) / n      n_o = ||W_o + s b_o A||, a constant in the backward      m, n [out], row by row

Liu et al. 2024, arXiv:2402.09353 (section 4.3 is the detached norm). With g = m / n a layer is

    y = g * (W x + s B A drop(x)) + bias

and its norm needs no second weight, since n_o^2 = ||W_o||^2 + 2 s <W_o, b_o A> + s^2 ||b_o A||^2 with
<W_o, b_o A> = b_o . (W A^T)_o and ||b_o A||^2 = b_o (A A^T) b_o^T.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..engine.method import Changes, promoted
from ..engine.site import Base, Site
from .lora import LoRA, LoRATuner

_BLOCK = 2**22  # numbers of a 16-bit weight that are widened at a time


@dataclass(frozen=True)
class DoRA(LoRA, roles=("q", "v"), lr=1e-3, tiny={"rank": 2, "dropout": 0.25}):
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
        y = ops.rescale(y, g)
        return y if bias is None else y.add_(bias)

    def factors(self) -> None:  # type: ignore[override]
        return None  # the norms make the change another than B A

    def changes(self) -> Changes:
        shape = self.b.shape[0], self.a.shape[1]
        return Changes(weight=shape[0] * shape[1], rank=min(shape))

    # -- the norms of the rows ----------------------------------------------------------------------------------------

    def _norm(self, weight: Tensor) -> Tensor:
        """||W + s B A|| of every row, [out], a constant."""
        source, weight = weight, weight.detach()
        device, moving = weight.device.type, self.training or torch.is_grad_enabled()
        # Autocast would round the products to 16 bits. It does not know the meta device.
        exact = torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
        with torch.no_grad(), exact:
            squares = self._kept.once("squares", lambda: _squares(weight), [source])
            if moving:
                return self._updated(squares, weight)
            return self._kept.once("norm", lambda: self._updated(squares, weight), [source, self.a, self.b])

    def _updated(self, squares: Tensor, weight: Tensor) -> Tensor:
        dtype = torch.promote_types(squares.dtype, self.a.dtype)
        a, b = self.a.detach().to(dtype), self.b.detach().to(dtype)
        wa = torch.cat([rows @ a.T for rows in _blocks(weight, dtype)])  # [out, r]
        return _root(squares + self.scale * (b * (2 * wa + self.scale * (b @ (a @ a.T)))).sum(1))


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
