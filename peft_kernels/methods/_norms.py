"""LayerNorms trained beside adapters, and where adapters sit that are after attention and feed-forward."""

from __future__ import annotations

from dataclasses import replace

from ..engine.method import Method, Part
from ..engine.site import Site
from .layertype import LayerType


class Norms(LayerType):
    """The LayerNorms of any model, at the learning rate of the method that they are trained beside."""

    beside: Method

    def __init__(self, beside: Method):
        super().__init__()
        vars(self).update(beside=beside, lr=beside.lr)  # past the frozen dataclass

    def select(self, sites: list[Site]) -> list[Site]:
        norms = [site for site in sites if site.kind == "norm"]
        if not norms:
            name = type(self.beside).__name__
            raise ValueError(f"{name} norms = True, but no target layer has a LayerNorm; pass norms=False")
        return norms


def with_norms(part: Part, norms: bool) -> list[Part]:
    """`part` without cross-attention unless its targets name it, and with norms=True the LayerNorms of its layers."""
    cross = ("cross.o",) if part.targets in ((), part.method.roles) else ()
    own = replace(part, exclude=(*cross, *part.exclude))
    return [own, Part(Norms(part.method), ("*",), part.exclude, part.layers)] if norms else [own]
