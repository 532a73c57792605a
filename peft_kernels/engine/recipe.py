"""Recipes: methods that are made of other methods, each at its own targets."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from .method import Method, Part, numbers, words


def at(
    targets: Sequence[str] | str,
    method: Method,
    *,
    exclude: Iterable[str] = (),
    layers: Sequence[int] | int | None = None,
) -> Part:
    """`method` at roles or globs of its own, as a part of a recipe: pk.Union(pk.at("q", pk.LoRA()), pk.IA3())."""
    return Part(_method(method), words(targets), words(exclude), numbers(layers))


class Recipe(Method):
    """A method made of parts: write `parts`, and all of them are attached under one adapter name."""

    def parts(self) -> tuple[Part, ...]:
        """The parts, bottom first where several meet at one module. Empty targets are the part's own."""
        raise NotImplementedError(f"{type(self).__name__} does not say its parts")

    def made_of(self) -> set[type[Method]]:
        """The methods of the parts; to be written where `parts` asks for a model."""
        return {type(part.method) for part in self.parts()}

    def expand(self, part: Part) -> list[Part]:
        """Every part under the targets, excludes and layers given at attach; what a part says itself comes first."""
        return [inner for own in self.placed(part) for inner in own.method.expand(own)]

    def placed(self, part: Part) -> list[Part]:
        """`parts`, each at the targets and in the layers that it is attached to."""
        return [under(part, own) for own in self.parts()]


def under(part: Part, own: Part) -> Part:
    """A part of the recipe that is attached as `part`, with what it does not say itself from there."""
    return dataclasses.replace(
        own,
        targets=own.targets or part.targets or own.method.roles,
        exclude=(*own.exclude, *part.exclude),
        layers=part.layers if own.layers is None else own.layers,
        lines=own.lines or part.lines,
    )


def as_parts(given: Iterable[Method | Part]) -> tuple[Part, ...]:
    """Methods and parts as parts; ValueError for anything else and for none at all."""
    parts = tuple(item if isinstance(item, Part) else Part(_method(item)) for item in given)
    if not parts:
        raise ValueError("a recipe of nothing; expected methods such as pk.LoRA(), or pk.at(targets, method)")
    return parts


def _method(value: object) -> Method:
    if not isinstance(value, Method):
        raise ValueError(f"a recipe got {value!r}; expected a method instance such as pk.LoRA(rank=8)")
    return value
