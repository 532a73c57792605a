"""The bottleneck of adapters: res + scale * up(act(down(x)))."""

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


def bottleneck(
    x: Tensor,
    down: Callable[[Tensor], Tensor],
    up: Callable[[Tensor], Tensor],
    activation: str,
    *,
    res: Tensor | None = None,
    scale: float | Tensor = 1.0,
) -> Tensor:
    """res + scale * up(act(down(x))).   x [..., d], res the same, None being x   down: d -> m   up: m -> d"""
    y = up(ACTIVATIONS[activation](down(x)))
    y = y if isinstance(scale, float) and scale == 1.0 else y * scale
    return (x if res is None else res) + y
