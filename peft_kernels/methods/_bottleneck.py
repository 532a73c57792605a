"""The bottleneck of adapters: x + up(act(down(x)))."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

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
