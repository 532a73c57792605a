"""Prompt tuning: learned rows in front of the embeddings of the tokens. Lester et al. 2021, arXiv:2104.08691."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from ..engine.site import Site
from ._prompt import Prompt, PromptTuner

INITS = ("random", "vocabulary", "text", "labels")
_FIRST, _LAST = 3, 5002  # the commonest tokens of a vocabulary by frequency, without its special ones


@dataclass(frozen=True)
class PromptTuning(
    Prompt, roles=("backbone",), lr=0.03, tiny={"length": 3}, family="additive", key="prompt", kinds=("module",)
):
    """Learned rows in front of the tokens' embeddings. Lester et al. 2021, arXiv:2104.08691.

    The rows are seen by the model alone: outputs, labels, masks and positions are those of the text. In an
    encoder-decoder model they are in front of the encoder's text, and the decoder attends to them; in a model of images
    behind the patches. A key-value cache holds them from its first call on. `peft-kernels tune` finds the tokens of
    `text` and of the names of the classes.
    """

    length: int = 20  # rows
    init: str = "random"  # from U(-.5, .5); vocabulary: tokens' rows; text: those of `tokens`; labels: see `classes`
    text: str = ""  # of which `tune` takes `tokens`
    tokens: tuple[int, ...] = ()  # for init = "text": repeated until there are enough
    classes: tuple[tuple[int, ...], ...] = ()  # for init = "labels": the tokens of each class, whose rows are averaged
    subspace: int = 0  # k numbers z to train, the rows being a random projection of these, from the start; 0: the rows

    def __post_init__(self):
        object.__setattr__(self, "classes", tuple(tuple(ids) for ids in self.classes))
        super().__post_init__()
        if self.length < 1 or self.subspace < 0:
            raise ValueError(f"prompt length = {self.length}, subspace = {self.subspace}; expected at least 1 and 0")
        if self.init not in INITS:
            raise ValueError(f"prompt init = {self.init!r}; expected one of {', '.join(INITS)}")

    def spelled(self, encode: Callable[[str], list[int]], names: Sequence[str]) -> PromptTuning:
        if self.init == "text" and self.text and not self.tokens:
            return replace(self, tokens=tuple(encode(self.text)))
        if self.init == "labels" and not self.classes:
            return replace(self, classes=tuple(tuple(encode(name)) for name in names))
        return self


class PromptTuningTuner(PromptTuner, method=PromptTuning):
    """rows [length, width], or z [subspace] with two tensors that follow from the seed."""

    rows: Tensor
    onto: Tensor

    def __init__(self, cfg: PromptTuning, site: Site):
        super().__init__(cfg, site)
        shape = (self.length, self.width)
        rows = site.param(*shape, init=_random if cfg.init == "random" else lambda t, g: t.copy_(_known(cfg, site, g)))
        self.z = None
        if not cfg.subspace:
            self.rows = rows
            return
        self.register_buffer("rows", rows.detach(), persistent=False)
        onto = site.param(
            *shape, cfg.subspace, init=lambda t, g: t.normal_(0, 1 / math.sqrt(cfg.subspace), generator=g)
        )
        self.register_buffer("onto", onto.detach(), persistent=False)
        self.z = site.param(cfg.subspace)

    def prompt(self) -> Tensor:
        return self.rows if self.z is None else self.rows + self.onto @ self.z


def _random(t: Tensor, generator: torch.Generator) -> Tensor:
    return t.uniform_(-0.5, 0.5, generator=generator)


def _known(cfg: PromptTuning, site: Site, generator: torch.Generator) -> Tensor:
    """Rows [length, width] made of those of tokens."""
    embedding = cast(Any, site.module).get_input_embeddings()
    if not hasattr(embedding, "num_embeddings"):
        raise ValueError(f"prompt init = {cfg.init!r}; {site.name} has no vocabulary, so use random")

    def rows(ids: Sequence[int]) -> Tensor:
        if bad := [i for i in ids if not 0 <= i < embedding.num_embeddings]:
            raise ValueError(f"prompt token {bad[0]}; expected numbers below {embedding.num_embeddings}")
        with torch.no_grad():  # called, as some scale its rows
            return embedding(torch.tensor([ids], dtype=torch.int64, device=embedding.weight.device))[0].float().cpu()

    def some(count: int) -> Tensor:
        last = min(_LAST + 1, embedding.num_embeddings)
        drawn = torch.randperm(last - _FIRST, generator=generator) + _FIRST
        return rows([int(drawn[i % len(drawn)]) for i in range(count)])

    if cfg.init == "vocabulary":
        return some(cfg.length)
    if cfg.init == "text":
        if not cfg.tokens:
            raise ValueError('prompt init = "text" needs the tokens of one: tokens=(...), or in tune --set text="..."')
        return rows([cfg.tokens[i % len(cfg.tokens)] for i in range(cfg.length)])
    if not cfg.classes or not all(cfg.classes):
        raise ValueError('prompt init = "labels" needs the tokens of each class: classes=((...), ...), or tune')
    means = [rows(ids).mean(0, keepdim=True) for ids in cfg.classes[: cfg.length]]
    return torch.cat([*means, some(cfg.length - len(means))])
