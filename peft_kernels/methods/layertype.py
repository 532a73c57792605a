"""Layer types: every module of some types is trained whole, such as all LayerNorms or all cross-attentions."""

from __future__ import annotations

from dataclasses import dataclass

from ..engine.method import Method, Replica


@dataclass(frozen=True)
class LayerType(Method, roles=("norm",), lr=1e-3, tiny={}, kinds=None, family="selective"):
    """Every module of given types is trained whole: LayerNorm only (Qi et al. 2022, arXiv:2211.08682), cross-attention.

    types=("cross.attn",) is Gheini et al. 2021, arXiv:2104.08771. The types are this method's default targets, so
    `targets=` given to attach, such as some of the modules of a type, takes their place. A copy of a tied weight (an
    embedding that is the output layer too) is trained apart from the original, as it is in Head; merge refuses it.
    """

    types: tuple[str, ...] = ("norm",)  # roles, or globs over module paths

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "roles", self.types)


class LayerTypeTuner(Replica, method=LayerType):
    """The trainable copy of one module."""
