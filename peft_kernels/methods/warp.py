"""WARP: a prompt around the text and a [MASK], at which class embeddings are compared with what the model would write.

h = model([CLS] P text P [MASK] P [SEP]) at [MASK]          P [length, d] in three places
logits = V transform(h)                                     V [classes, d]   transform: of the model's own LM head
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.method import Method, Part, Source, Tuner
from ..engine.rows import RowBase
from ..engine.site import Base, Site
from ..engine.taps import forget, note, noted
from ._cloze import ASKED, LR, STATE, Cloze


@dataclass(frozen=True)
class WARP(
    Method,
    roles=("model",),
    lr=LR,
    tiny={"length": 3, "mask_token": 4},
    kinds=None,
    family="additive",
):
    """Rows around the text and a [MASK], read by trained class embeddings. Hambardzumyan et al. 2021, arXiv:2101.00121.

    For masked language models (...ForMaskedLM), whose head is used without its decoder: model(**batch, labels=[batch])
    gives class logits [batch, classes] and their loss. On a ...ForSequenceClassification model, which has no such head,
    the class embeddings meet the hidden state at [MASK] itself, and its own head is neither used nor trained. The loss
    is the squared error of one class, cross-entropy of class numbers, or binary cross-entropy of float labels.
    """

    length: int = 20  # rows
    front: int = -1  # of them between the text's first token and the others; -1: a quarter
    behind: int = -1  # of them behind [MASK]; -1: a half; the others stand between text and [MASK]
    mask_token: int = -1  # number of [MASK]
    text: str = ""  # of which `tune` takes `tokens`
    tokens: tuple[int, ...] = ()  # whose embeddings the first rows begin with; the others with that of [MASK]
    init: str = "random"  # of the class embeddings; or "labels": see `classes`
    classes: tuple[tuple[int, ...], ...] = ()  # for init = "labels": the tokens of each class, whose rows are averaged
    num_labels: int = 0  # classes; 0: as many as the model's config has

    identity = False

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "classes", tuple(map(tuple, self.classes)))
        self.cloze()
        if self.init not in ("random", "labels"):
            raise ValueError(f"WARP init = {self.init!r}; expected random or labels")

    def spelled(self, encode: Callable[[str], list[int]], names: Sequence[str]) -> WARP:
        found: dict[str, Any] = {}
        if self.mask_token == -1:
            found["mask_token"] = getattr(encode, "mask", None)
            if found["mask_token"] is None:
                raise ValueError("WARP needs a model with a [MASK], and the tokenizer has none; use PromptTuning")
        if self.text and not self.tokens:
            found["tokens"] = tuple(encode(self.text))
        if self.init == "labels" and not self.classes:
            found["classes"] = tuple(tuple(encode(name)) for name in names)
        return dataclasses.replace(self, **found)

    def cloze(self) -> Cloze:
        return Cloze(self.length, self.front, self.behind, self.mask_token, self.tokens)

    def expand(self, part: Part) -> list[Part]:
        return [part, Part(self.cloze(), ("backbone",))]


class Verbaliser(Tuner, method=WARP):
    """V, at the whole model."""

    def __init__(self, cfg: WARP, site: Site):
        super().__init__(cfg, site)
        model = cast(Any, site.module)
        vars(self)["decoder"] = decoder = model.get_output_embeddings()
        if decoder is None and not type(model).__name__.endswith("ForSequenceClassification"):
            raise ValueError(
                f"{type(model).__name__} gives texts no class; WARP needs ...ForMaskedLM, ...ForSequenceClassification"
            )
        self.names = tuple(inspect.signature(model.forward).parameters)
        words = (model.get_input_embeddings() if decoder is None else decoder).weight  # [vocabulary, d]
        width = model.config.hidden_size if decoder is None else words.shape[1]
        count = cfg.num_labels or model.config.num_labels
        if cfg.init == "labels" and (len(cfg.classes) != count or not all(cfg.classes) or words.shape[1] != width):
            raise ValueError(
                f'WARP init = "labels" has tokens of {len(cfg.classes)} classes, rows of {words.shape[1]} numbers; '
                f"expected {count} classes, rows of {width}; use random"
            )
        known = cfg.classes if cfg.init == "labels" else ()
        self.weight = site.param(count, width, init=lambda t, g: _begin(t, g, words.detach().float(), known))

    def sources(self, site: Site) -> list[Source]:
        decoder = vars(self)["decoder"]
        return [] if decoder is None else [Source("class word", decoder)]

    def forward(self, base: Base | RowBase, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        labels = given.pop("labels", None)
        dictionary = given.pop("return_dict", getattr(base.site.module.config, "return_dict", True))
        # Of some rows of a batch all is computed anew: the others' outputs have other shapes.
        call = functools.partial(base.beside, base.site.call) if isinstance(base, RowBase) else base
        above = noted(ASKED)  # by another WARP, which is on top of this one
        note(ASKED, True)
        try:
            out = call(**given, return_dict=True)
            h = base.seen("class word") if vars(self)["decoder"] is not None else noted(STATE)
        finally:
            if above is None:
                forget((ASKED, STATE))
        logits = F.linear(h[:, 0], self.weight.to(h.dtype))
        loss = None if labels is None else loss_of(logits, labels)
        out = dataclasses.replace(out, logits=logits, loss=loss)
        return out.to_tuple() if dictionary is False else out


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Of class logits [batch, classes], as transformers' classifiers have it."""
    if logits.shape[1] == 1:
        return F.mse_loss(logits[:, 0], labels.view(-1).to(logits.dtype))
    if labels.is_floating_point():
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
    return F.cross_entropy(logits, labels.view(-1))


def _begin(t: Tensor, generator: torch.Generator, words: Tensor, classes: tuple[tuple[int, ...], ...]) -> None:
    t.normal_(0, words.std().item(), generator=generator)
    for row, tokens in zip(t, classes, strict=False):
        row.copy_(words[list(tokens)].mean(0))
