"""Prompts: learned rows in the sequence of embeddings, at the module that takes these (role `backbone`).

    h = model([P; e(tokens)])[l:]                   P [l, d]   e [n, d]   h [n, d]

The rows of P are gone from what comes out, so heads, labels and poolers see what they know. In an encoder-decoder model
the encoder alone has P and its output keeps these rows, to which the decoder attends. A model of images, whose patches
have their positions already, has P behind them.
"""

from __future__ import annotations

import inspect
import uuid
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..engine.method import Method, Tuner
from ..engine.rows import Routing, RowBase, by_rows
from ..engine.site import Base, Site, base_modules
from ..engine.taps import forget, note
from ._prompted import (
    Appended,
    AppendedTuner,
    Filled,
    Memory,
    MemoryTuner,
    check_positions,
    crosses,
    embeddings_of,
    first_position,
    kept,
    takes_embeddings,
    width_of,
)
from ._sequence import CACHE, indented, make_room, moved, numbered, rest, seen_by, shortened, take

ENTERED = "peft_prompts"  # in vars(cache): mark of a prompt in it -> rows that the cache has and its tokens have not


class Prompt(Method):
    """A method whose tuners are prompts: what they have in common beside fields."""

    identity = False

    def select(self, sites: list[Site]) -> list[Site]:
        """The modules that get P, the decoders that attend to one of those, and where P enters a model of images."""
        sites = super().select(sites)
        behind = [site for site in sites if crosses(site.module)]
        if len(behind) < len(sites):
            for site in behind:
                site.role = Memory.key
        images = [site for site in sites if not takes_embeddings(site)]
        return [*sites, *map(embeddings_of, images)]

    def at(self, site: Site) -> Method:
        return {Memory.key: Memory, Appended.key: Appended}.get(site.role, lambda: self)()

    def attached(self, tuners: list[Tuner]) -> None:
        feeds = any(isinstance(tuner, MemoryTuner) for tuner in tuners)
        places = {tuner.site_name: tuner for tuner in tuners}
        for tuner in tuners:
            if isinstance(tuner, PromptTuner):
                tuner.keep = feeds
            elif isinstance(tuner, MemoryTuner):  # past nn.Module, which would register a submodule
                vars(tuner)["prompt"] = next(t for t in tuners if isinstance(t, PromptTuner))
            elif isinstance(tuner, AppendedTuner):
                tuner.mark = cast(PromptTuner, places[tuner.site_name.rpartition(".")[0]]).mark


