"""Prefix tuning: trained keys and values before those of every attention layer.

    softmax(q [P_k; k]^T) [P_v; v]        P_k, P_v [l, kv heads * head size], of each layer its own; q k v as they are
    [P_k; P_v] = W2 tanh(W1 E + b1) + b2      while it trains: E [l, d], W1 [m, d] shared, W2 [2 width, m] of each layer

E and W1 are shared by all layers of one kind: an encoder, a decoder's self-attention, its cross-attention.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..engine.attach import names_of, state_of, tuners
from ..engine.method import Loan, Method, Part, Tuner
from ..engine.rows import Routing
from ..engine.site import Base, Site
from ..engine.taps import forget, note, noted
from ._attention import Prefix, seam
from ._phm import normal
from ._shared import SharedTuner, share


@dataclass(frozen=True)
class PrefixTuning(
    Method, roles=("attn",), lr=5e-3, tiny={"length": 3, "hidden": 4}, kinds=None, family="additive", kernel=""
):
    """Trained keys and values before those of every attention layer. Li & Liang 2021, arXiv:2101.00190.

    The text sees the prefix and the prefix sees nothing; it is not rotated, not cached, and T5's position bias of it
    is 0. It needs the family's attention to go through transformers' AttentionInterface (Bloom's and Falcon's do not).
    Not mergeable; `PrefixTuning.eject` leaves 2 * length * width numbers per layer and drops the network.
    """

    length: int = 30  # l
    hidden: int = 512  # m of the network that makes the prefix; 0: the prefix itself is trained

    def __post_init__(self):
        super().__post_init__()
        if self.length < 1 or self.hidden < 0:
            raise ValueError(f"PrefixTuning length = {self.length}, hidden = {self.hidden}; expected at least 1 and 0")

    identity = False

    def select(self, sites: list[Site]) -> list[Site]:
        return [site for site in sites if site.role in ("attn", "cross.attn")]

    def attached(self, tuners: list[Tuner]) -> None:
        kinds: dict[str, list[SharedTuner]] = {}
        for tuner in cast("list[SharedTuner]", tuners if self.hidden else []):
            kinds.setdefault(re.sub(r"\d+", "#", tuner.site_name), []).append(tuner)
        for own in kinds.values():
            share(own, "e", "w1", "b1")

    @staticmethod
    def eject(model: nn.Module, name: str = "default") -> nn.Module:
        """The prefixes of an adapter as they are now, without the network that makes them; the same bits.

        The model is changed in place and returned; what is saved from here on has hidden=0. ValueError if the adapter
        has no prefix.
        """
        names_of(model, name)
        adapter = state_of(model).adapters[name]
        own = [t for _, top in tuners(model, name) for t in top.modules() if isinstance(t, PrefixTuner)]
        if not own:
            raise ValueError(f"adapter {name!r} has no prefix to eject; attach pk.PrefixTuning()")
        with torch.no_grad():
            flat = [tuner.prefix() for tuner in own]
        for tuner, (k, v) in zip(own, flat, strict=True):
            tuner.eject(k, v)
        adapter.parts = [_ejected(part) for part in adapter.parts]
        return model


def _ejected(value: Any) -> Any:
    """A method, or a part of it, with prefixes that have no network."""
    if isinstance(value, (tuple, list)):
        return type(value)(_ejected(item) for item in value)
    if isinstance(value, PrefixTuning):
        return dataclasses.replace(value, hidden=0)
    if isinstance(value, (Method, Part)):
        values = {f.name: getattr(value, f.name) for f in dataclasses.fields(cast(Any, value))}
        changed = {n: new for n, old in values.items() if (new := _ejected(old)) != old}
        return dataclasses.replace(cast(Any, value), **changed) if changed else value
    return value


class PrefixTuner(SharedTuner, method=PrefixTuning):
    lender: PrefixTuner
    e: nn.Parameter  # [l, d], of the lender, as w1 [m, d] and b1 [m]

    def __init__(self, cfg: PrefixTuning, site: Site):
        super().__init__(cfg, site)
        at = seam(site, cfg.key)
        self.length, self.key, self.width = cfg.length, f"prefix of {site.name}", at.width
        if not cfg.hidden:
            self.k, self.v = (site.param(cfg.length, at.width, init=normal(0.02)) for _ in range(2))
            return
        self.e = site.param(cfg.length, at.hidden, init=normal(1.0))
        self.w1, self.b1 = site.param(cfg.hidden, at.hidden, init="kaiming"), site.param(cfg.hidden)
        self.w2, self.b2 = site.param(2 * at.width, cfg.hidden, init="kaiming"), site.param(2 * at.width)

    def lends(self, site: Site) -> list[Loan]:
        return [seam(site, self.cfg.key).loan(self.key)]

    def prefix(self) -> tuple[Tensor, Tensor]:
        """(k, v), each [l, width]."""
        if "k" in self._parameters:
            return self.k, self.v
        lender, device = self.lender, self.w2.device
        h = torch.tanh(nn.functional.linear(lender.e, lender.w1, lender.b1)).to(device)
        k, v = nn.functional.linear(h, self.w2, self.b2).chunk(2, dim=-1)
        return k, v

    def gate(self, x: Tensor) -> Tensor | None:
        """[rows]: a factor of the prefix for each row of the batch, from what enters attention, x [rows, n, d]."""
        return None

    def eject(self, k: Tensor, v: Tensor) -> None:
        for name in list(self._parameters):
            delattr(self, name)
        self.k, self.v = nn.Parameter(k.clone()), nn.Parameter(v.clone())
        vars(self)["lender"] = self

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        k, v = self.prefix()
        g = self.gate(args[0])
        k, v = (p[None] if g is None else p * g[:, None, None] for p in (k, v))
        return _before(self.key, Prefix(k, v), _anew(base), args, kwargs)


def _before(key: str, prefix: Prefix, base: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """base(*args) with a prefix in its attention, beside those that tuners above have there."""
    others = noted(key) or ()
    note(key, (prefix, *others))
    try:
        return base(*args, **kwargs)
    finally:
        note(key, others) if others else forget((key,))
