"""Top layers: the last blocks are trained whole, the blocks below them not at all."""

from __future__ import annotations

from dataclasses import dataclass

from ..engine.method import Method, Replica
from ..engine.site import Site


@dataclass(frozen=True)
class TopLayers(Method, roles=("block",), lr=2e-4, tiny={"n": 1}, kinds=None, family="selective"):
    """The last n blocks are trained whole; no gradient is computed below them.

    The last in model order, so those of the decoder in an encoder-decoder model. ValueError at attach where the
    targets are fewer than n.
    """

    n: int = 2  # blocks

    def __post_init__(self):
        super().__post_init__()
        if self.n < 1:
            raise ValueError(f"TopLayers n = {self.n}; expected at least 1")

    def select(self, sites: list[Site]) -> list[Site]:
        if self.n > len(sites):
            raise ValueError(f"TopLayers n = {self.n}; the targets are {len(sites)} blocks, give at most that")
        return sites[-self.n :]


class TopLayersTuner(Replica, method=TopLayers):
    """The trainable copy of one block."""
