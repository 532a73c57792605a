"""Prompts whose rows stand inside the text, in each row of a batch at places of its own.

order [batch, n + l]: where the n rows of the text, then the l of P, stand in the longer sequence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..engine.rows import RowBase
from ..engine.site import Base
from ._prompt import PromptTuner
from ._sequence import CACHE, shortened


def spliced(n: int, *groups: tuple[Tensor, int]) -> Tensor:
    """order, from groups (before which row of the text [batch, 1], how many rows of P), in their order."""
    text = torch.arange(n, device=groups[0][0].device)
    where, inserted, before = text.expand(len(groups[0][0]), n), [], 0
    for point, count in groups:
        where = where + count * (text >= point)
        inserted.append(point + before + torch.arange(count, device=point.device))
        before += count
    return torch.cat([where, *inserted], dim=1)


def ordered(text: Tensor, own: Tensor, order: Tensor) -> Tensor:
    """The longer sequence of what the text has [batch or 1, n, ...] and what P has [batch or 1, l, ...]."""
    both = torch.cat([t.expand(len(order), *t.shape[1:]) for t in (text, own.to(text.dtype))], dim=1)
    index = order.view(*order.shape, *[1] * (both.dim() - 2)).expand_as(both)
    return torch.empty_like(both).scatter(1, index, both)


class SplicedTuner(PromptTuner):
    """A prompt whose `splice` says where its rows stand."""

    def splice(self, base: Base | RowBase, x: Tensor, real: Tensor) -> Tensor:
        """order, for the embeddings x [batch, n, width]; real [batch, n] bool: which rows are no padding."""
        raise NotImplementedError

    def kept(self, order: Tensor, n: int) -> Tensor:
        """[batch, n]: the rows of the longer sequence whose output is that of the text's."""
        return order[:, :n]

    def positions_at(self, given: dict[str, Any], order: Tensor, real: Tensor) -> Tensor | None:
        """Positions [batch, n + l]; None: as the module gives them itself."""
        raise NotImplementedError

    def inserted(self, base: Base | RowBase, x: Tensor) -> Tensor:
        """P [batch, length, width], whose rows stand between those of x."""
        return self.of(x)

    def around(self, base: Base | RowBase, module: Any, given: dict[str, Any]) -> Any:
        x, mask = self.embedded(base, module, given), two_dimensional(self, given.get("attention_mask"))
        n, real = x.shape[1], x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask != 0
        order = self.splice(base, x, real)
        if "position_ids" in self.names:
            given["position_ids"] = self.positions_at(given, order, real)
        if mask is not None:
            given["attention_mask"] = ordered(mask, mask.new_ones(1, self.length), order)
        if (types := given.get("token_type_ids")) is not None:
            given["token_type_ids"] = ordered(types, types.new_zeros(1, self.length), order)
        given |= {"input_ids": None, "inputs_embeds": ordered(x, self.inserted(base, x), order)}
        out = base(**given)
        self.remember(out.get(CACHE) if given.get(CACHE) is None else given[CACHE], order, n)
        return self.without(out, order, n)

    def without(self, out: Any, order: Tensor, n: int) -> Any:
        """The output for the text's n rows."""
        return shortened(out, self.kept(order, n), order[:, :n], None)

    def remember(self, cache: Any, order: Tensor, n: int) -> None:
        """Where P stands is written beside a key-value cache, if there is one."""


def two_dimensional(tuner: PromptTuner, mask: Any) -> Tensor | None:
    """The mask [batch, keys], or None; ValueError for another."""
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"{tuner.cfg.key} got the attention mask {shape}; expected [batch, keys], and no static cache")
    return mask
