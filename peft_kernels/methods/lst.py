"""LST: a small side network beside the frozen backbone, which is neither differentiated nor kept for backward.

    s = D0(e)                                                   e     [.., d]   what the first block gets
    s = block_i(g_i s + (1 - g_i) D_i(h_i)) for i in kept       h_i   [.., d]   the output of the backbone's block i
    y = U(norm(s))                                              s     [.., d / R]        g_i = sigmoid(a_i / T)

y takes the place of what the backbone's stack of blocks returns, so the model's head reads it.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..engine.method import Method, Source, Tuner
from ..engine.roles import roles_of
from ..engine.rows import Routing, RowBase, by_rows
from ..engine.site import Base, Site, adapters_of, base_modules
from ..engine.taps import forget, note
from ._ladder import STATES, Joined, Rung, first, linear, with_last
from ._side import blocks_of, cached, config_of, shrunk, side_stack

CACHE = "past_key_values"


@dataclass(frozen=True)
class LST(Method, roles=("stack",), lr=3e-3, tiny={"reduction": 2, "drop": 2}, kinds=None, family="additive"):
    """A narrow network beside the frozen one, which is not differentiated. Sung et al. 2022, arXiv:2206.06522.

    One tuner for each stack of blocks. The side network is of the stack's own class, which must be one of transformers,
    with all widths divided by `reduction` and as many heads; it begins with the most important of the backbone's
    numbers (`init`), so attached and untrained it changes the model. In an encoder-decoder model the decoder's side
    attends to the encoder's, which the encoder's output carries as d / R more features. Generation keeps the side's
    keys and values behind the backbone's in the same cache. Tuners inside the stack or below it get no gradient.
    """

    reduction: int = 8  # R, by which all widths are divided; it must divide the size of a head
    drop: int = 4  # every how manyth block, from the first, has no side block; 0: none
    keep: tuple[int, ...] = ()  # the numbers of the blocks that have one; (): all that `drop` leaves
    temperature: float = 0.1  # of the gates
    init: str = "prune"  # or "random"

    identity = False

    def __post_init__(self):
        super().__post_init__()
        if self.reduction < 1 or self.drop < 0 or self.drop == 1 or self.temperature <= 0:
            raise ValueError(
                f"LST reduction = {self.reduction}, drop = {self.drop}, temperature = {self.temperature}; "
                "expected at least 1, 0 or at least 2, and more than 0"
            )
        if self.init not in ("prune", "random"):
            raise ValueError(f"LST init = {self.init!r}; expected prune or random")

    def kept(self, depth: int) -> list[int]:
        """Of so many blocks those beside which there is a side block; of a single one that."""
        if not all(isinstance(i, int) and 0 <= i < depth for i in self.keep):
            raise ValueError(f"LST keep = {self.keep}; expected numbers of blocks, which are 0 to {depth - 1} here")
        kept = [i for i in range(depth) if not self.drop or i % self.drop]
        return sorted(set(self.keep)) or kept or list(range(depth))

    def attached(self, tuners: list[Tuner]) -> None:
        """Joins the two sides of an encoder-decoder model."""
        places = {tuner.site_name: cast(LSTTuner, tuner) for tuner in tuners}
        for name, encoder in places.items():
            stem, _, last = name.rpartition(".")
            decoder = places.get(f"{stem}.decoder".lstrip("."))
            if last == "encoder" and decoder is not None:
                encoder.up, decoder.memory = None, None


class LSTTuner(Tuner, method=LST):
    def __init__(self, cfg: LST, site: Site):
        super().__init__(cfg, site)
        vars(self)["stack"] = site.module
        name, blocks = blocks_of(site.module)
        config, self.depth, self.kept = config_of(site.module), len(blocks), cfg.kept(len(blocks))
        self.small = shrunk(config, cfg.reduction, self.kept)
        self.hidden, self.width = config.hidden_size, self.small.hidden_size
        self.names = tuple(inspect.signature(site.module.forward).parameters)
        self.keys = tuple(f"{i} of the ladder of {site.name}" for i in range(-1, len(self.kept)))
        self.entry = linear(site, self.hidden, self.width)
        self.up: nn.Linear | None = linear(site, self.width, getattr(config, "word_embed_proj_dim", self.hidden))
        inside = (roles_of(config, f"{name}.0.{path}") for path, _ in base_modules(blocks[0]))
        self.crosses = any("cross.k" in roles for roles in inside)
        self.memory = linear(site, self.hidden, self.width) if self.crosses else None
        self.side = side_stack(site, self.small, cfg.init, self.kept)
        own = cast(nn.ModuleList, self.side._modules[name])
        for j, block in enumerate(own):
            keys = self.keys[: j + 2] if not j else self.keys[j + 1 : j + 2]
            down, gate = linear(site, self.hidden, self.width), site.param(1)
            own[j] = Rung(block, down, gate, cfg.temperature, keys)

    def sources(self, site: Site) -> list[Source]:
        _, blocks = blocks_of(site.module)
        return [Source("start", blocks[0]), *(Source(f"block {i}", blocks[i], output=True) for i in self.kept)]

    @property
    def fed(self) -> bool:
        """Whether the encoder's side comes with its output."""
        return self.crosses and self.memory is None

    def forward(self, base: Base | RowBase, *args: Any, **kwargs: Any) -> Any:
        while isinstance(base, Base) and isinstance(base.tuner, LSTTuner):
            base = cast(Base, base.below)  # the output of a second side network below would be replaced
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        cache, grad = given.get(CACHE), torch.is_grad_enabled()
        before = 0 if cache is None else cache.get_seq_length()
        if isinstance(base, RowBase):  # which ran for all rows: other tuners may need its gradient
            out = base(*args, **kwargs)
        else:
            if self.training and grad and cache is None and "use_cache" in self.names:
                given["use_cache"] = False  # nobody generates here, and keys would be kept for nothing
            with torch.no_grad():
                out = Joined(base, self.names, self.hidden if self.fed else 0)(**given)
        last = first(out).detach()
        cache = getattr(out, CACHE, None) if cache is None else cache
        s = self.beside(base, given, cache, before).reshape(*last.shape[:-1], self.width)
        if self.up is None:
            y = torch.cat([last[..., : self.hidden], s.to(last.dtype)], dim=-1)
            return with_last(out, F.pad(y, (0, last.shape[-1] - y.shape[-1])) if last.shape[-1] > y.shape[-1] else y)
        y = self.up(s).to(last.dtype)
        pooler = getattr(base.site.module, "pooler", None)
        if pooler is not None and getattr(out, "pooler_output", None) is not None:
            return with_last(out, y, pooler_output=pooler(y))
        return with_last(out, y)

    def beside(self, base: Base | RowBase, given: dict[str, Any], cache: Any, before: int) -> Tensor:
        """The side stack's output [.., d / R] in a call whose backbone has run."""
        named = {key: value for key, value in given.items() if not key.startswith(("output_", "return_"))}
        if "use_cache" in self.names:
            own = None if cache is None else cached(base.site, cache, self.small, self.depth)
            if own is not None and own.get_seq_length() != before:
                raise RuntimeError(f"{base.site} gets a key-value cache that was filled without LST; begin a new one")
            named |= {CACHE: own, "use_cache": own is not None}
        states = named.get(STATES)
        if states is not None and self.fed:
            if states.shape[-1] < self.hidden + self.width:
                raise ValueError(
                    f"{base.site}: {STATES} have {states.shape[-1]} features, expected {self.hidden} of the encoder "
                    f"and {self.width} of its side; let the encoder run with this adapter"
                )
            named[STATES] = self._own(states[..., self.hidden : self.hidden + self.width])
        elif states is not None and self.memory is not None:
            named[STATES] = self.memory(self._own(states))
        try:
            start = self.entry(self._own(base.seen("start").detach()))
            note(self.keys[0], start)
            for key, i in zip(self.keys[1:], self.kept, strict=True):
                note(key, self._own(base.seen(f"block {i}").detach()))
            if "inputs_embeds" in self.names:
                named |= {"input_ids": None, "inputs_embeds": start}
            return first(self.side(**named))
        finally:
            forget(self.keys)

    def _own(self, x: Tensor) -> Tensor:
        return x.to(self.entry.weight.dtype)

    @classmethod
    def forward_many(cls, base: Any, tuners: dict[int, Tuner], route: Routing, *args: Any, **kwargs: Any) -> Any:
        own = [cast(LSTTuner, tuner) for tuner in tuners.values()]
        cut = max(t.hidden if t.fed else 0 for t in own)
        more = max(t.width if t.up is None else 0 for t in own)
        return by_rows(cast(Base, Joined(base, own[0].names, cut, more)), tuners, route, args, kwargs)

    def ready(self) -> str:
        for path, module in base_modules(vars(self)["stack"]):
            base = None if (adapters := adapters_of(module)) is None or not path else adapters.chain
            while base is not None:
                if base.tuner is not None and any(p.requires_grad for p in base.tuner.parameters()):
                    return f"{base.tuner.site_name} has a tuner, which gets no gradient under LST; freeze or detach it"
                base = base.below
        return ""
