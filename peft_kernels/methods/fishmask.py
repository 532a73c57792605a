"""FishMask: the numbers with the largest Fisher information are tuned. Sung et al. 2021, arXiv:2111.09839.

    empirical     F_i = mean over rows (x, y) of (d log p(y | x) / d w_i)^2
    expected      F_i = mean over rows x of sum over classes c of p(c | x) (d log p(c | x) / d w_i)^2

The squares are those of each row's own gradient, not of a batch's. They are summed in fp32 from the inputs and output
gradients of each layer, without a dense gradient; a dense F exists while `pk.calibrate` runs and is then freed.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import cast

from torch import Tensor

from .. import ops
from ..engine.method import Stats, Tuner
from ._scored import ScoredTuner, trained
from ._select import FREE, Masked, best, kept


@dataclass(frozen=True)
class FishMask(Masked, roles=("*",), lr=2e-3, tiny={"keep_ratio": 0.2}, family="selective", kernel="sparse"):
    """Tunes the numbers with the largest Fisher information. Sung et al. 2021, arXiv:2111.09839.

    `pk.calibrate(model, batches)` chooses them, the best of all targeted weights together; `tune` calls it by itself.
    Once their values are trained it leaves them alone. A head is always dense, and takes its size off the budget unless
    it is larger than that, which a warning says.
    """

    keep_ratio: float = 0.005  # the part that is trained of the targeted numbers and of those trained whole beside it
    expected: bool = False  # the Fisher of the model's own classes instead of the labels; as many passes as classes
    samples: int = 1024  # rows that `pk.calibrate` reads unless it is told how many batches
    count_head: bool = True  # those trained whole beside it, such as a head, are a part of the kept ones

    def __post_init__(self):
        super().__post_init__()
        if self.samples < 1:
            raise ValueError(f"FishMask samples = {self.samples}; expected at least 1")

    def calibrate(self, measured: list[tuple[Tuner, Stats]], beside: int) -> None:
        tuners = [cast(FishMaskTuner, tuner) for tuner, _ in measured]
        found = [tuner.taken() for tuner in tuners]
        if trained(tuners):
            return
        k = self._budget(sum(f.numel() for f in found), beside)
        for tuner, positions in zip(tuners, best(found, k, self.pattern), strict=True):
            tuner.set_mask(positions)

    def _budget(self, total: int, beside: int) -> int:
        """How many of `total` numbers are kept where `beside` more are trained whole."""
        k = int((total + beside) * self.keep_ratio) - beside
        if self.count_head and beside and k > 0:
            return k
        if self.count_head and beside and self.pattern == FREE:
            warnings.warn(
                f"FishMask: the {beside:,} numbers trained whole beside it are more than keep_ratio = "
                f"{self.keep_ratio} of all {total + beside:,} and are not counted; "
                "raise it, or say so with count_head=False",
                stacklevel=2,
            )
        return kept(total, self.keep_ratio, FREE)


class FishMaskTuner(ScoredTuner, method=FishMask):
    def add(self, sums: Tensor, x: Tensor, dy: Tensor, samples: Tensor, weight: Tensor | None) -> None:
        ops.fisher_linear_(sums, dy, x, samples, weight=weight)
