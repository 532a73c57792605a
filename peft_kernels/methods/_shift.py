"""Positions that begin later: the tokens of a model are where they would be behind others."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from ..engine.method import Method, Tuner
from ..engine.site import Base, Site, adapters_of, base_class, base_modules

_NAMES = ("wpe", "position_embeddings", "embed_positions", "rotary_emb")  # of modules that are called with positions
_BEFORE = "past_key_values_length"


@dataclass(frozen=True)
class Shift(Method):
    """Adds `by` to what a model's position embeddings and rotations are called with; an encoder's stay.

    Nothing is trained. ValueError for a model without such modules, as those with relative positions.
    """

    by: int = 0

    key = "prefix"
    roles = ("model",)
    kinds = None

    def select(self, sites: list[Site]) -> list[Site]:
        (site,) = sites
        encodes = getattr(getattr(site.module, "config", None), "is_encoder_decoder", False)
        found = []
        for path, module in base_modules(site.module):
            places = path.split(".")
            if places[-1] in _NAMES and not (encodes and "encoder" in places):
                found.append(Site(path, module, seed=site.seed))
        if not found:
            raise ValueError(
                f"PrefixTuning shift = True: {type(site.module).__name__} has no position embeddings and no rotation; "
                "set shift=False"
            )
        return found


class ShiftTuner(Tuner, method=Shift):
    def __init__(self, cfg: Shift, site: Site):
        super().__init__(cfg, site)
        module = site.module
        cls: Any = type(module) if adapters_of(module) is None else base_class(module)
        self.names, self.by = list(inspect.signature(cls.forward).parameters)[1:], cfg.by

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        name = "position_ids" if "position_ids" in self.names else self.names[0]
        if given.get(name) is None and self.names[0] == "attention_mask":  # OPT counts what is no padding
            mask = given["attention_mask"]
            given[name] = (mask.cumsum(1) * mask - 1).long()[:, given.get(_BEFORE, 0) :]
        if given.get(name) is not None and (name == "position_ids" or _BEFORE not in self.names):
            return base(**{**given, name: given[name] + self.by})
        return base(**{**given, _BEFORE: given.get(_BEFORE, 0) + self.by})
