"""User-facing checks of the contracts."""

from __future__ import annotations

from collections.abc import Callable


def check(good: bool, op: str, message: Callable[[], str]) -> None:
    """ValueError "op: message" unless `good`; the message is built only when it is needed."""
    if not good:
        raise ValueError(f"{op}: {message()}")
