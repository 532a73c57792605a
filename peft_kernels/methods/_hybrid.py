"""Recipes that say where each of their parts sits."""

from __future__ import annotations

from dataclasses import replace

from ..engine.method import Part
from ..engine.recipe import Recipe


class Placed(Recipe):
    """A recipe with a learning rate and targets of its own: `pk.attach` may leave out modules and layers, no more."""

    def expand(self, part: Part) -> list[Part]:
        if part.targets:
            name = type(self).__name__
            raise ValueError(
                f"{name} puts each of its parts in a place of its own, and got targets {part.targets}; give exclude "
                "or layers, or write pk.Union(pk.at(targets, method), ...)"
            )
        return [replace(own, lr=self.lr) for own in super().expand(part)]
