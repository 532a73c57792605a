"""WARP: a prompt around the text and a [MASK], at which class embeddings are compared with what the model would write.

h = model([CLS] P text P [MASK] P [SEP]) at [MASK]          P [length, d] in three places
logits = V transform(h)                                     V [classes, d]   transform: of the model's own LM head
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..engine.method import Part, Source, Tuner
from ..engine.rows import RowBase
from ..engine.site import Base, Site, base_modules
from ..engine.taps import forget, note, noted
from ._prompt import Prompt, crosses
from ._sequence import numbered, take
from ._spliced import SplicedTuner, ordered, spliced

_ASKED, _MASK = "who asks for [MASK]", "hidden state at [MASK]"


@dataclass(frozen=True)
class WARP(
    Prompt,
    roles=("model",),
    lr=1e-3,
    tiny={"length": 4, "mask_token": 4},
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
    tokens: tuple[int, ...] = ()  # whose embeddings the first rows begin with; the others with that of [MASK]
    classes: tuple[tuple[int, ...], ...] = ()  # tokens of each class's name, where V begins; (): random
    num_labels: int = 0  # classes; 0: as many as `classes` or else the model's config has

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "classes", tuple(map(tuple, self.classes)))
        front, between, behind = self.places
        if self.length < 1 or min(front, between, behind) < 0:
            raise ValueError(
                f"WARP length = {self.length}, front = {self.front}, behind = {self.behind}; expected a length of at "
                "least 1, of which the others are parts"
            )
        if self.classes and self.num_labels not in (0, len(self.classes)):
            raise ValueError(f"WARP num_labels = {self.num_labels}, but {len(self.classes)} classes have tokens")

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

    def expand(self, part: Part) -> list[Part]:
        return [part, Part(Around(**vars(self)), ("backbone",))]


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
        count = cfg.num_labels or len(cfg.classes) or model.config.num_labels
        if cfg.classes and words.shape[1] != width:
            raise ValueError(f"embeddings have {words.shape[1]} features and hidden states {width}; leave classes out")
        self.weight = site.param(count, width, init=lambda t, g: _classes(t, g, words, cfg.classes))

    def sources(self, site: Site) -> list[Source]:
        decoder = vars(self)["decoder"]
        return [] if decoder is None else [Source("class word", decoder)]

    def forward(self, base: Base | RowBase, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        labels = given.pop("labels", None)
        dictionary = given.pop("return_dict", getattr(base.site.module.config, "return_dict", True))
        # Of some rows of a batch all is computed anew: the others' outputs have other shapes.
        call = functools.partial(base.beside, base.site.call) if isinstance(base, RowBase) else base
        note(_ASKED, True)
        try:
            out = call(**given, return_dict=True)
            h = base.seen("class word") if vars(self)["decoder"] is not None else noted(_MASK)
        finally:
            forget((_ASKED, _MASK))
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


def _classes(t: Tensor, generator: torch.Generator, words: Tensor, classes: tuple[tuple[int, ...], ...]) -> None:
    if not classes:
        t.normal_(0, words.float().std().item(), generator=generator)
    for row, tokens in zip(t, classes, strict=False):
        row.copy_(words.detach()[list(tokens)].float().mean(0))


class Around(WARP):
    """The prompt of WARP, where the model takes embeddings."""


class AroundTuner(SplicedTuner, method=Around):
    def __init__(self, cfg: Around, site: Site):
        super().__init__(cfg, site)
        words = cast(Any, site.module).get_input_embeddings().weight
        first = [*cfg.tokens[: cfg.length], *[cfg.mask_token] * (cfg.length - len(cfg.tokens))]
        self.rows = site.param(cfg.length, self.width, init=lambda t, _: t.copy_(words.detach()[first]))
        front, between, behind = cfg.places
        self.groups, self.place_of_mask = (front, between + 1 + behind), front + between
        self.length += 1  # [MASK]

    def prompt(self) -> Tensor:
        return self.rows

    def inserted(self, base: Base | RowBase, x: Tensor) -> Tensor:
        ids = torch.full((1, 1), self.cfg.mask_token, device=x.device)  # type: ignore[attr-defined]
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

    def without(self, out: Any, order: Tensor, n: int) -> Any:
        short = super().without(out, order, n)
        if noted(_ASKED) is None:
            return short
        at = order[:, n + self.place_of_mask :][:, :1]
        note(_MASK, take(out.last_hidden_state, at, 1))
        return dataclasses.replace(short, last_hidden_state=noted(_MASK))  # all that a head need see
