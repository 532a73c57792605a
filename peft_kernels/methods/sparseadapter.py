"""SparseAdapter: adapters of whose projections only the best numbers exist, chosen once before training.

    w = M * w0      M keeps the largest scores z

    random      z from N(0, 1)
    erk         as random, of a weight [a, b] the part e (a + b) / (a b), at most 1. Evci et al. 2020, arXiv:1911.11134
    magnitude   z = |w|
    snip        z = |w g|        g = dL/dw. Lee et al. 2019, arXiv:1810.02340
    grasp       z = w (H g)      H the Hessian of L in the weights of all adapters. Wang et al. 2020, arXiv:2002.07376
    synflow     z = |w dR/dw|    R the sum of |Wu| |Wd| 1 of each adapter. Tanaka et al. 2020, arXiv:2006.05467

e is what makes the parts together keep_ratio; adapters of one size all get keep_ratio. synflow prunes in rounds, after
the n-th of which keep_ratio^(n / rounds) is left; the other scores do not change from round to round, or are those of
one shot. L is the mean loss of the rows that `pk.calibrate` reads. Biases are dense.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from math import prod
from typing import Any, cast

from torch import Tensor, nn

from ..engine.method import Method, Part, Stats, Tuner, fields
from ..engine.site import Base, Site
from ._bottleneck import Bottleneck, Bottlenecked
from ._select import FREE, best, erk, kept
from ._sparse_bottleneck import Projection, SparseBottleneck
from .houlsby import Houlsby
from .parallel import ParallelAdapter
from .pfeiffer import Pfeiffer

PLACEMENTS: dict[str, type[Bottlenecked]] = {"pfeiffer": Pfeiffer, "houlsby": Houlsby, "parallel": ParallelAdapter}
SCORES = ("random", "erk", "magnitude", "snip", "grasp", "synflow")
_KINDS = ("linear", "span", "module")
_TINY = {"reduction_factor": 2, "placement": "houlsby", "activation": "gelu"}


@dataclass(frozen=True)
class SparseAdapter(
    Bottlenecked, roles=("down",), lr=1e-3, tiny=_TINY, kinds=_KINDS, family="hybrid", kernel="bottleneck sparse"
):
    """Adapters of which only the best numbers exist. He et al. 2022, arXiv:2210.04284.

    snip and grasp need `pk.calibrate(model, batches)`, which `tune` calls by itself; the other scores prune as soon as
    the method is attached. Afterwards only what is kept is held, trained and saved, with a bit per number for where.
    Except for random and erk a number's score is a multiple of it, so an up-projection of zeros will not do and the
    model does not start as it was. Not mergeable.
    """

    identity = False

    init: str = "bert"  # both projections N(0, 0.02^2); or "normal"; "zero" for random and erk alone
    placement: str = "pfeiffer"  # or houlsby, parallel: where the adapters sit, as those methods say
    keep_ratio: float = 0.6  # the part of the projections' numbers that is kept
    score: str = "snip"  # or random, erk, magnitude, grasp, synflow
    scope: str = "global"  # that part of all projections together; or "tensor": of each. erk decides that itself
    rounds: int = 100  # of synflow
    samples: int = 256  # rows of the training data that calibration reads

    def __post_init__(self):
        super().__post_init__()
        words = {"placement": tuple(PLACEMENTS), "score": SCORES, "scope": ("global", "tensor")}
        for name, known in words.items():
            if getattr(self, name) not in known:
                raise ValueError(f"SparseAdapter {name} = {getattr(self, name)!r}; expected one of {', '.join(known)}")
        if not 0 < self.keep_ratio <= 1:
            raise ValueError(f"SparseAdapter keep_ratio = {self.keep_ratio}; expected more than 0 and at most 1")
        if self.rounds < 1 or self.samples < 1:
            raise ValueError(f"SparseAdapter rounds = {self.rounds}, samples = {self.samples}; expected at least 1")
        if self.init == "zero" and self.score not in ("random", "erk"):
            raise ValueError(
                f"SparseAdapter init = 'zero' with score = {self.score!r}, which is 0 where a number is; "
                "give init='bert', or score='random'"
            )
        object.__setattr__(self, "roles", PLACEMENTS[self.placement].roles)

    @classmethod
    def large(cls, factor: int, **fields: Any) -> SparseAdapter:
        """Large-Sparse: bottlenecks `factor` times as wide of which 1 / factor is kept, so no more weights.

        fields: those of the method but keep_ratio; size or reduction_factor are the plain adapter's.
        """
        plain = cls(**fields, keep_ratio=1 / factor)
        if plain.size:
            return replace(plain, size=plain.size * factor)
        if plain.reduction_factor % factor:
            raise ValueError(
                f"SparseAdapter.large({factor}) with reduction_factor = {plain.reduction_factor}; "
                f"expected a multiple of {factor}, or give size"
            )
        return replace(plain, reduction_factor=plain.reduction_factor // factor)

    @property
    def inner(self) -> Bottlenecked:
        """The dense method."""
        return PLACEMENTS[self.placement](**{f.name: getattr(self, f.name) for f in fields(Bottlenecked)})

    @property
    def measured(self) -> bool:
        """Whether the scores are of the training data."""
        return self.score in ("snip", "grasp")

    @property
    def curvature(self) -> bool:
        return self.score == "grasp"

    def expand(self, part: Part) -> list[Part]:
        own, *others = self.inner.expand(replace(part, method=self.inner))
        return [replace(own, method=self), *others]

    def select(self, sites: list[Site]) -> list[Site]:
        return self.inner.select(sites)

    def at(self, site: Site) -> Method:
        self.inner.at(site)
        return self

    def attached(self, tuners: list[Tuner]) -> None:
        own = cast("list[SparseAdapterTuner]", tuners)
        weights = [w for t in own for w in t.projections]
        if any(w.bits.is_meta for w in weights):
            for w, k in zip(weights, self.numbers([w.shape for w in weights], self.keep_ratio), strict=True):
                w.values = nn.Parameter(w.values.new_empty(k))
        elif not self.measured:
            self.prune(own, SparseAdapterTuner.scores)

    def calibrate(self, measured: list[tuple[Tuner, Stats]], beside: int) -> None:
        found: dict[Tuner, list[Tensor]] = {}
        for tuner, stats in measured:
            slopes = (stats.curved if self.curvature else stats.grad).values()
            weights = cast(SparseAdapterTuner, tuner).projections
            products = [w.values.detach() * slope for w, slope in zip(weights, slopes, strict=True)]
            found[tuner] = products if self.curvature else [p.abs() for p in products]
        self.prune(cast("list[SparseAdapterTuner]", [*found]), found.__getitem__)

    def prune(self, tuners: list[SparseAdapterTuner], scores: Callable[[SparseAdapterTuner], list[Tensor]]) -> None:
        """Keeps the numbers of the highest scores, and forgets the others."""
        weights, rounds = [w for t in tuners for w in t.projections], self.rounds if self.score == "synflow" else 1
        for n in range(1, rounds + 1):
            found = [s for t in tuners for s in scores(t)]
            ratio = self.keep_ratio ** (n / rounds)
            for w, positions in zip(weights, self.best(found, ratio), strict=True):
                w.mask = w.at(positions)
        for w in weights:
            w.values = w.settled(w.values)
        for tuner in tuners:
            tuner.drawn = []

    def best(self, scores: Sequence[Tensor], ratio: float) -> list[Tensor]:
        """For each weight the flat positions of what is kept."""
        if self.scope == "global" and self.score != "erk":
            return best(scores, kept(sum(s.numel() for s in scores), ratio, FREE))
        numbers = self.numbers([s.shape for s in scores], ratio)
        return [best([s], k)[0] for s, k in zip(scores, numbers, strict=True)]

    def numbers(self, shapes: Sequence[Sequence[int]], ratio: float) -> list[int]:
        """How many numbers of each weight are kept; in a choice over all weights, as if it were even."""
        sizes = [prod(shape) for shape in shapes]
        if self.scope == "global" and self.score != "erk":
            return [b - a for a, b in pairwise([0, *(round(ratio * n) for n in accumulate(sizes))])]
        parts = erk(shapes, ratio) if self.score == "erk" else [ratio] * len(sizes)
        return [kept(n, part, FREE) for n, part in zip(sizes, parts, strict=True)]


class SparseAdapterTuner(Tuner, method=SparseAdapter):
    cfg: SparseAdapter
    drawn: list[Tensor]  # scores that were drawn, until they have chosen

    def __init__(self, cfg: SparseAdapter, site: Site):
        super().__init__(cfg, site)
        self.inner = cfg.inner.tuner(cfg.inner, site)
        self.inner.adapter = SparseBottleneck(cast(Bottleneck, self.inner.adapter))
        self.fresh = self.inner.fresh
        shapes = [w.shape for w in self.projections] if cfg.score in ("random", "erk") else []
        self.drawn = [site.param(*shape, init=lambda t, made: t.normal_(generator=made)).detach() for shape in shapes]

    @property
    def projections(self) -> tuple[Projection, Projection]:
        adapter = cast(SparseBottleneck, self.inner.adapter)
        return adapter.down, adapter.up

    def forward(self, base: Base, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.inner(base, x, *args, **kwargs)

    def scores(self) -> list[Tensor]:
        """Of the two weights, where no data is needed for them."""
        if self.drawn:
            return self.drawn
        if self.cfg.score == "synflow":
            return cast(SparseBottleneck, self.inner.adapter).flows()
        return [w.values.detach().abs() for w in self.projections]

    def watched(self, site: Site) -> dict[str, Tensor]:
        if not self.cfg.measured or any(w.chosen for w in self.projections):
            return {}
        return dict(zip(("down", "up"), (w.values for w in self.projections), strict=True))

    def ready(self) -> str:
        if all(w.chosen for w in self.projections):
            return ""
        return f"{self.site_name}: SparseAdapter is not pruned yet; call pk.calibrate(model, batches) first"

    def reshape(self, values: dict[str, Tensor]) -> None:
        for name, w in zip(("down", "up"), self.projections, strict=True):
            bits, own = (values.get(f"inner.adapter.{name}.{key}") for key in ("bits", "values"))
            if bits is not None and own is not None and bits.shape == w.bits.shape:
                w.values = w.fitting(f"{name}.values", w.values, bits, own)
