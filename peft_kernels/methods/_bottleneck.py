"""The bottleneck of adapters: y = residual + scale * (act(x Wd^T + bd) Wu^T + bu), and the fields of their methods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..engine.method import Method
from ..engine.site import Site
from ._rng import seeds

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "leaky_relu": F.leaky_relu,
    "identity": lambda x: x,
}


def check_activation(method: str, activation: str) -> None:
    """ValueError for a word that is none of ACTIVATIONS."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"{method} activation = {activation!r}; expected one of {', '.join(ACTIVATIONS)}")


def bottleneck(x: Tensor, down: Callable[[Tensor], Tensor], up: Callable[[Tensor], Tensor], activation: str) -> Tensor:
    """x + up(act(down(x))).   x [..., d]   down: d -> m   up: m -> d"""
    return x + up(ACTIVATIONS[activation](down(x)))


# -- adapters with two full projections -------------------------------------------------------------------------------


def _truncated(tensor: Tensor, generator: torch.Generator) -> None:
    nn.init.trunc_normal_(tensor, std=0.01, a=-0.02, b=0.02, generator=generator)


def _bert(tensor: Tensor, generator: torch.Generator) -> None:
    tensor.normal_(0.0, 0.02, generator=generator)


# What the two weights start from; biases start from zero.
INITS: dict[str, tuple[Any, Any]] = {
    "zero": ("kaiming", "zeros"),
    "normal": (_truncated, _truncated),
    "bert": (_bert, _bert),
}


@dataclass(frozen=True)
class Bottlenecked(Method):
    """A method that puts a bottleneck somewhere."""

    reduction_factor: int = 16  # features / bottleneck
    size: int = 0  # of the bottleneck; 0: features // reduction_factor
    activation: str = "relu"  # relu, gelu, gelu_tanh, silu (or swish, the same), tanh, leaky_relu, identity
    # "zero": up-projection zero, so that the model starts as it was; "normal": both N(0, 0.01^2) within two standard
    # deviations, the paper's near-identity; "bert": both N(0, 0.02^2)
    init: str = "zero"
    dropout: float = 0.0  # of the activations in the bottleneck

    def __post_init__(self):
        super().__post_init__()
        name = type(self).__name__
        if self.activation == "swish":
            object.__setattr__(self, "activation", "silu")
        check_activation(name, self.activation)
        if self.init not in INITS:
            raise ValueError(f"{name} init = {self.init!r}; expected one of {', '.join(INITS)}")
        if self.reduction_factor < 1 or self.size < 0:
            raise ValueError(
                f"{name} reduction_factor = {self.reduction_factor}, size = {self.size}; expected at least 1 and 0"
            )
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"{name} dropout = {self.dropout}; expected a probability from 0 to 1")


class Bottleneck(nn.Module):
    """The two projections of an adapter at a site, from and to its output features unless `n_in` says otherwise."""

    def __init__(self, cfg: Bottlenecked, site: Site, n_in: int = 0):
        super().__init__()
        n_in, n_out = n_in or site.n_out, site.n_out
        m = cfg.size or max(1, n_in // cfg.reduction_factor)
        down, up = INITS[cfg.init]
        self.down_weight = site.param(m, n_in, init=down)
        self.down_bias = site.param(m)
        self.up_weight = site.param(n_out, m, init=up)
        self.up_bias = site.param(n_out)
        self.activation, self.dropout = cfg.activation, cfg.dropout

    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(down-projection, its bias, up-projection, its bias) of a call."""
        return self.down_weight, self.down_bias, self.up_weight, self.up_bias

    def forward(self, x: Tensor, residual: Tensor | None = None, *, fresh: bool = False, **how: Any) -> Tensor:
        """residual, by default x, + what the bottleneck makes of x.   x [..., n_in]   residual [..., n_out]

        fresh: residual may be written into.   how: scale, ln, gate, mask, expert of `ops.bottleneck`.
        """
        how["act"] = self.activation
        if self.training and self.dropout:
            how |= {"p": self.dropout, "rng": seeds(x)}
        if residual is not None and fresh:
            return ops.bottleneck_(residual, x, *self.weights(), **how)
        return ops.bottleneck(x, *self.weights(), residual=residual, **how)

    def extra_repr(self) -> str:
        m, n_in = self.down_weight.shape[-2:]
        return f"{n_in}, {m}, {self.up_weight.shape[-2]}, {self.activation}"
