"""The ladder of LST: where a side network meets its backbone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..engine.site import Site
from ..engine.taps import seen

STATES = "encoder_hidden_states"


class Rung(nn.Module):
    """A block of the side stack, on s mixed with what the ladder brings: the input of the first block, and h_i."""

    def __init__(self, block: nn.Module, down: nn.Linear, gate: nn.Parameter, temperature: float, keys: tuple):
        super().__init__()
        self.block, self.down, self.gate, self.temperature, self.keys = block, down, gate, temperature, keys

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """None: so transformers looks for the blocks whose hidden states it is to return, the backbone's alone."""
        return iter(())

    def children(self) -> Iterator[nn.Module]:
        return (module for module in self._modules.values() if module is not None)

    def forward(self, s: Tensor, *args: Any, **kwargs: Any) -> Any:
        *start, hidden = map(seen, self.keys)  # the first rung begins the side stream
        s = torch.lerp(self.down(hidden), start[0] if start else s, torch.sigmoid(self.gate / self.temperature))
        args = tuple(_like(s, value) for value in args)  # masks, in the dtype of the backbone
        return self.block(s, *args, **{key: _like(s, value) for key, value in kwargs.items()})


def _like(s: Tensor, value: Any) -> Any:
    return value.to(s.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def linear(site: Site, n_in: int, n_out: int) -> nn.Linear:
    """A trainable linear layer: weight uniform within 1/sqrt(n_in), bias 0."""
    made = nn.Linear(n_in, n_out, device="meta")
    made.weight, made.bias = site.param(n_out, n_in, init="kaiming"), site.param(n_out)
    return made


class Joined:
    """A base whose encoder states lose all but the first `cut` features, and whose output gets `more` zeros.

    So that all rows of a batch may have the features of the sides that some of them have.
    """

    innermost = False
    packed = None
    fresh = False

    def __init__(self, base: Any, names: tuple[str, ...], cut: int, more: int = 0):
        self.base, self.site, self.names, self.cut, self.more = base, base.site, names, cut, more

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        if self.cut and given.get(STATES) is not None:
            given[STATES] = given[STATES][..., : self.cut]
        out = self.base(**given)
        return with_last(out, F.pad(first(out), (0, self.more))) if self.more else out

    def seen(self, what: str) -> Tensor:
        return self.base.seen(what)


def first(out: Any) -> Tensor:
    return out[0] if isinstance(out, (tuple, Mapping)) else out


def with_last(out: Any, last: Tensor, **others: Tensor) -> Any:
    """A stack's output with another last hidden state."""
    if isinstance(out, Mapping):
        return dataclasses.replace(cast(Any, out), last_hidden_state=last, **others)
    return (last, *out[1:]) if isinstance(out, tuple) else last
