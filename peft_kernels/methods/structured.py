"""Structured pruning: whole attention heads and feed-forward neurons are cut off, the others get a gain to train.

    y = W (g * x)        W the output linear of attention or feed-forward        g 0 where a unit of x is pruned

A unit is a neuron, or a head: with grouped queries a key-value head with all its queries. Scores:

    gradient     mean over rows of |dL/dg| at g = 1: |sum of x * dL/dx| over the row's tokens and the unit's features
    magnitude    the norm of the columns of W that read the unit

Michel et al. 2019, arXiv:1905.10650.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import ops
from ..engine.method import Changes, Method, Stats, Tuner
from ..engine.site import Base, Site

_TINY = {"neurons": 0.5, "heads": 0.5, "score": "magnitude"}


@dataclass(frozen=True)
class StructuredPruning(
    Method, roles=("o", "down"), lr=1e-2, tiny=_TINY, key="structured", family="selective", kernel="rescale"
):
    """Whole neurons and attention heads are pruned by score. Michel et al. 2019, arXiv:1905.10650.

    By gradient, `pk.calibrate(model, batches)` prunes, and `tune` calls it by itself; by magnitude, attaching does.
    Then one gain for each unit that is left is trained. `pk.shrink` makes the smaller dense model of it. To train more
    than gains, attach another method first: it lies below and is pruned with the weights.
    """

    identity = False
    samples = 1024  # rows that `pk.calibrate` reads unless it is told how many batches

    neurons: float = 0.5  # the part of the neurons that is kept
    heads: float = 1.0  # the part of the heads that is kept
    score: str = "gradient"  # or "magnitude"
    scope: str = "layer"  # equally many units are kept in every layer; or "global": the best of all layers together

    def __post_init__(self):
        super().__post_init__()
        for name, value in (("neurons", self.neurons), ("heads", self.heads)):
            if not 0 < value <= 1:
                raise ValueError(f"StructuredPruning {name} = {value}; expected more than 0 and at most 1")
        for name, word, words in (
            ("score", self.score, ("gradient", "magnitude")),
            ("scope", self.scope, ("layer", "global")),
        ):
            if word not in words:
                raise ValueError(f"StructuredPruning {name} = {word!r}; expected {' or '.join(map(repr, words))}")

    def select(self, sites: list[Site]) -> list[Site]:
        return [s for s in super().select(sites) if (self.heads if s.heads else self.neurons) < 1]

    def at(self, site: Site) -> Method:
        return _Scored(**asdict(self)) if self.score == "gradient" else self

    def attached(self, tuners: list[Tuner]) -> None:
        own = cast("list[StructuredTuner]", tuners)
        if self.score == "magnitude" and not any(t.gain.is_meta for t in own):
            self.prune(own, [t.magnitude for t in own])

    def calibrate(self, measured: list[tuple[Tuner, Stats]], beside: int) -> None:
        tuners = [cast(_ScoredTuner, tuner) for tuner, _ in measured]
        self.prune(tuners, [tuner.importance() for tuner in tuners])

    def prune(self, tuners: Sequence[StructuredTuner], scores: Sequence[Tensor]) -> None:
        """Keeps the units with the best scores [units], of neurons and heads apart; ties go to the first."""
        for ratio, heads in ((self.neurons, False), (self.heads, True)):
            found = [(t, s.float()) for t, s in zip(tuners, scores, strict=True) if t.heads == heads]
            if self.scope == "layer":
                for tuner, score in found:
                    tuner.keep(_best(score, max(1, round(ratio * len(score)))))
            elif found:
                # Scores of layers compare by their share of the layer's; each layer keeps its best unit.
                flat = [s / s.norm().clamp_min(1e-30) for _, s in found]
                flat = [s.index_fill(0, s.argmax(), torch.inf) for s in flat]
                total = sum(map(len, flat))
                best = _best(torch.cat(flat), max(len(found), round(ratio * total)))
                kept = torch.zeros(total, dtype=torch.bool, device=best.device).index_fill(0, best, True)
                for (tuner, _), part in zip(found, kept.split([len(s) for s in flat]), strict=True):
                    tuner.keep(part.nonzero().flatten())


def _best(score: Tensor, k: int) -> Tensor:
    if score.isnan().any():
        raise ValueError("a score is NaN; expected numbers, look for where they arise")
    return score.sort(descending=True, stable=True).indices[:k].sort().values


class _Scored(StructuredPruning):
    """StructuredPruning whose units `pk.calibrate` chooses: its tuner observes."""


class StructuredTuner(Tuner, method=StructuredPruning):
    """units [kept] int32, ascending, and their gain [kept]; None and [0] until something is pruned."""

    units: Tensor | None

    def __init__(self, cfg: StructuredPruning, site: Site):
        super().__init__(cfg, site)
        self.shape, self.heads = (site.n_out, site.n_in), site.heads is not None
        self.count = site.heads or site.n_in
        self.size = site.n_in // self.count  # features of a unit
        self.gain = site.param(0)
        self.register_buffer("units", None)
        if cfg.score == "magnitude":
            self.magnitude = site.weight.detach().float().norm(dim=0).view(self.count, -1).norm(dim=1)

    def keep(self, units: Tensor) -> None:
        """From now on the other units are pruned, and these have a gain of 1."""
        self.units = units.to(torch.int32)
        self.gain = nn.Parameter(self.gain.new_ones(len(units)), self.gain.requires_grad)

    def reshape(self, values: dict[str, Tensor]) -> None:
        units, gain = values.get("units"), values.get("gain")
        if units is None or gain is None:
            return
        whole = units.dim() == 1 and units.dtype in (torch.int32, torch.int64) and units.shape == gain.shape
        if not whole or not len(units) or units[0] < 0 or units[-1] >= self.count or bool((units.diff() <= 0).any()):
            raise ValueError(
                f"units is {units.dtype} {tuple(units.shape)} for {len(gain)} gains; "
                f"expected as many integers from 0 to {self.count - 1}, each larger than the one before"
            )
        if self.gain.shape != gain.shape or self.units is None:
            self.keep(units.to(self.gain.device))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.reshape({key.removeprefix(prefix): t for key, t in state_dict.items() if key.startswith(prefix)})
        super()._load_from_state_dict(state_dict, prefix, *args)

    def gates(self) -> Tensor:
        """g [in]."""
        units = self.gain.new_zeros(self.count).index_add(0, cast(Tensor, self.units), self.gain)
        return units.repeat_interleave(self.size) if self.size > 1 else units

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight if self.units is None else weight * self.gates(), bias

    def forward(self, base: Base, x: Tensor) -> Tensor:
        return base(x if self.units is None else ops.rescale(x, self.gates()))

    def changes(self) -> Changes:
        return Changes() if self.units is None else Changes(self.shape[0] * self.shape[1], 0, min(self.shape))


class _ScoredTuner(StructuredTuner, method=_Scored):
    score: Tensor | None = None  # [units], while calibrating

    def watched(self, site: Site) -> dict[str, Tensor]:
        self.score = None  # calibration begins, and one before it may have ended with an error
        return {}

    def observe(self, site: Site, x: Tensor, dy: Tensor, samples: Tensor, weight: Tensor | None) -> None:
        by_unit = (dy @ site.weight).mul_(x).float().view(len(x), self.count, -1).sum(-1)  # [tokens, units]
        rows = torch.stack([by_unit[i:j].sum(0) for i, j in samples.unfold(0, 2, 1).tolist()])
        self.score = rows.abs().sum(0) if self.score is None else self.score + rows.abs().sum(0)

    def importance(self) -> Tensor:
        score, self.score = self.score, None
        return self.gain.new_zeros(self.count) if score is None else score

    def ready(self) -> str:
        missing = f"{self.site_name}: StructuredPruning has pruned nothing yet; call pk.calibrate(model, batches) first"
        return missing if self.units is None else ""
