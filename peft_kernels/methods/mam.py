"""MAM adapters: a prefix in every attention layer and a scaled adapter beside every feed-forward layer.

    attention(q, [P_k; k], [P_v; v])        y = FFN(x) + s up(relu(down(x)))

The feed-forward layer and the model's own residual additions stay.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..engine.method import Part
from ..engine.recipe import at
from ._hybrid import Placed
from .parallel import ParallelAdapter
from .prefix import PrefixTuning


@dataclass(frozen=True)
class MAM(
    Placed,
    roles=(),
    lr=2e-4,
    tiny={"length": 3, "hidden": 4, "size": 6},
    kinds=None,
    family="hybrid",
    kernel="bottleneck",
):
    """Mix-and-match adapters: prefixes and scaled parallel adapters. He et al. 2022, arXiv:2110.04366.

    Prefixes are in self-attention and cross-attention; the adapters start as LoRA does, with the up-projection zero.
    `pk.eject` drops the network that makes the prefixes. Not mergeable.
    """

    length: int = 30  # of the prefix of each attention
    hidden: int = 800  # of the network that makes the prefixes; 0: the prefixes themselves are trained
    size: int = 512  # of the adapters' bottleneck
    scale: float = 4.0  # of the adapters' output

    identity = False

    def parts(self) -> tuple[Part, ...]:
        return (
            at("attn", PrefixTuning(length=self.length, hidden=self.hidden)),
            at("ffn", ParallelAdapter(size=self.size, scale=self.scale)),
        )

    def ejected(self) -> MAM:
        return replace(self, hidden=0)
