"""DiffPruning: a change of every weight under learned gates, of which the largest part is then kept.

    train       W' = W + w z(alpha) z(alpha_group)       z hard-concrete gates, drawn in training
                loss + penalty * E |z|_0                 E |z|_0 = sum_i sigmoid(alpha_i) sigmoid(alpha_group)
    then        the keep_ratio largest |w z z| of all weights together stay, with gates without noise
    finetune    W' = W + D                               D sparse, trained at those positions alone

With l0 = "sum" E |z|_0 is sum_i sigmoid(alpha_i) + sigmoid(alpha_group), as the authors' code has it. They train w and
alpha with two optimizers and clip the gradients of each; here one does it, with a learning rate for each.
Guo et al. 2021, arXiv:2012.07463.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from .. import ops
from ..engine.method import Changes, Phase, Tuner
from ..engine.site import Base, Site
from ..ops.hard_concrete import LEFT, RIGHT
from ._rng import seeds
from ._select import Masked, best, kept
from ._sparse import SparseTuner


@dataclass(frozen=True)
class DiffPruning(
    Masked, roles=("*",), lr=1e-5, tiny={"keep_ratio": 0.2, "alpha": 0.5}, family="selective", kernel="sparse"
):
    """A sparse change of the weights, found by learned gates. Guo et al. 2021, arXiv:2012.07463.

    Until its second phase it trains two numbers for each targeted weight, a change and a gate, which with their
    gradients and optimizer state take twice the memory of full fine-tuning of them. The second phase and the file hold
    the kept numbers alone. Gates are drawn in training and without noise in evaluation.
    """

    keep_ratio: float = 0.005  # the part of the targeted numbers that the second phase trains
    structured: bool = True  # a gate for each weight matrix as a whole too
    alpha: float = 5.0  # of the gates at the start, where nearly all are open
    alpha_lr: float = 0.1  # learning rate of the gates; lr is that of the changes
    penalty: float = 1.25e-7  # weight of the expected number of open gates in the loss
    l0: str = "product"  # how the gates of numbers and matrices meet in the penalty; or "sum", as in the authors' code
    finetune: float = 0.5  # the part of the steps that the second phase takes
    finetune_lr: float = 5e-5  # its learning rate

    def __post_init__(self):
        super().__post_init__()
        if self.l0 not in ("product", "sum"):
            raise ValueError(f"DiffPruning l0 = {self.l0!r}; expected 'product' or 'sum'")
        if not 0 <= self.finetune < 1:
            raise ValueError(f"DiffPruning finetune = {self.finetune}; expected a part of the steps, less than 1")
        if self.penalty < 0 or min(self.alpha_lr, self.finetune_lr) <= 0:
            raise ValueError(
                f"DiffPruning penalty = {self.penalty}, alpha_lr = {self.alpha_lr}, finetune_lr = {self.finetune_lr}; "
                "expected at least 0 and learning rates above it"
            )

    def phases(self, total_steps: int) -> list[Phase]:
        first = min(max(1, round((1 - self.finetune) * total_steps)), total_steps)
        return [Phase("train", first), Phase("finetune", total_steps - first, self.finetune_lr)]

    def enter(self, tuners: list[Tuner], phase: str) -> None:
        own = [t for t in cast("list[DiffPruningTuner]", tuners) if t.w is not None]
        if phase == "train" or not own:
            return
        changes = [tuner.change() for tuner in own]
        k = kept(sum(c.numel() for c in changes), self.keep_ratio, "free")
        chosen = best(changes, k, self.pattern, use_abs=True)
        for tuner, change, positions in zip(own, changes, chosen, strict=True):
            tuner.keep(change, positions)


class DiffPruningTuner(SparseTuner, method=DiffPruning):
    # In the first phase; None in the second, which trains `vals`.
    w: nn.Parameter | None  # [out, in]
    alpha: nn.Parameter | None  # [out, in]
    alpha_group: nn.Parameter | None  # 0-d, if structured

    def __init__(self, cfg: DiffPruning, site: Site):
        super().__init__(cfg, site)
        self.rates = {"alpha": cfg.alpha_lr, "alpha_group": cfg.alpha_lr}
        self.strength, self.product = cfg.penalty, cfg.l0 == "product"

        def opened(alpha: Tensor, _: torch.Generator) -> Tensor:
            return alpha.fill_(cfg.alpha)

        self.w = site.param(*self.shape)
        self.alpha = site.param(*self.shape, init=opened)
        self.alpha_group = site.param(init=opened) if cfg.structured else None

    def ready(self) -> str:
        return ""  # the first phase finds the mask

    def change(self) -> Tensor:
        """w z z with gates without noise, [out, in]."""
        assert self.w is not None and self.alpha is not None
        change = self.w * _gate(self.alpha)
        return change if self.alpha_group is None else change * _gate(self.alpha_group)

    def keep(self, change: Tensor, positions: Tensor) -> None:
        """These positions of the change alone are trained from here on."""
        self.w = self.alpha = self.alpha_group = None
        self.set_mask(positions)
        self.vals.copy_(change.flatten()[positions])

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return super().fold(weight, bias) if self.w is None else (weight + self.change(), bias)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        if self.w is None or self.alpha is None:
            return super().forward(base, x)
        weight, bias = base.effective()
        rng = seeds(x) if self.training else None
        tuned = ops.hard_concrete(weight, self.w, self.alpha, alpha_group=self.alpha_group, rng=rng)
        return base.site.apply(tuned, bias, x)

    def penalty(self) -> Tensor | None:
        if self.alpha is None or not self.strength:
            return None
        shift = math.log(-LEFT / RIGHT)
        count = (self.alpha - shift).sigmoid().sum()
        if self.alpha_group is not None:
            group = (self.alpha_group - shift).sigmoid()
            count = count * group if self.product else count + group
        return self.strength * count

    def reshape(self, values: dict[str, Tensor]) -> None:
        if "w" not in values:
            self.w = self.alpha = self.alpha_group = None
        super().reshape(values)

    def touched(self) -> Tensor | None:
        return super().touched() if self.w is None else None

    def changes(self) -> Changes:
        if self.w is None:
            return super().changes()
        return Changes(weight=self.w.numel(), rank=min(self.shape))


def _gate(alpha: Tensor) -> Tensor:
    """z without noise."""
    return (alpha.sigmoid() * (RIGHT - LEFT) + LEFT).clamp(0, 1)
