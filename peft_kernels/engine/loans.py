"""Loans: attributes of modules that tuners put another value in the place of, for as long as they are attached."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from .method import Loan


class Absent:
    """Stands for the value of an attribute that the module itself does not have, as a method of its class."""


@dataclass
class Lent:
    """An attribute on loan: what it was, and the adapters that asked for it."""

    module: nn.Module
    name: str
    original: Any
    adapters: list[str]


def lend(lent: list[Lent], adapter: str, loans: Iterable[Loan]) -> None:
    """Puts the values in place; an attribute that is on loan already keeps the value it has."""
    for module, name, value in loans:
        held = next((one for one in lent if one.module is module and one.name == name), None)
        if held is None:
            held = Lent(module, name, vars(module).get(name, Absent), [])
            lent.append(held)
            vars(module)[name] = value
        if adapter not in held.adapters:
            held.adapters.append(adapter)


def restore(lent: list[Lent], adapters: Iterable[str]) -> None:
    """These adapters leave: an attribute that no other asked for gets its value back."""
    for held in list(lent):
        held.adapters = [name for name in held.adapters if name not in adapters]
        if not held.adapters:
            if held.original is Absent:
                del vars(held.module)[held.name]
            else:
                vars(held.module)[held.name] = held.original
            lent.remove(held)
