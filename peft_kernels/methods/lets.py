"""LeTS: several tasks share a frozen trunk, and each has a sparse change of the blocks above it.

    y = W x + D x        D zero but at the keep_ratio largest |w dL/dw| of all targeted weights together

The mask is chosen before training, by the change of the loss that removing each number would make (Lee et al. 2019,
SNIP, arXiv:1810.02340). W x is the same for all tasks wherever x is: `pk.shared_trunk` computes the blocks below the
first changed one once for all of them. Fu et al. 2021, "Learn-to-Share", ICML.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

from torch import Tensor

from ..engine.method import Part, Stats, Tuner
from ..engine.site import Site
from ._scored import ScoredTuner, trained
from ._select import FREE, Masked, best, kept


@dataclass(frozen=True)
class LeTS(Masked, roles=("*",), lr=2e-3, tiny={"keep_ratio": 0.2}, family="selective", kernel="sparse"):
    """A sparse change of the upper blocks, chosen before training; tasks share what lies below. Fu et al. 2021, ICML.

    `pk.calibrate(model, batches)` chooses it; `tune` calls it by itself. Which blocks are changed is given, not
    searched, and features of the layers are not aggregated: the head is the task's own.
    """

    keep_ratio: float = 0.014  # the part of the targeted numbers that is trained
    tuned: int = 0  # how many of the last blocks are changed; 0: all
    samples: int = 256  # rows of the training data that calibration reads

    def __post_init__(self):
        super().__post_init__()
        if self.tuned < 0:
            raise ValueError(f"LeTS tuned = {self.tuned}; expected a number of blocks, or 0 for all")
        if self.samples < 1:
            raise ValueError(f"LeTS samples = {self.samples}; expected at least 1")

    def expand(self, part: Part) -> list[Part]:
        if self.tuned and part.layers is None:
            part = replace(part, layers=tuple(range(-self.tuned, 0)))
        return [part]

    def calibrate(self, measured: list[tuple[Tuner, Stats]], beside: int) -> None:
        tuners = [cast(LeTSTuner, tuner) for tuner, _ in measured]
        scores = [tuner.taken() for tuner in tuners]
        if trained(tuners):
            return
        k = kept(sum(s.numel() for s in scores), self.keep_ratio, FREE)
        for tuner, positions in zip(tuners, best(scores, k, self.pattern, use_abs=True), strict=True):
            tuner.set_mask(positions)


class LeTSTuner(ScoredTuner, method=LeTS):
    site: Site | None = None  # while calibrating

    def watched(self, site: Site) -> dict[str, Tensor]:
        vars(self)["site"] = site
        return super().watched(site)

    def taken(self) -> Tensor:
        site = cast(Site, vars(self).pop("site"))
        return super().taken().mul_(site.weight.detach())

    def add(self, sums: Tensor, x: Tensor, dy: Tensor, samples: Tensor, weight: Tensor | None) -> None:
        sums.addmm_(dy.T.to(sums.dtype), x.to(sums.dtype))