class PromptTuner(Tuner):
    """A prompt at one module. A subclass makes its parameters and writes `prompt`.

    length: rows of P.   width: their features, those of the module's embeddings.   keep: its output has them too.
    """

    module: nn.Module
    length: int
    width: int
    keep: bool = False

    def __init__(self, cfg: Any, site: Site):
        super().__init__(cfg, site)
        vars(self)["module"] = site.module
        self.length, self.width = cfg.length, width_of(site)
        self.names = tuple(inspect.signature(site.module.forward).parameters)
        known = [m.is_causal for _, m in base_modules(site.module) if hasattr(m, "is_causal")]
        self.causal = any(known) if known else CACHE in self.names
        self.first = first_position(site.module)
        self.mark = uuid.uuid4().hex

    def prompt(self) -> Tensor:
        """P [length, width] or [batch, length, width]."""
        raise NotImplementedError(f"{type(self).__name__} has no prompt")

    def forward(self, base: Base | RowBase, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        module: Any = base.site.module
        dictionary = given.pop("return_dict", getattr(module.config, "return_dict", True))
        around = self.around if "inputs_embeds" in self.names else self.behind
        out = around(base, module, {**given, "return_dict": True})
        return out.to_tuple() if dictionary is False else out

    def around(self, base: Base | RowBase, module: Any, given: dict[str, Any]) -> Any:
        """The module's output for what it was given by name, P in it."""
        l, cache, mask = self.length, given.get(CACHE), cast(Tensor, given.get("attention_mask"))
        x = self.embedded(base, module, given)
        n = x.shape[1]
        rows = 0 if self.entered(base.site, cache, given, n) else l
        self.positions(module, given, rows, n)
        if (types := given.get("token_type_ids")) is not None:
            given["token_type_ids"] = F.pad(types, (rows, 0))
        if rows:
            check_positions(base.site, l, n)
            make_room(cache, l, n, getattr(module.config, "sliding_window", None))
        given["attention_mask"] = seen_by(mask, l, rows, self.causal, cache)
        x = self.place(x) if rows else x
        text: tuple[slice | Tensor, slice | Tensor] = (slice(rows, None), slice(l, None))  # as queries, as keys
        if rows and not self.causal and "position_ids" not in self.names and indented(mask):
            index = moved(mask, l, n)  # the distance of P to the text is part of the model
            text = (rest(mask, l, n),) * 2
            x = take(x, index, 1)
            given["attention_mask"] = take(given["attention_mask"], index, 1)
        out = base(**{**given, "input_ids": None, "inputs_embeds": x})
        self.enter_cache(getattr(out, CACHE, None) if cache is None else cache, rows, n)
        return out if self.keep else shortened(out, *text, getattr(module, "pooler", None))

    def embedded(self, base: Base | RowBase, module: Any, given: dict[str, Any]) -> Tensor:
        """The embeddings [batch, n, width] that were given, or those of the tokens."""
        x = given.get("inputs_embeds")
        return base.beside(module.get_input_embeddings(), given["input_ids"]) if x is None else x

    def place(self, x: Tensor) -> Tensor:
        """The sequence [batch, length + n, width] of P and the embeddings x [batch, n, width]."""
        return torch.cat([self.of(x), x], dim=1)

    def of(self, x: Tensor) -> Tensor:
        """P [batch, length, width] in the dtype of the embeddings x."""
        p = self.prompt().to(x)
        return p.expand(len(x), *p.shape[-2:])

    def positions(self, module: Any, given: dict[str, Any], rows: int, n: int) -> None:
        """P has the first positions, and the text those behind it, whatever padding there is on its left."""
        mask, own = given.get("attention_mask"), given.get("position_ids")
        if "position_ids" not in self.names:
            return
        if own is None and isinstance(mask, Tensor) and mask.dim() == 2:
            own = numbered(mask, n) + self.first
        if own is not None:
            before = torch.arange(self.first, self.first + rows, device=own.device, dtype=own.dtype)
            given["position_ids"] = torch.cat([before.expand(len(own), rows), own + self.length], dim=1)

    def behind(self, base: Base | RowBase, module: Any, given: dict[str, Any]) -> Any:
        """The same of a model that makes its embeddings inside, from an image."""
        if isinstance(mask := given.get("attention_mask"), Tensor):
            given["attention_mask"] = F.pad(mask, (0, self.length), value=1)
        note(self.mark, self.prompt())
        try:
            out = base(**given)
        finally:
            forget((self.mark,))
        text = slice(None, -self.length)
        return shortened(out, text, text, None)

    # -- key-value caches: P is in them from the first call on --------------------------------------------------------

    def entered(self, site: Site, cache: Any, given: dict[str, Any], n: int) -> bool:
        """Whether P is in the cache; RuntimeError if that was filled without it, or is of other tokens."""
        if cache is None:
            return False
        known, length, mask = vars(cache).get(ENTERED, {}), cache.get_seq_length(), given.get("attention_mask")
        if isinstance(length, Tensor):  # of a static cache, on which a graph must not depend
            length, mask = int(self.mark in known) if torch.compiler.is_compiling() else int(length), None
        if not length:
            return False
        if self.mark not in known:
            raise RuntimeError(f"{site} gets a key-value cache that was filled without this prompt; begin a new one")
        before = length - known[self.mark]
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] != before + n:
            raise RuntimeError(
                f"{site} gets {n} tokens under a mask of {mask.shape[1]} and a key-value cache of {before} behind the "
                "prompt; generate in one go, as the tokens in a cache cannot be counted by its length"
            )
        return True

    def enter_cache(self, cache: Any, rows: int, n: int) -> None:
        """Notes in a cache that P is in it, and how many rows more than tokens it has."""
        if cache is not None and rows:
            length = cache.get_seq_length()
            more = rows if isinstance(length, Tensor) else length - n
            vars(cache)[ENTERED] = {**vars(cache).get(ENTERED, {}), self.mark: more}

    # -- routes: encoder outputs of one length, the rows of shorter prompts beginning with zeros ----------------------

    @classmethod
    def forward_many(cls, base: Any, tuners: dict[int, Tuner], route: Routing, *args: Any, **kwargs: Any) -> Any:
        longest = kept(base.site.module)
        if not longest:
            return by_rows(base, tuners, route, args, kwargs)
        padded = {number: cast(Tuner, Filled(tuner, longest)) for number, tuner in tuners.items()}
        return by_rows(cast(Base, Filled(base, longest)), padded, route, args, kwargs)
