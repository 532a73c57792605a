"""Prompts: learned rows in the sequence of embeddings, at the module that takes these (role `backbone`).

    h = model([P; e(tokens)])[l:]                   P [l, d]   e [n, d]   h [n, d]

The rows of P are gone from what comes out, so heads, labels and poolers see what they know. In an encoder-decoder model
the encoder alone has P and its output keeps these rows, to which the decoder attends.
"""

from __future__ import annotations

import inspect
import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..engine.method import Method, Tuner
from ..engine.roles import roles_of
from ..engine.rows import RowBase
from ..engine.site import Base, Site, base_modules
from ._sequence import CACHE, numbered, room, seen_by, shortened

STATES = "encoder_hidden_states"
_ENTERED = "peft_prompts"  # in vars(cache): number of a prompt in it -> how many more rows it has than tokens
_numbers = itertools.count(1)


class Prompt(Method):
    """A method whose tuners are prompts: what they have in common beside fields."""

    identity = False

    def select(self, sites: list[Site]) -> list[Site]:
        """The modules that get P, and the decoders that attend to one of those."""
        sites = super().select(sites)
        behind = [site for site in sites if crosses(site.module)]
        if len(behind) < len(sites):
            for site in behind:
                site.role = Memory.key
        return sites

    def at(self, site: Site) -> Method:
        return Memory() if site.role == Memory.key else self

    def attached(self, tuners: list[Tuner]) -> None:
        if any(isinstance(tuner, MemoryTuner) for tuner in tuners):
            for tuner in tuners:
                vars(tuner)["keep"] = True


class PromptTuner(Tuner):
    """A prompt at one module. A subclass makes its parameters and writes `prompt`.

    length: rows of P.   width: their features, those of the module's embeddings.   keep: its output has them too.
    """

    length: int
    width: int
    keep: bool = False

    def __init__(self, cfg: Any, site: Site):
        super().__init__(cfg, site)
        self.length, self.width = cfg.length, width_of(site)
        self.names = tuple(inspect.signature(site.module.forward).parameters)
        self.causal = any(getattr(m, "is_causal", False) for _, m in base_modules(site.module))
        self.number = next(_numbers)

    def prompt(self) -> Tensor:
        """P [length, width] or [batch, length, width]."""
        raise NotImplementedError(f"{type(self).__name__} has no prompt")

    def forward(self, base: Base | RowBase, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        module = base.site.module
        dictionary = given.pop("return_dict", getattr(module.config, "return_dict", True))
        out = self.around(base, module, {**given, "return_dict": True})
        return out.to_tuple() if dictionary is False else out

    def around(self, base: Base | RowBase, module: Any, given: dict[str, Any]) -> Any:
        """The module's output for what it was given by name, P in it."""
        l, cache = self.length, given.get(CACHE)  # noqa: E741
        x = given.get("inputs_embeds")
        if x is None:
            x = base.beside(module.get_input_embeddings(), given["input_ids"])
        start = self.entered(base.site, cache)
        rows, n = 0 if start else l, x.shape[1]
        width = room(cache, rows, n)
        self.positions(module, given, rows, n)
        if (types := given.get("token_type_ids")) is not None:
            given["token_type_ids"] = F.pad(types, (rows, 0))
        given["attention_mask"] = seen_by(given.get("attention_mask"), l, rows, self.causal, width)
        given |= {"input_ids": None, "inputs_embeds": self.place(x) if rows else x}
        out = base(**given)
        self.enter_cache(getattr(out, CACHE, None) if cache is None else cache, rows, n)
        return out if self.keep else shortened(out, l, rows, getattr(module, "pooler", None))

    def place(self, x: Tensor) -> Tensor:
        """The sequence [batch, length + n, width] of P and the embeddings x [batch, n, width]."""
        p = self.prompt().to(x.dtype)
        return torch.cat([p.expand(len(x), *p.shape[-2:]), x], dim=1)

    def positions(self, module: Any, given: dict[str, Any], rows: int, n: int) -> None:
        """P is numbered from the first position, and the text behind it, padding on its left left out."""
        mask, own = given.get("attention_mask"), given.get("position_ids")
        if "position_ids" not in self.names:
            return
        if own is None and isinstance(mask, Tensor) and mask.dim() == 2:
            own = numbered(mask, n)
        if own is not None:
            before = torch.arange(rows, device=own.device, dtype=own.dtype).expand(len(own), rows)
            given["position_ids"] = torch.cat([before, own + self.length], dim=1)

    # -- key-value caches ---------------------------------------------------------------------------------------------

    def entered(self, site: Site, cache: Any) -> bool:
        """Whether P is in the cache; RuntimeError if that was filled without it."""
        if cache is None:
            return False
        length, known = cache.get_seq_length(), vars(cache).get(_ENTERED, {})
        if isinstance(length, Tensor):  # of a static cache; a graph must not depend on it
            length = int(self.number in known) if torch.compiler.is_compiling() else int(length)
        if length and self.number not in known:
            raise RuntimeError(f"{site} gets a key-value cache that was filled without this prompt; begin a new one")
        return bool(length)

    def enter_cache(self, cache: Any, rows: int, n: int) -> None:
        if cache is not None and rows:
            vars(cache)[_ENTERED] = {**vars(cache).get(_ENTERED, {}), self.number: rows}


def width_of(site: Site) -> int:
    """Features of the embeddings that a module takes."""
    embedding = site.module.get_input_embeddings() if hasattr(site.module, "get_input_embeddings") else None
    if embedding is None:
        raise ValueError(f"{site.name or 'the model'} has no embeddings of tokens; target the role backbone")
    return getattr(embedding, "embedding_dim", None) or site.module.config.hidden_size


def crosses(module: nn.Module) -> bool:
    """Whether there is attention to another module's output in it."""
    config = getattr(module, "config", None)
    return any("cross.attn" in roles_of(config, path) for path, _ in base_modules(module))


@dataclass(frozen=True)
class Memory(Method):
    """At a decoder: the rows of a prompt in the encoder's output are seen."""

    key = "memory"


class MemoryTuner(Tuner, method=Memory):
    def __init__(self, cfg: Method, site: Site):
        super().__init__(cfg, site)
        self.names = tuple(inspect.signature(site.module.forward).parameters)

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        states, mask = given.get(STATES), given.get("encoder_attention_mask")
        if states is not None and mask is not None:
            more = states.shape[1] - mask.shape[-1]
            given["encoder_attention_mask"] = seen_by(mask, more, 0, False, None)
        return base(**given)
