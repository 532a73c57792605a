"""Fields with another value at some sites: dicts from a role or a glob to the value there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from ..engine.method import Method
from ..engine.site import Site


class Ranked(Method):
    """A method of low rank, whose rank and alpha patterns may change at some sites."""

    rank: int
    alpha: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]

    def __post_init__(self):
        super().__post_init__()
        for where, rank in {"rank": self.rank, **self.rank_pattern}.items():
            if rank < 1:
                raise ValueError(f"{type(self).__name__} {where} = {rank}; expected at least 1")

    def select(self, sites: list[Site]) -> list[Site]:
        sites = super().select(sites)
        for key in (*self.rank_pattern, *self.alpha_pattern):
            if sites and not any(site.matches((key,)) for site in sites):
                raise ValueError(
                    f"{type(self).__name__} pattern {key!r} matches none of the targets; "
                    "give one of their roles or a glob"
                )
        return sites

    def at(self, site: Site) -> Method:
        rank, alpha = _last(self.rank_pattern, site, self.rank), _last(self.alpha_pattern, site, self.alpha)
        return replace(cast(Any, self), rank=rank, alpha=alpha)


def _last(pattern: Mapping[str, Any], site: Site, default: Any) -> Any:
    """The value of the last pattern that matches the site."""
    return next((v for k, v in reversed(list(pattern.items())) if site.matches((k,))), default)
