"""RandomMask: random numbers of the weights are tuned, the baseline of every method that chooses them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..engine.site import Site
from ._select import Masked, best, kept
from ._sparse import SparseTuner


@dataclass(frozen=True)
class RandomMask(
    Masked, roles=("*",), lr=2e-3, tiny={"keep_ratio": 0.2}, key="random", family="selective", kernel="sparse"
):
    """Tunes random numbers of each weight: what other masks are compared with. Sung et al. 2021, arXiv:2111.09839.

    They are drawn at attach, from its seed and the module's path, exactly round(keep_ratio * numbers) in each weight.
    """


class RandomMaskTuner(SparseTuner, method=RandomMask):
    def __init__(self, cfg: RandomMask, site: Site):
        super().__init__(cfg, site)
        scores = site.param(*self.shape, init=lambda t, made: t.uniform_(generator=made)).detach()
        k = kept(scores.numel(), cfg.keep_ratio, cfg.pattern)
        meta = scores.is_meta
        self.set_mask(torch.empty(k, dtype=torch.int64, device="meta") if meta else best([scores], k, cfg.pattern)[0])
