"""Magnitude pruning: the smallest weights become zero. Han et al. 2015, arXiv:1506.02626.

    W' = M * (W + delta)        M = the largest |W + delta|        dL/d delta = M * dL/dW'

In one shot M is chosen from W, and delta is trained where M is 1. With the schedule "cubic" a training chooses M after
each step, of ever fewer weights,

    v = v_final + (1 - v_final) (1 - t)^3        t from 0 to 1 between warm-up and cool-down

and what was pruned may return until v is v_final. Zhu & Gupta 2017, arXiv:1710.01878.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import nn

from ..engine.method import Phase, Tuner
from ..engine.site import Site
from ._pruned import PrunedTuner, Pruning, check_schedule, cubic
from ._select import kept


@dataclass(frozen=True)
class MagnitudePruning(Pruning, roles=("*",), lr=2e-4, tiny={}, key="magnitude", family="selective", kernel="sparse"):
    """The smallest weights become zero and the others are retrained. Han et al. 2015, arXiv:1506.02626.

    In one shot it prunes as soon as it is attached, and trains as many numbers as are kept. With the schedule "cubic"
    (Zhu & Gupta 2017, arXiv:1710.01878) `pk.fit` prunes more after each step, and until the end trains a dense copy of
    the targeted weights' changes. What is saved is a bit per weight and the changes of the kept ones; a merge writes
    the zeros. The weights that are compared are the module's own, without adapters below.
    """

    identity = False

    keep_ratio: float = 0.5  # the part of the targeted weights that is kept
    schedule: str = "one-shot"  # or "cubic": from all to keep_ratio in the course of a training
    warm_up: float = 0.1  # the part of a cubic training at whose end pruning begins
    cool_down: float = 0.3  # the part of a cubic training in which nothing more is pruned
    retrain: bool = True  # the kept weights are trained

    def __post_init__(self):
        super().__post_init__()
        if self.schedule not in ("one-shot", "cubic"):
            raise ValueError(f"MagnitudePruning schedule = {self.schedule!r}; expected 'one-shot' or 'cubic'")
        if self.cubic and not self.retrain:
            raise ValueError("MagnitudePruning retrain = False with schedule = 'cubic'; prune in one shot")
        check_schedule("MagnitudePruning", self.warm_up, self.cool_down)

    @property
    def cubic(self) -> bool:
        return self.schedule == "cubic"

    def phases(self, total_steps: int) -> list[Phase]:
        return [Phase("train", total_steps), *([Phase("done", 0)] if self.cubic else [])]

    def attached(self, tuners: list[Tuner]) -> None:
        if self.scope == "global" and not self.cubic:
            self.shoot(cast("list[MagnitudeTuner]", tuners))

    def shoot(self, tuners: list[MagnitudeTuner]) -> None:
        """Prunes the weights as they are; on the meta device nothing is known of them."""
        if not any(t.bits.is_meta for t in tuners):
            self.prune(tuners, MagnitudeTuner.magnitude, self.final)
            for tuner in tuners:
                tuner.restart()

    def enter(self, tuners: list[Tuner], phase: str) -> None:
        if phase == "done":
            self.step(tuners, 1.0)  # the best epoch may have been an earlier one
            for tuner in cast("list[MagnitudeTuner]", tuners):
                tuner.settle()

    def step(self, tuners: list[Tuner], progress: float) -> None:
        own = cast("list[MagnitudeTuner]", tuners)
        ratio = cubic(progress, self.final, self.warm_up, self.cool_down)
        if all(t.moving for t in own) and ratio < sum(t.kept for t in own) / sum(t.mask.numel() for t in own):
            self.prune(own, MagnitudeTuner.magnitude, ratio)


class MagnitudeTuner(PrunedTuner, method=MagnitudePruning):
    def __init__(self, cfg: MagnitudePruning, site: Site):
        super().__init__(cfg, site, dense=cfg.cubic)
        if not cfg.cubic:
            if cfg.retrain:
                self.delta = site.param(kept(self.shape[0] * self.shape[1], cfg.final, cfg.pattern))
            cfg.shoot([self])

    def restart(self) -> None:
        """Trains what the mask keeps, from no change on."""
        if self.delta is not None:
            self.delta = nn.Parameter(self.delta.new_zeros(self.kept), self.delta.requires_grad)
