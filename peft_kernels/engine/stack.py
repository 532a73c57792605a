"""Tuners around tuners: several of one adapter at one module, and one around the span between two linears."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from .method import Changes, Tuner, overlaid, promoted
from .rows import Call, refuse_cache, same
from .site import Base, Site


class Known:
    """A base whose output for the arguments `call` is known to be `y`; others are computed anew."""

    innermost = False
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

    def __init__(self, site: Site, base: Base, h: Tensor, x: Tensor):
        self.site, self.base, self.h, self.x, self.fresh = site, base, h, x, base.fresh

    def __call__(self, x: Tensor) -> Any:
        if x is not self.x:
            raise RuntimeError(f"{self.site}: a tuner cannot change the input of a span, which has run already")
        return self.base(self.h)

    def seen(self, what: str) -> Tensor:
        return self.base.seen(what)
