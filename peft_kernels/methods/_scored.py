"""A sparse mask chosen by a statistic of each weight's gradient, which `pk.calibrate` gathers layer by layer."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..engine.method import Method
from ..engine.site import Site
from ._sparse import SparseTuner


class ScoredTuner(SparseTuner):
    """Sums a statistic over the rows of a calibration; a subclass writes `add`."""

    def __init__(self, cfg: Method, site: Site):
        super().__init__(cfg, site)
        self.sums: Tensor | None = None  # [out, in] fp32, while calibrating

    def add(self, sums: Tensor, x: Tensor, dy: Tensor, samples: Tensor, weight: Tensor | None) -> None:
        """Adds what `Tuner.observe` has seen to sums [out, in]."""
        raise NotImplementedError(f"{type(self).__name__} has no statistic")

    def watched(self, site: Site) -> dict[str, Tensor]:
        self.sums = None  # calibration begins, and one before it may have ended with an error
        return {}

    def observe(self, site: Site, x: Tensor, dy: Tensor, samples: Tensor, weight: Tensor | None) -> None:
        if self.sums is None:
            self.sums = torch.zeros(self.shape, device=dy.device)
        self.add(self.sums, x, dy, samples, weight)

    def taken(self) -> Tensor:
        """The sums, handed over once; zeros where the loss never came by."""
        found, self.sums = self.sums, None
        return torch.zeros(self.shape, device=self.vals.device) if found is None else found


def trained(tuners: Iterable[SparseTuner]) -> bool:
    """Whether they have a mask and values on it, which a calibration for another adapter must leave alone."""
    return any(bool(tuner.vals.any()) for tuner in tuners)
