"""Prefix tuning: trained keys and values before those of every attention layer.

    softmax(q [P_k; k]^T) [P_v; v]        P_k, P_v [l, kv heads * head size], of each layer its own; q k v as they are
    [P_k; P_v] = W2 tanh(W1 E + b1) + b2      while it trains: E [l, d], W1 [m, d] shared, W2 [2 width, m] of each layer

E and W1 are shared by all layers of one kind: an encoder, a decoder's self-attention, its cross-attention.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..engine.method import Loan, Method, Part, Tuner
from ..engine.rows import Routing, RowBase, in_rows, refuse
from ..engine.site import Base, Site
from ..engine.stack import Known
from ..engine.taps import forget, note, noted
from ._attention import seam
from ._keys import Prefix
from ._phm import normal
from ._shared import SharedTuner, share
from ._shift import Shift


@dataclass(frozen=True)
class PrefixTuning(
    Method, roles=("attn",), lr=1e-3, tiny={"length": 3, "hidden": 4}, key="prefix", kinds=None, family="additive"
):
    """Trained keys and values before those of every attention layer. Li & Liang 2021, arXiv:2101.00190.

    The text sees the prefix and the prefix sees nothing; it is not rotated, not cached, and T5's position bias of it
    is 0. It needs the family's attention to go through transformers' AttentionInterface (Bloom's and Falcon's do not).
    Not mergeable; `pk.eject` leaves 2 * length * width numbers per layer and drops the network.
    """

    length: int = 30  # l
    hidden: int = 512  # m of the network that makes the prefix; 0: the prefix itself is trained
    shift: bool = False  # the positions of the text begin behind the prefix, as in the authors' code and HF PEFT

    def __post_init__(self):
        super().__post_init__()
        if self.length < 1 or self.hidden < 0:
            raise ValueError(f"PrefixTuning length = {self.length}, hidden = {self.hidden}; expected at least 1 and 0")

    identity = False

    def expand(self, part: Part) -> list[Part]:
        positions = Part(Shift(self.length), Shift.roles)
        return [part, positions] if self.shift else [part]

    def select(self, sites: list[Site]) -> list[Site]:
        return [site for site in sites if site.role in ("attn", "cross.attn")]

    def attached(self, tuners: list[Tuner]) -> None:
        kinds: dict[str, list[SharedTuner]] = {}
        for tuner in cast("list[SharedTuner]", tuners if self.hidden else []):
            kinds.setdefault(re.sub(r"\d+", "#", tuner.site_name), []).append(tuner)
        for own in kinds.values():
            share(own, "e", "w1", "b1")

    def ejected(self) -> PrefixTuning:
        return replace(self, hidden=0)


class PrefixTuner(SharedTuner, method=PrefixTuning):
    gated = True
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
        h = torch.tanh(F.linear(lender.e, lender.w1, lender.b1)).to(device)
        k, v = F.linear(h, self.w2, self.b2).chunk(2, dim=-1)
        return k, v

    def ejected(self) -> dict[str, Tensor]:
        return {} if "k" in self._parameters else dict(zip("kv", self.prefix(), strict=True))

    def forward(self, base: Base, x: Tensor, *args: Any, gate: Tensor | None = None, **kwargs: Any) -> Any:
        """gate [rows, 1, 1]: a factor of the prefix for each row of the batch, or [rows, queries, 1] for each query."""
        each = gate is not None and gate.shape[1] > 1
        k, v = (p[None] if gate is None or each else p * gate.to(p.dtype) for p in self.prefix())
        return _with(self.key, Prefix(k, v, gate=gate if each else None), base, (_again(base, x), *args), kwargs)

    @classmethod
    def forward_many(cls, base: Any, tuners: dict[int, Tuner], route: Routing, *args: Any, **kwargs: Any) -> Any:
        """The prefixes of all adapters in one call, the shorter ones padded and masked."""
        refuse(base, (), {})  # the cache does not hold a prefix
        rows, numbers = route.rows(args[0].shape[0], base.site.name), set(route.numbers)
        compiling = torch.compiler.is_compiling()
        own = {n: cast(PrefixTuner, t) for n, t in tuners.items() if compiling or n in numbers}
        if not own:
            return base(*args, **kwargs)
        if len(own) == len(numbers) == 1 and not compiling:
            return next(iter(own.values()))(base, *args, **kwargs)
        args, kwargs = in_rows((args, kwargs), rows)
        pairs, lengths = [t.prefix() for t in own.values()], [*(t.length for t in own.values()), 0]
        device, key, longest = pairs[0][0].device, ("prefix", *own, *lengths), max(lengths)
        place = route.once((*key, rows, device), lambda: _places(route.expanded(rows), [*own]).to(device))
        k, v = (_stacked([pair[i] for pair in pairs], longest)[place] for i in (0, 1))
        mask = None
        if compiling or len(set(lengths[:-1])) > 1 or not numbers <= set(own):
            mask = (torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None])[place]
        return _with(own[min(own)].key, Prefix(k, v, mask), base, args, kwargs)


def _places(ids: Tensor, own: list[int]) -> Tensor:
    """Adapter numbers [rows] -> where among `own` they are, or behind."""
    table = torch.full((max(own) + 2,), len(own), device=ids.device)
    for place, number in enumerate(own):
        table[number] = place
    return table[ids.where(ids <= max(own), -1)]


def _stacked(flat: list[Tensor], length: int) -> Tensor:
    """[l_i, width] -> [how many and one of zeros, length, width]."""
    padded = [F.pad(p.to(flat[0].device), (0, 0, 0, length - len(p))) for p in flat]
    return torch.stack([*padded, torch.zeros_like(padded[0])])


def _again(base: Any, x: Tensor) -> Tensor:
    """x as an object of its own where the output for x is known below: it must be computed with the prefix."""
    while isinstance(base, Base) and base.below is not None:
        base = base.below
    return x.view_as(x) if isinstance(base, (Known, RowBase)) else x


def _with(key: str, prefix: Prefix, base: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """base(*args) with a prefix in its attention, beside those of tuners above."""
    others = noted(key) or ()
    note(key, (prefix, *others))
    try:
        return base(*args, **kwargs)
    finally:
        note(key, others) if others else forget((key,))
