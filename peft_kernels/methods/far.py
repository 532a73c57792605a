"""FAR: of each feed-forward linear only the output nodes are trained that a short priming changes most.

    prime     W + delta, delta dense     the nodes: the ratio * out rows of W with the largest sum of |delta|
    train     y = x W'^T + b'            W' is W but for the rows of the nodes, b' its bias but for their biases

Freeze And Reconfigure, Vucetic et al. 2022, arXiv:2205.01541.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..engine.method import Changes, Method, Phase, Stats, Tuner
from ..engine.site import Base, Site

_PANEL = 256  # rows of a gradient that exist at a time while nodes are scored


@dataclass(frozen=True)
class FAR(
    Method, roles=("up", "gate", "down"), lr=5e-4, tiny={"ratio": 0.3, "prime": 0.0}, family="selective", kernel="split"
):
    """Trains the output nodes of feed-forward layers that change most. Vucetic et al. 2022, arXiv:2205.01541.

    The first phase trains a dense fp32 copy of the change of every targeted weight: as much memory as full fine-tuning
    of them takes, for that part of the steps. Then the nodes go on from there; all others are the base's again.
    With prime = 0 no dense copy is made: `pk.calibrate` scores a node by the L1 norm of the gradient of its row, summed
    over batches, so by how far plain gradient descent would move it; `tune` calls it by itself.
    """

    samples = 1024  # rows that `pk.calibrate` reads unless it is told how many batches

    ratio: float = 0.1  # the part of the output nodes of each linear that is trained
    prime: float = 0.1  # the part of the steps that the priming takes

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.ratio <= 1:
            raise ValueError(f"FAR ratio = {self.ratio}; expected more than 0 and at most 1")
        if not 0 <= self.prime < 1:
            raise ValueError(f"FAR prime = {self.prime}; expected a part of the steps, or 0 to choose by gradients")

    def at(self, site: Site) -> Method:
        return self if self.prime else _Scored(**asdict(self))

    def phases(self, total_steps: int) -> list[Phase]:
        if not self.prime:
            return super().phases(total_steps)
        first = max(1, min(round(self.prime * total_steps), total_steps - 1))  # a step for each, if there are two
        return [Phase("prime", first), Phase("train", total_steps - first)]


class _Scored(FAR):
    """FAR whose nodes `pk.calibrate` chooses: its tuner observes."""


class FARTuner(Tuner, method=FAR):
    """wt and bt are changes: zeros [0, in] and [0] at first, [out, in] and [out] in the priming, those of rows then."""

    fresh = True
    rows: Tensor | None  # [h] int32, ascending

    def __init__(self, cfg: FAR, site: Site):
        super().__init__(cfg, site)
        self.ratio, self.shape = cfg.ratio, (site.n_out, site.n_in)
        self.wt = site.param(0, site.n_in)
        self.bt = None if site.bias is None else site.param(0)
        self.register_buffer("rows", None)

    # -- the nodes ----------------------------------------------------------------------------------------------------

    @property
    def dense(self) -> bool:
        return self.rows is None and len(self.wt) > 0

    def _resize(self, h: int) -> None:
        """Zeros for h nodes; what has the shape stays."""
        if len(self.wt) != h:
            self.wt = nn.Parameter(self.wt.new_zeros(h, self.shape[1]), self.wt.requires_grad)
        if self.bt is not None and len(self.bt) != h:
            self.bt = nn.Parameter(self.bt.new_zeros(h), self.bt.requires_grad)

    @torch.no_grad()
    def choose(self, score: Tensor) -> None:
        """The best nodes by score [out] are trained from now on, from where they are; ties go to the first."""
        before = (self.wt, self.bt) if self.dense else (None, None)
        h = max(1, round(self.ratio * self.shape[0]))
        rows = score.sort(descending=True, stable=True).indices[:h].sort().values
        self._resize(h)
        for own, primed in zip((self.wt, self.bt), before, strict=True):
            if own is not None:
                own.zero_() if primed is None else own.copy_(primed[rows])
        self.rows = rows.to(torch.int32)

    def enter(self, phase: str) -> None:
        if phase == "prime":
            self.rows = None
            self._resize(0)
            self._resize(self.shape[0])
        elif self.dense:
            self.choose(self.wt.abs().sum(1))

    def reshape(self, values: dict[str, Tensor]) -> None:
        rows, wt = values.get("rows"), values.get("wt")
        if wt is None or (rows is None and len(wt) not in (0, self.shape[0])):
            return
        if rows is not None:
            whole = rows.dim() == 1 and rows.dtype in (torch.int32, torch.int64) and len(rows) == len(wt)
            if not whole or len(rows) and (rows[0] < 0 or rows[-1] >= self.shape[0] or bool((rows.diff() <= 0).any())):
                raise ValueError(
                    f"rows is {rows.dtype} {tuple(rows.shape)} for {len(wt)} trained ones; "
                    f"expected as many integers from 0 to {self.shape[0] - 1}, each larger than the one before"
                )
        self._resize(len(wt))
        self.rows = None if rows is None else rows.to(self.wt.device, torch.int32, copy=True)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.reshape({key.removeprefix(prefix): t for key, t in state_dict.items() if key.startswith(prefix)})
        super()._load_from_state_dict(state_dict, prefix, *args)

    # -- the function -------------------------------------------------------------------------------------------------

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        def tuned(t: Tensor, change: Tensor) -> Tensor:
            change = change.to(dtype := torch.promote_types(t.dtype, change.dtype))
            return t.to(dtype) + change if self.rows is None else t.to(dtype).index_add(0, self.rows, change)

        if not len(self.wt):
            return weight, bias
        return tuned(weight, self.wt), bias if bias is None or self.bt is None else tuned(bias, self.bt)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        if self.rows is None:
            return super().forward(base, x)
        if base.innermost:
            weight, bias = base.effective()
            bt = None if bias is None or self.bt is None else bias[self.rows] + self.bt
            return ops.far_linear(x, weight, weight[self.rows] + self.wt, self.rows, bias=bias, bt=bt)
        y = base(x)
        bt = None if self.bt is None else self.bt.to(y.dtype)
        return y.index_add(-1, self.rows, F.linear(x, self.wt.to(x.dtype), bt).to(y.dtype))

    def touched(self) -> Tensor | None:
        if self.dense:
            return None
        rows = self.wt.new_empty(0, dtype=torch.int64) if self.rows is None else self.rows.long()
        return (rows[:, None] * self.shape[1] + torch.arange(self.shape[1], device=rows.device)).flatten()

    def changes(self) -> Changes:
        return Changes(self.wt.numel(), 0 if self.bt is None else len(self.bt), min(self.wt.shape))


class _ScoredTuner(FARTuner, method=_Scored):
    score: Tensor | None = None  # [out], while calibrating

    def watched(self, site: Site) -> dict[str, Tensor]:
        self.score = None  # calibration begins, and one before it may have ended with an error
        return {}

    def observe(self, site: Site, x: Tensor, dy: Tensor, samples: Tensor, weight: Tensor | None) -> None:
        found = torch.cat([(part.T @ x).abs().sum(1, dtype=torch.float32) for part in dy.split(_PANEL, 1)])
        self.score = found if self.score is None else self.score + found

    def calibrate(self, stats: Stats) -> None:
        score, self.score = self.score, None
        self.choose(self.wt.new_zeros(self.shape[0]) if score is None else score.to(self.wt.device))

    def ready(self) -> str:
        missing = f"{self.site_name}: FAR has no nodes yet; call pk.calibrate(model, batches) first, or prime them"
        return missing if self.rows is None else ""
