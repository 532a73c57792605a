"""Movement pruning: weights that training moves towards zero become zero. Sanh et al. 2020, arXiv:2005.07683.

    W' = M * (W + delta)
    hard      M = the v largest scores S                   v = v_final + (1 - v_final) (1 - t)^3
    soft      M = sigmoid(S) > tau                         tau = tau_final (1 - (1 - t)^3)
              loss + p mean sigmoid(S)                     p = penalty (1 - (1 - t)^3), the mean over the weights' means
    dL/dS = (W + delta) * dL/dW'    as if M were S (straight-through)        dL/d delta = M * dL/dW'

with S = 0 at the start, and t from 0 to 1 between warm-up and cool-down. So S grows where the weight moves away from
zero: W = .5 with dL/dW' = -1 and a learning rate of .1 gives S = .05.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ..engine.method import Phase, Tuner
from ..engine.site import Site
from ._pruned import PrunedTuner, Pruning, check_schedule, cubic
from ._select import FREE, best

_LEAST = 0.005  # of a weight matrix is kept, whatever the threshold


@dataclass(frozen=True)
class MovementPruning(Pruning, roles=("*",), lr=3e-5, tiny={}, key="movement", family="selective", kernel="sparse"):
    """Weights that training moves towards zero become zero. Sanh et al. 2020, arXiv:2005.07683.

    `pk.fit` prunes more after each step. It trains a dense copy of the targeted weights' changes and as many scores:
    twice the numbers of full fine-tuning; with freeze, the scores alone. What is saved at its end is a bit per weight
    and the changes of the kept ones; a merge writes the zeros. soft keeps as many weights as the penalty leaves, and at
    least 0.5 % of each matrix, instead of keep_ratio.
    """

    keep_ratio: float = 0.15  # the part of the targeted weights that hard pruning keeps
    mode: str = "hard"  # or "soft": the weights whose score is above a threshold are kept
    threshold: float = 0.1  # of the sigmoid of a soft score
    penalty: float = 400.0  # of soft pruning: weight of the mean sigmoid of the scores in the loss
    warm_up: float = 0.1  # the part of the training at whose end pruning begins
    cool_down: float = 0.2  # the part of the training at whose begin v or the threshold is final
    scores_lr: float = 1e-2  # learning rate of the scores
    freeze: bool = False  # the weights stay as they are; only what is kept is learned

    def __post_init__(self):
        super().__post_init__()
        check_schedule("MovementPruning", self.warm_up, self.cool_down)
        if self.mode not in ("hard", "soft"):
            raise ValueError(f"MovementPruning mode = {self.mode!r}; expected 'hard' or 'soft'")
        if self.soft and self.pattern != FREE:
            raise ValueError(f"MovementPruning pattern = {self.pattern!r} with mode = 'soft'; expected {FREE!r}")
        if not 0 < self.threshold < 1 or self.penalty < 0 or self.scores_lr <= 0:
            raise ValueError(
                f"MovementPruning threshold = {self.threshold}, penalty = {self.penalty}, scores_lr = "
                f"{self.scores_lr}; expected one between 0 and 1, at least 0, and more than 0"
            )

    @property
    def soft(self) -> bool:
        return self.mode == "soft"

    def phases(self, total_steps: int) -> list[Phase]:
        return [Phase("train", total_steps), Phase("done", 0)]

    def enter(self, tuners: list[Tuner], phase: str) -> None:
        own = cast("list[MovementTuner]", tuners)
        for tuner in own:
            tuner.share = 1 / len(own)
        if phase == "done":
            self.step(tuners, 1.0)  # the best epoch may have been an earlier one
            for tuner in own:
                tuner.settle()

    def step(self, tuners: list[Tuner], progress: float) -> None:
        own = [t for t in cast("list[MovementTuner]", tuners) if t.moving]
        if self.soft:
            part = 1 - cubic(progress, 0.0, self.warm_up, self.cool_down)
            for tuner in own:
                tuner.ramp = part
                tuner.above(part * self.threshold)
        elif own and (ratio := cubic(progress, self.final, self.warm_up, self.cool_down)) < 1:
            self.prune(own, MovementTuner.score, ratio)


class MovementTuner(PrunedTuner, method=MovementPruning):
    scores: nn.Parameter | None  # [out, in], while the mask moves

    def __init__(self, cfg: MovementPruning, site: Site):
        super().__init__(cfg, site, dense=not cfg.freeze)
        self.scores = site.param(*self.shape)
        self.rates = {"scores": cfg.scores_lr}
        self.soft, self.strength = cfg.soft, cfg.penalty
        self.ramp = 0.0  # the part of the threshold and of the penalty that holds now
        self.share = 1.0  # of the tuner in the mean over all

    @property
    def moving(self) -> bool:
        return self.scores is not None

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        pruned, bias = super().fold(weight, bias)
        if self.scores is not None and torch.is_grad_enabled():
            tuned = weight if self.delta is None else weight + self.delta
            pruned = pruned + (self.scores - self.scores.detach()) * tuned.detach()  # zeros, with the gradient
        return pruned, bias

    def score(self) -> Tensor:
        assert self.scores is not None
        return self.scores.detach()

    def above(self, threshold: float) -> None:
        """Keeps what has a larger sigmoid, and at least some."""
        scores = self.score()
        mask, least = scores.sigmoid() > threshold, int(_LEAST * scores.numel()) + 1
        if mask.sum() < least:
            mask = self.at(best([scores], least)[0])
        self.mask = mask

    def penalty(self) -> Tensor | None:
        if self.scores is None or not self.soft:
            return None
        return self.strength * self.ramp * self.share * self.scores.sigmoid().mean()

    def settle(self) -> None:
        super().settle()
        self.scores = None

    def reshape(self, values: dict[str, Tensor]) -> None:
        super().reshape(values)
        if "scores" not in values:
            self.scores = None
        elif self.scores is None:
            self.scores = nn.Parameter(self.bits.new_zeros(self.shape, dtype=values["scores"].dtype))
