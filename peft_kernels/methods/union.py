"""Union and ByLayer: several methods as one adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from ..engine.method import Method, Part, numbers
from ..engine.recipe import Recipe, as_parts, under
from .ia3 import IA3
from .lora import LoRA


@dataclass(frozen=True, init=False)
class Union(Recipe, roles=(), lr=2e-3, tiny={"members": (LoRA(rank=2), IA3())}, kinds=None, family="hybrid"):
    """Several methods as one adapter: pk.Union(pk.LoRA(), pk.IA3()). Where they meet they stack in this order.

    A member is a method, at its own targets or those given to attach, or pk.at(targets, method, layers=...).
    """

    members: tuple[Part, ...]

    def __init__(self, *given: Method | Part, members: Iterable[Method | Part] = ()):
        object.__setattr__(self, "members", as_parts((*given, *members)))

    def parts(self) -> tuple[Part, ...]:
        return self.members

    def _each(self, change: Callable[[Part], Method]) -> Method:
        return replace(self, members=tuple(replace(own, method=change(own)) for own in self.members))

    def ejected(self) -> Method:
        return self._each(lambda own: own.method.ejected())

    def solved(self, model: nn.Module, part: Part) -> Method:
        return self._each(lambda own: own.method.solved(model, under(part, own)))

    def spelled(self, encode: Callable[[str], list[int]], names: Sequence[str]) -> Method:
        return self._each(lambda own: own.method.spelled(encode, names))


@dataclass(frozen=True, init=False)
class ByLayer(Union, roles=(), lr=2e-3, tiny={"layers": {0: LoRA(rank=2), 1: IA3()}}, kinds=None, family="hybrid"):
    """Another method for each layer: pk.ByLayer({(0, 1): pk.LoRA(rank=4), -1: pk.IA3()})."""

    def __init__(
        self,
        layers: Mapping[int | tuple[int, ...], Method | Part] | None = None,
        *,
        members: Iterable[Method | Part] = (),
    ):
        chosen = layers or {}
        given = (
            [replace(part, layers=numbers(key)) for key, part in zip(chosen, as_parts(chosen.values()), strict=True)]
            if chosen
            else []
        )
        super().__init__(*given, members=members)
