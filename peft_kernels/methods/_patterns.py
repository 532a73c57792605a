"""Fields with another value at some sites: dicts from a role or a glob to the value there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..engine.method import Method
from ..engine.site import Site


def applied(pattern: Mapping[str, Any], site: Site, default: Any) -> Any:
    """The value of the last pattern that matches the site."""
    return next((v for k, v in reversed(list(pattern.items())) if site.matches((k,))), default)


def refuse_idle(method: Method, sites: list[Site], *patterns: Mapping[str, Any]) -> None:
    """ValueError for a pattern that matches none of the sites, if there are any."""
    for pattern in patterns:
        for key in pattern:
            if sites and not any(s.matches((key,)) for s in sites):
                name = type(method).__name__
                raise ValueError(
                    f"{name} pattern {key!r} matches none of the targets; give one of their roles or a glob"
                )
