"""UniPELT: LoRA, a prefix and an adapter, each times a gate of its own.

    q, v: W x + g B A x        attention(q, [g P_k; k], [g P_v; v])        y = o + g up(relu(down(LN(o + residual))))

o is the output of the feed-forward layer. Four gates per layer: those of LoRA at q and at v and that of the prefix read
the input of attention, that of the adapter reads o.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..engine.method import Part
from ..engine.recipe import at
from ._hybrid import Placed
from .gated import Gated
from .lora import LoRA
from .pfeiffer import Pfeiffer
from .prefix import PrefixTuning


@dataclass(frozen=True)
class UniPELT(
    Placed,
    roles=(),
    lr=1e-3,
    tiny={"rank": 2, "length": 3, "hidden": 4, "reduction_factor": 2},
    kinds=None,
    family="hybrid",
    kernel="lora bottleneck",
):
    """LoRA, prefix and Pfeiffer's adapter under learned gates. Mao et al. 2022, arXiv:2110.07577.

    A gate (see Gated) is one number per row of the batch, the mean over its text without padding; in decoders each
    position has its own. It takes the place of LoRA's alpha / rank. `pk.eject` drops the network that makes the
    prefixes: of BERT-base's 11,083,376 trained numbers 1,410,672 are left. Not mergeable.
    """

    rank: int = 8  # of LoRA at q and v
    length: int = 10  # of the prefix of each attention
    hidden: int = 512  # of the network that makes the prefixes; 0: the prefixes themselves are trained
    reduction_factor: int = 16  # of the adapter after the feed-forward layer: features / bottleneck

    identity = False

    def parts(self) -> tuple[Part, ...]:
        return (
            at(("q", "v"), Gated(LoRA(rank=self.rank, alpha=float(self.rank)))),
            at("attn", Gated(PrefixTuning(length=self.length, hidden=self.hidden))),
            at("down", Gated(Pfeiffer(reduction_factor=self.reduction_factor), reads="output")),
        )

    def ejected(self) -> UniPELT:
        return replace(self, hidden=0)
