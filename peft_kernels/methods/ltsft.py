"""LTSFT: a first training of all numbers says which of them a second one, from the start again, is allowed to change.

    prime     W + delta, delta dense           mask = the keep_ratio largest |delta| of all weights together
    sparse    W + D, D zero outside the mask   D starts from zero: the weights are rewound

Lottery-ticket sparse fine-tuning, Ansell et al. 2022, arXiv:2110.07560.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from ..engine.method import Changes, Phase, Tuner
from ..engine.site import Base
from ._select import FREE, Masked, best, kept
from ._sparse import SparseTuner


@dataclass(frozen=True)
class LTSFT(Masked, roles=("*",), lr=5e-4, tiny={"keep_ratio": 0.2}, family="selective", kernel="sparse"):
    """Tunes the numbers that change most in a full fine-tuning, from the start. Ansell et al. 2022, arXiv:2110.07560.

    The first phase trains a dense fp32 copy of the change of every targeted weight, with its gradient and optimizer
    state: as much memory as full fine-tuning of them takes. The second phase and the file hold the kept numbers alone.
    Modules trained whole beside it (a head) go on from where the first phase left them; the authors rewind them too.
    """

    keep_ratio: float = 0.08  # the part of the targeted numbers that the second phase trains
    prime: float = 0.5  # the part of the steps that the first phase takes
    l1: float = 0.0  # weight of the mean |change| of the targeted numbers in the loss, in both phases

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.prime < 1:
            raise ValueError(f"LTSFT prime = {self.prime}; expected a part of the steps, more than 0 and less than 1")
        if self.l1 < 0:
            raise ValueError(f"LTSFT l1 = {self.l1}; expected 0 or more")

    def phases(self, total_steps: int) -> list[Phase]:
        first = max(
            1, min(round(self.prime * total_steps), total_steps - 1)
        )  # at least a step for each, if there are two
        return [Phase("prime", first), Phase("sparse", total_steps - first)]

    def enter(self, tuners: list[Tuner], phase: str) -> None:
        own = cast("list[LTSFTTuner]", tuners)
        total = sum(math.prod(tuner.shape) for tuner in own)
        for tuner in own:
            tuner.l1 = self.l1 / total
            if phase == "prime":
                tuner.begin()
        if phase == "sparse":
            changes = [tuner.vals.detach() for tuner in own]
            chosen = best(changes, kept(total, self.keep_ratio, FREE), self.pattern, use_abs=True)
            for tuner, positions in zip(own, chosen, strict=True):
                tuner.set_mask(positions)


class LTSFTTuner(SparseTuner, method=LTSFT):
    """In the first phase vals is dense, [out, in], and there is no mask."""

    l1 = 0.0  # what the sum of |change| counts in the loss

    @property
    def dense(self) -> bool:
        return self.vals.dim() == 2

    def begin(self) -> None:
        """All of the weight is trained, from its own value on."""
        self.clear_mask()
        self.vals = nn.Parameter(self.vals.new_zeros(self.shape), self.vals.requires_grad)

    def ready(self) -> str:
        return ""  # the first phase needs no mask

    def reshape(self, values: dict[str, Tensor]) -> None:
        vals = values.get("vals")
        if vals is None or vals.shape != self.shape:
            super().reshape(values)
        elif not self.dense:
            self.begin()

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return (weight + self.vals, bias) if self.dense else super().fold(weight, bias)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        return Tuner.forward(self, base, x) if self.dense else super().forward(base, x)

    def penalty(self) -> Tensor | None:
        return self.l1 * self.vals.abs().sum() if self.l1 else None

    def touched(self) -> Tensor | None:
        return None if self.dense else super().touched()

    def changes(self) -> Changes:
        return Changes(self.vals.numel(), 0, min(self.shape)) if self.dense else super().changes()
