"""A prompt around a text and a [MASK], whose hidden state a model with a cloze head asks for."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..engine.rows import RowBase
from ..engine.site import Base, Site, base_modules
from ..engine.taps import note, noted
from ._prompt import Prompt, crosses
from ._sequence import numbered, take
from ._spliced import SplicedTuner, ordered, spliced

LR = 1e-2
ASKED, STATE = "who asks for [MASK]", "hidden state at [MASK]"  # notes


@dataclass(frozen=True)
class Cloze(Prompt):
    """[CLS] P text P [MASK] P [SEP]: the part of WARP where the model takes embeddings."""

    length: int  # rows
    front: int  # of them between the text's first token and the others; -1: a quarter
    behind: int  # of them behind [MASK]; -1: a half
    mask_token: int
    tokens: tuple[int, ...]  # whose embeddings the first rows begin with; the others with that of [MASK]

    key, roles, kinds, lr = "cloze", ("backbone",), None, LR

    def __post_init__(self):
        super().__post_init__()
        front, between, behind = self.places
        if self.length < 1 or min(front, between, behind) < 0:
            raise ValueError(
                f"WARP length = {self.length}, front = {self.front}, behind = {self.behind}; expected a length of at "
                "least 1, of which the others are parts"
            )

    @property
    def places(self) -> tuple[int, int, int]:
        """How many rows stand before the text, between it and [MASK], and behind that."""
        front = self.length // 4 if self.front == -1 else self.front
        behind = self.length // 2 if self.behind == -1 else self.behind
        return front, self.length - front - behind, behind

    def select(self, sites: list[Site]) -> list[Site]:
        for site in sites:
            name = site.name or type(site.module).__name__
            flags = [getattr(m, "is_causal", False) for _, m in base_modules(site.module)]
            words = getattr(site.module, "get_input_embeddings", lambda: None)()
            if any(flags) or crosses(site.module) or not isinstance(words, nn.Embedding):
                raise ValueError(f"{name} reads no text in both directions, so it has no [MASK]; use PromptTuning")
            if not 0 <= self.mask_token < words.num_embeddings:
                raise ValueError(
                    f"WARP mask_token = {self.mask_token}; expected the number of [MASK] in the model's vocabulary, as "
                    "tokenizer.mask_token_id; a model without one needs PromptTuning"
                )
        return super().select(sites)


class ClozeTuner(SplicedTuner, method=Cloze):
    def __init__(self, cfg: Cloze, site: Site):
        super().__init__(cfg, site)
        words = cast(Any, site.module).get_input_embeddings().weight
        first = [*cfg.tokens[: cfg.length], *[cfg.mask_token] * (cfg.length - len(cfg.tokens))]
        self.rows = site.param(cfg.length, self.width, init=lambda t, _: t.copy_(words.detach()[first]))
        front, between, behind = cfg.places
        self.groups, self.place_of_mask = (front, between + 1 + behind), front + between
        self.mask_token, self.length = cfg.mask_token, self.length + 1  # which stands for [MASK]

    def prompt(self) -> Tensor:
        return self.rows

    def inserted(self, base: Base | RowBase, x: Tensor) -> Tensor:
        ids = torch.full((1, 1), self.mask_token, device=x.device)
        mask = base.beside(cast(Any, base.site.module).get_input_embeddings(), ids).to(x.dtype)
        p, at = self.of(x), self.place_of_mask
        return torch.cat([p[:, :at], mask.expand(len(x), 1, -1), p[:, at:]], dim=1)

    def points(self, real: Tensor) -> tuple[Tensor, Tensor]:
        """Before which rows of the text the two groups stand, [batch, 1]: the second one, and the last, [SEP]."""
        last = (torch.arange(real.shape[1], device=real.device) * real).amax(1, keepdim=True)
        return torch.minimum(real.int().argmax(1, keepdim=True) + 1, last), last

    def splice(self, base: Base | RowBase, x: Tensor, real: Tensor) -> Tensor:
        return spliced(x.shape[1], *zip(self.points(real), self.groups, strict=True))

    def positions_at(self, given: dict[str, Any], order: Tensor, real: Tensor) -> Tensor | None:
        n, own = real.shape[1], given.get("position_ids")
        own = (numbered(real, n) + self.first if own is None else own).expand(real.shape)
        moved = own + (order[:, :n] - torch.arange(n, device=own.device))
        front, last = (own.gather(1, point) for point in self.points(real))
        rows = torch.arange(self.length, device=own.device)  # the second group's place among them is behind the first
        return ordered(moved, torch.where(rows < self.groups[0], front, last) + rows, order)

    def around(self, base: Base | RowBase, module: Any, given: dict[str, Any]) -> Any:
        if noted(ASKED) is True:  # of several in a stack, the uppermost answers
            note(ASKED, self.mark)
        return super().around(base, module, given)

    def without(self, out: Any, order: Tensor, n: int) -> Any:
        short = super().without(out, order, n)
        if noted(ASKED) != self.mark:
            return short
        at = order[:, n + self.place_of_mask :][:, :1]
        note(STATE, take(out.last_hidden_state, at, 1))
        return dataclasses.replace(short, last_hidden_state=noted(STATE))  # all that a head need see
