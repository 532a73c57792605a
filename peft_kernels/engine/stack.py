"""Tuners around tuners: several of one adapter at a module, on blocks of its rows, or around a span of linears."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from .method import Changes, Tuner, overlaid, promoted
from .rows import Call, refuse_cache, same
from .site import Base, Rows, Site


class Known:
    """A base whose output for the arguments `call` is known to be `y`; others are computed anew."""

    innermost = False
    packed = None
    fresh = False  # y may be needed again

    def __init__(self, base: Base, call: Call, y: Any):
        self.site, self.base, self.call, self.y = base.site, base, call, y

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if same((args, kwargs), self.call):
            return self.y
        refuse_cache(self.site, args, kwargs, "which a second call would fill again")
        return self.base(*args, **kwargs)

    def seen(self, what: str) -> Tensor:
        return self.base.seen(what)

    def beside(self, module: nn.Module, *args: Any) -> Any:
        return self.base.beside(module, *args)

    def effective(self) -> tuple[Tensor, Tensor | None]:
        return self.base.effective()


class Stack(Tuner):
    """The tuners that the parts of one adapter put at one module, bottom first."""

    def __init__(self, tuners: dict[str, Tuner]):
        nn.Module.__init__(self)
        self.site_name = next(iter(tuners.values())).site_name
        self._modules.update(tuners)

    def members(self) -> list[Tuner]:
        return cast("list[Tuner]", list(self._modules.values()))

    @property
    def fresh(self) -> bool:  # type: ignore[override]
        return self.members()[-1].fresh

    @property
    def opaque(self) -> bool:  # type: ignore[override]
        return any(tuner.opaque for tuner in self.members())

    @property
    def mergeable(self) -> bool:
        return all(tuner.mergeable for tuner in self.members())

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        for tuner in self.members():
            base = Base(base.site, base, tuner)
        return base(*args, **kwargs)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        for tuner in self.members():
            weight, bias = tuner.fold(weight, bias)
        return weight, bias

    def folded(self, site: Site, params: dict[str, Tensor]) -> dict[str, Tensor]:
        for tuner in self.members():
            params = tuner.folded(site, {key: value.to(promoted(value.dtype)) for key, value in params.items()})
        return params

    def changes_by_rows(self) -> dict[Any, Changes]:
        return overlaid(tuner.changes_by_rows() for tuner in self.members())

    def touched(self) -> Tensor | None:
        return union(tuner.touched() for tuner in self.members())


def union(places: Iterable[Tensor | None]) -> Tensor | None:
    """Several tuners' `touched` as one."""
    found = list(places)
    known = [t for t in found if t is not None]
    return torch.cat(known).unique() if len(known) == len(found) else None


class Spanned(Tuner):
    """A tuner of a span, kept at its last linear: it sees the input of the first and the output of the last."""

    def __init__(self, site: Site, tuner: Tuner):
        nn.Module.__init__(self)
        vars(self)["site"] = site
        self.site_name = site.name
        self.tuner = tuner
        self.fresh = tuner.fresh

    site: Site

    def forward(self, base: Base, h: Tensor) -> Any:
        x = base.seen("entry")
        return self.tuner(_SpanBase(self.site, base, h, x), x)


class _SpanBase:
    """The span as a callable: everything between its linears has run already, on the input that was seen."""

    innermost = False
    packed = None

    def __init__(self, site: Site, base: Base, h: Tensor, x: Tensor):
        self.site, self.base, self.h, self.x, self.fresh = site, base, h, x, base.fresh

    def __call__(self, x: Tensor) -> Any:
        if x is not self.x:
            raise RuntimeError(f"{self.site}: a tuner cannot change the input of a span, which has run already")
        return self.base(self.h)

    def seen(self, what: str) -> Tensor:
        return self.base.seen(what)

    def beside(self, module: nn.Module, *args: Any) -> Any:
        return self.base.beside(module, *args)


class _PartBase:
    """The base of a tuner that sees some output rows of a fused linear: y was computed for all rows at once."""

    innermost = False
    packed = None
    fresh = False  # y may be a view of the fused output

    def __init__(self, site: Site, rows: Rows, base: Base, x: Tensor, y: Tensor):
        self.site, self.rows, self.base, self.x, self.y = site, rows, base, x, y

    def __call__(self, x: Tensor) -> Tensor:
        if x is self.x:
            return self.rows.of(self.y, dim=-1)
        return self.site.apply(*self.effective(), x)  # the tuner changed the input: its rows are computed anew

    def seen(self, what: str) -> Tensor:
        return self.base.seen(what)

    def beside(self, module: nn.Module, *args: Any) -> Any:
        return self.base.beside(module, *args)

    def effective(self) -> tuple[Tensor, Tensor | None]:
        weight, bias = self.base.effective()
        return self.rows.of(weight), None if bias is None else self.rows.of(bias)


class Parts(Tuner):
    """The tuners of one adapter on a fused linear, one per block of output rows (q, k, v in one matrix)."""

    fresh = True

    def __init__(self, parts: dict[str, tuple[Site, Tuner]]):
        nn.Module.__init__(self)
        self.sites = {label: site for label, (site, _) in parts.items()}
        for label, (site, tuner) in parts.items():
            self.site_name = site.name
            self._modules[label] = tuner

    def parts(self) -> Iterator[tuple[Site, Rows, Tuner]]:
        for label, site in self.sites.items():
            yield site, cast(Rows, site.rows), cast(Tuner, self._modules[label])

    @property
    def mergeable(self) -> bool:
        return all(tuner.mergeable for _, _, tuner in self.parts())

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y = base(x)
        tuned = [(rows, tuner(_PartBase(site, rows, base, x, y), x).to(y.dtype)) for site, rows, tuner in self.parts()]
        return _assemble(y, tuned, dim=-1)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        weights, biases = [], []
        for _, rows, tuner in self.parts():
            w, b = tuner.fold(rows.of(weight), None if bias is None else rows.of(bias))
            weights.append((rows, w))
            if b is not None:
                biases.append((rows, b))
        if biases and bias is None:
            bias = torch.zeros(weight.shape[0], dtype=weight.dtype, device=weight.device)
        return _assemble(weight, weights, dim=0), None if bias is None else _assemble(bias, biases, dim=0)

    def changes_by_rows(self) -> dict[Any, Changes]:
        return {rows: tuner.changes() for _, rows, tuner in self.parts()}


def _assemble(whole: Tensor, parts: list[tuple[Rows, Tensor]], dim: int) -> Tensor:
    """`whole` with the given rows along `dim` replaced, without writing into it."""
    groups = parts[0][0].groups
    if groups > 1:
        dim %= whole.dim()
        split = [(Rows(rows.start, rows.stop), part.unflatten(dim, (groups, -1))) for rows, part in parts]
        return _assemble(whole.unflatten(dim, (groups, -1)), split, dim + 1).flatten(dim, dim + 1)
    pieces, at = [], 0
    for rows, part in sorted(parts, key=lambda item: item[0]):
        if rows.start > at:
            pieces.append(whole.narrow(dim, at, rows.start - at))
        pieces.append(part)
        at = rows.stop
    if at < whole.shape[dim]:
        pieces.append(whole.narrow(dim, at, whole.shape[dim] - at))
    return torch.cat(pieces, dim=dim)
