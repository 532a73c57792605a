"""Linears of which a mask M keeps some weights while the others become zero: W' = M * (W + delta)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..engine.method import Changes, Method, Tuner
from ..engine.site import Site
from ._bits import Bits, checked
from ._select import FREE, Masked, best, kept, parsed


class PrunedTuner(Bits, Tuner):
    """W' = M * (W + delta).

    bits uint8 [ceil(out * in / 8)] is M: position 8 i + j of the weight is bit j of byte i.
    delta fp32 is [out, in] as long as the mask may move and [kept], in ascending order of position, from `settle` on;
    None where the weights are not trained.
    """

    site: Site
    delta: nn.Parameter | None

    def __init__(self, cfg: Method, site: Site, dense: bool):
        super().__init__(cfg, site)
        vars(self)["site"] = site  # its weight is read with delta; past nn.Module, which would take its module for ours
        shape = (site.n_out, site.n_in)
        self.delta = site.param(*shape) if dense else None
        device = site.param(0).device
        if site.weight.is_meta and device.type != "meta":
            raise ValueError(f"{site.name} is offloaded and {cfg.key} reads its weight; load the whole model")
        self.keep_all(shape, device)

    @property
    def moving(self) -> bool:
        """Whether the mask may still change."""
        return self.delta is not None and self.delta.dim() == 2

    def magnitude(self) -> Tensor:
        """|W + delta| of the module itself, [out, in], whatever adapters lie below; a fixed delta is left out."""
        weight = self.site.weight.detach()
        return (weight + self.delta.detach() if self.moving and self.delta is not None else weight).abs()

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.delta is not None:
            weight = weight + self.dense(self.delta)
        return torch.where(self.mask, weight, 0), bias

    def settle(self) -> None:
        """The mask is final: of the delta only what it keeps is held, trained and saved."""
        if self.delta is not None:
            self.delta = self.settled(self.delta)

    def reshape(self, values: dict[str, Tensor]) -> None:
        bits, delta = values.get("bits"), values.get("delta")
        if bits is None or bits.shape != self.bits.shape or (delta is None) != (self.delta is None):
            return  # which is reported for all tensors
        if delta is not None and self.delta is not None:
            self.delta = self.fitting("delta", self.delta, bits, delta)
        else:
            checked(bits)

    def changes(self) -> Changes:
        kept = 0 if self.delta is not None or self.bits.is_meta else int(self.mask.sum())
        return Changes(weight=math.prod(self.shape) - kept, rank=min(self.shape))


T = TypeVar("T", bound=PrunedTuner)

# -- choosing by score ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pruning(Masked):
    """A method that keeps the weights of the highest score."""

    keep_ratio: float = 0.5  # the part of the targeted weights that is kept
    scope: str = "tensor"  # that part of each weight matrix; or "global": of all together

    def __post_init__(self):
        super().__post_init__()
        if self.scope not in ("tensor", "global"):
            raise ValueError(f"{type(self).__name__} scope = {self.scope!r}; expected 'tensor' or 'global'")

    def sized(self, ratio: float) -> tuple[str, float]:
        """(pattern, ratio) of a choice that keeps `ratio`: of n:m, as many of the m as that takes."""
        if (group := parsed(self.pattern)) is None:
            return self.pattern, ratio
        n = max(1, math.ceil(ratio * group[1] - 1e-9))
        return f"{n}:{group[1]}", n / group[1]

    @property
    def final(self) -> float:
        """The part that is kept in the end."""
        return self.keep_ratio if (group := parsed(self.pattern)) is None else group[0] / group[1]

    def prune(self, tuners: list[T], score: Callable[[T], Tensor], ratio: float) -> None:
        """Gives the tuners masks that keep `ratio` of their weights, those of the highest score."""
        pattern, ratio = self.sized(ratio)
        together = self.scope == "global" and pattern == FREE
        for group in [tuners] if together else [[t] for t in tuners]:
            scores = [score(t) for t in group]
            k = kept(sum(s.numel() for s in scores), ratio, pattern)
            for tuner, positions in zip(group, best(scores, k, pattern), strict=True):
                tuner.mask = tuner.at(positions)


def cubic(progress: float, final: float, warm_up: float, cool_down: float) -> float:
    """From 1 to `final` as final + (1 - final) (1 - t)^3, t from 0 to 1 between warm-up and cool-down."""
    if progress <= warm_up:
        return 1.0
    if progress > 1 - cool_down:
        return final
    return final + (1 - final) * (1 - (progress - warm_up) / (1 - warm_up - cool_down)) ** 3


def check_schedule(name: str, warm_up: float, cool_down: float) -> None:
    """ValueError unless these are parts of a training that leave some of it."""
    if min(warm_up, cool_down) < 0 or warm_up + cool_down >= 1:
        raise ValueError(
            f"{name} warm_up = {warm_up}, cool_down = {cool_down}; expected parts of a training that add up to less "
            "than 1"
        )
