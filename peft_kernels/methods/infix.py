"""Infix tuning: learned rows between the input and the output of a causal decoder.

    [x; P; y]            x [b, d]   P [l, d]   y [n - b, d]         b: where y begins, in each row of a batch

No row of x sees P. The row that predicts the first token of y is the last of P: it stands for that of x's last token.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..engine.method import Loan, Method, Part, Tuner
from ..engine.rows import Routing, RowBase
from ..engine.site import Base, Site, base_modules
from ..engine.taps import forget, note, noted
from ._prompt import ENTERED, Prompt, crosses
from ._sequence import CACHE
from ._spliced import SplicedTuner, ordered, shortened, spliced, two_dimensional

_FIRST, _TEXT = "first label of each row", "length of the text that generate was given"
_BEGINS = "peft_infixes"  # in vars(cache): mark of an infix in it -> [batch, 1] where y begins


@dataclass(frozen=True)
class InfixTuning(Prompt, roles=("backbone",), lr=0.1, tiny={"length": 3}, key="infix", kinds=None, family="additive"):
    """Learned rows between input and output, which the input cannot see. Li & Liang 2021, arXiv:2101.00190, section 4.

    For causal decoders. The output begins, row by row, at the first label that is not -100, and without labels after
    the last token that is not padding: that is where generation begins, and what a classifier of the last token reads.
    Where every token has a label, as in training on whole texts, P stands in front of them, as in prompt tuning; the
    loss of a new text then needs labels too. Positions follow the sequence: those of the output move by `length`.
    Refused are static caches and a prompt that is read in chunks.
    """

    length: int = 10  # rows

    def __post_init__(self):
        super().__post_init__()
        if self.length < 1:
            raise ValueError(f"InfixTuning length = {self.length}; expected at least 1")

    def select(self, sites: list[Site]) -> list[Site]:
        for site in sites:
            flags = [m.is_causal for _, m in base_modules(site.module) if hasattr(m, "is_causal")]
            if crosses(site.module) or flags and not any(flags):
                kind = "attends to an encoder" if crosses(site.module) else "sees the whole text at once"
                raise ValueError(
                    f"{site.name or type(site.module).__name__} {kind}; InfixTuning, whose rows no input may see, "
                    "needs a causal decoder; use PromptTuning"
                )
        return super().select(sites)

    def expand(self, part: Part) -> list[Part]:
        return [part, Part(Outer(self.length), ("model",))]


class InfixTuner(SplicedTuner, method=InfixTuning):
    def __init__(self, cfg: InfixTuning, site: Site):
        super().__init__(cfg, site)
        self.rows = site.param(self.length, self.width, init=lambda t, g: t.uniform_(-0.5, 0.5, generator=g))

    def prompt(self) -> Tensor:
        return self.rows

    def splice(self, base: Base | RowBase, x: Tensor, real: Tensor) -> Tensor:
        text, n = noted(_TEXT), x.shape[1]
        if text is not None and n < text:
            raise RuntimeError(f"{base.site} gets {n} of {text} tokens of the input; InfixTuning needs them at once")
        behind = torch.arange(1, n + 1, device=x.device)
        begin = (behind * real)[:, :text].amax(1, keepdim=True)
        if (first := noted(_FIRST)) is not None:
            first = base.own(first) if isinstance(base, RowBase) else first
            begin = torch.where(first < 0, begin, first)
        return spliced(n, (begin, self.length))

    def kept(self, order: Tensor, n: int) -> Tensor:
        last = torch.arange(n, device=order.device) == order[:, n : n + 1] - 1  # of the input
        return order[:, :n] + self.length * last

    def positions_at(self, given: dict[str, Any], order: Tensor, real: Tensor) -> Tensor | None:
        if (own := given.get("position_ids")) is None:
            return None
        own, n, begin = own.expand(real.shape), real.shape[1], order[:, real.shape[1] :][:, :1]
        before = (begin - 1).clamp(min=0)
        follows = (begin > 0) & real.gather(1, before)  # else the output begins the text
        start = torch.where(follows, own.gather(1, before) + 1, own.gather(1, begin.clamp(max=n - 1)))
        moved = own + (order[:, :n] - torch.arange(n, device=own.device))
        return ordered(moved, start + torch.arange(self.length, device=own.device), order)

    def around(self, base: Base | RowBase, module: Any, given: dict[str, Any]) -> Any:
        text = given["inputs_embeds"] if given.get("input_ids") is None else given["input_ids"]
        if self.entered(base.site, given.get(CACHE), given, text.shape[1]):
            return self.continued(base, given, text.shape[1])
        return super().around(base, module, given)

    def continued(self, base: Base | RowBase, given: dict[str, Any], n: int) -> Any:
        """The output for n more of the text, P being in the cache."""
        cache, mask = given[CACHE], two_dimensional(self, given.get("attention_mask"))
        seen = int(cache.get_seq_length()) - vars(cache)[ENTERED][self.mark] + n
        order = spliced(seen, (vars(cache)[_BEGINS][self.mark], self.length))
        if mask is not None:
            given["attention_mask"] = ordered(mask, mask.new_ones(1, self.length), order)
        if given.get("position_ids") is not None:
            given["position_ids"] = given["position_ids"] + self.length
        return shortened(base(**given), slice(None), order[:, :seen], None)

    def remember(self, cache: Any, order: Tensor, n: int) -> None:
        if cache is not None:
            self.enter_cache(cache, self.length, n)
            vars(cache)[_BEGINS] = {**vars(cache).get(_BEGINS, {}), self.mark: order[:, n : n + 1]}


class Outer(InfixTuning):
    """What the whole model is told of where the output begins: its labels, and the text that it is to continue."""

    def select(self, sites: list[Site]) -> list[Site]:
        return sites


class OuterTuner(Tuner, method=Outer):
    def __init__(self, cfg: Method, site: Site):
        super().__init__(cfg, site)
        self.names = tuple(inspect.signature(site.module.forward).parameters)

    def lends(self, site: Site) -> list[Loan]:
        return [Loan(site.module, "generate", _Generate(site.module))] if hasattr(site.module, "generate") else []

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        labels = given.get("labels")
        texts = (given.get(name) for name in ("input_ids", "inputs_embeds"))
        text = next((t for t in texts if t is not None), None)
        if text is None or labels is None or labels.shape != text.shape[:2] or labels.is_floating_point():
            return base(*args, **kwargs)
        wanted = labels != -100
        note(_FIRST, torch.where(wanted.any(1), wanted.int().argmax(1), -1)[:, None])
        try:
            return base(*args, **kwargs)
        finally:
            forget((_FIRST,))

    @classmethod
    def forward_many(cls, base: Any, tuners: dict[int, Tuner], route: Routing, *args: Any, **kwargs: Any) -> Any:
        return next(iter(tuners.values()))(base, *args, **kwargs)  # each row's own prompt asks for what was noted


class _Generate:
    """A model's `generate`, which notes how long the text is that it continues: without a cache no call shows it."""

    def __init__(self, model: Any):
        self.model = model

    def __call__(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        texts = (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        if (text := next((t for t in texts if t is not None), None)) is not None:
            note(_TEXT, text.shape[1])
        try:
            return type(self.model).generate(self.model, inputs, *args, **kwargs)
        finally:
            forget((_TEXT,))
