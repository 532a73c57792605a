"""S4: another mixture of adapter (A), prefix (P), BitFit (B) and LoRA (L) in each of four groups of layers.

    A + L    A + P    A + P + B    P + B + L        the layers of a stack in order, the middle groups the larger ones

Every layer trains as many numbers: the budget over the number of layers. B takes what biases there are, the others of a
layer share the rest alike. With d features, widths q, v of LoRA's layers and k of the keys a bottleneck of m takes
2 d m + m + d numbers, a rank of r takes r (in + out of q and v), a prefix of l takes 2 l k in each attention.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import nn

from ..engine.method import Method, Part
from ..engine.recipe import as_parts, at
from ..engine.roles import layer_of, resolve
from ..engine.site import Site, base_numbers
from ._hybrid import Placed
from .bitfit import BitFit
from .lora import LoRA
from .pfeiffer import Pfeiffer
from .prefix import PrefixTuning

# Biases first: what sits at the same module is above them.
GROUPS = ("AL", "AP", "BAP", "BPL")
_TARGETS = {"A": ("down",), "L": ("q", "v"), "P": ("attn",), "B": ("*",)}


@dataclass(frozen=True)
class S4(Placed, roles=(), lr=1e-3, tiny={"budget": 20.0}, kinds=None, family="hybrid", kernel="lora bottleneck"):
    """Four spindle groups of layers, each with a mixture of its own. Chen et al. 2023, arXiv:2301.01821.

    Groups of 12 layers are 2, 4, 4 and 2; fewer than four layers lack the outer ones. An encoder-decoder model has
    four groups in each stack, and its budget is spread over the layers of both. Not mergeable.
    """

    budget: float = 0.5  # trained numbers, in percent of those of the model
    members: tuple[Part, ...] = ()  # what that comes to, filled in by attach

    identity = False

    def __post_init__(self):
        super().__post_init__()
        if self.budget <= 0:
            raise ValueError(f"S4 budget = {self.budget}; expected a percentage above 0")
        if self.members:
            object.__setattr__(self, "members", as_parts(self.members))

    def parts(self) -> tuple[Part, ...]:
        if not self.members:
            raise ValueError("S4 has no members before pk.attach has seen the model; attach it alone or in a pk.Union")
        return self.members

    def made_of(self) -> set[type[Method]]:
        return {Pfeiffer, LoRA, PrefixTuning, BitFit}

    def solved(self, model: nn.Module, part: Part) -> Method:
        if self.members:
            return self
        costs = _costs(model, part)
        depth = sum(len(layers) for layers in costs.values())
        total = sum(p.numel() for _, p in base_numbers(model))
        members = []
        for stack, layers in costs.items():
            others = tuple(f"{other}.*" for other in costs if other != stack)
            numbers, start = sorted(layers), 0
            for kinds, size in zip(GROUPS, spindle(len(layers)), strict=True):
                group, start = numbers[start : start + size], start + size
                sizes: dict[tuple[int, ...], list[int]] = {}
                for n in group:
                    sizes.setdefault(_sizes(kinds, layers[n], total * self.budget / 100 / depth), []).append(n)
                for own, where in sizes.items():
                    for kind, units in zip(kinds, own, strict=True):
                        members.append(at(_TARGETS[kind], _method(kind, units), exclude=others, layers=where))
        return replace(self, members=tuple(members))


def spindle(layers: int) -> tuple[int, int, int, int]:
    """How many layers each group has: the outer ones a sixth each, those between them the rest."""
    outer = round(layers / 6)
    rest = layers - 2 * outer
    return outer, (rest + 1) // 2, rest // 2, outer


Cost = dict[str, tuple[int, int]]  # kind of part -> numbers of a unit (of bottleneck, rank, length) and beside them


def _costs(model: nn.Module, part: Part) -> dict[str, dict[int, Cost]]:
    """Stack -> layer -> what its parts cost."""

    def by_layer(targets: Iterable[str]) -> dict[str, list[Site]]:
        found: dict[str, list[Site]] = {}
        for site in resolve(model, tuple(targets), exclude=part.exclude, layers=part.layers):
            if block := next((b for b in blocks if site.name == b or site.name.startswith(f"{b}.")), None):
                found.setdefault(block, []).append(site)
        return found

    blocks = [site.name for site in resolve(model, ("block",), layers=part.layers)]
    a, q_v, k, b = (by_layer(targets) for targets in (("down",), ("q", "v"), ("k",), ("*",)))
    out: dict[str, dict[int, Cost]] = {}
    for block in blocks:
        d = sum(site.n_out for site in a.get(block, ()))
        biases = BitFit().select(b.get(block, []))
        cost = {
            "A": (2 * d + len(a.get(block, ())), d),
            "L": (sum(site.n_in + site.n_out for site in q_v.get(block, ())), 0),
            "P": (2 * sum(site.n_out for site in k.get(block, ())), 0),
            "B": (0, sum(site.n_out for site in biases)),
        }
        stack, number = block.rpartition(".")[0].rpartition(".")[0], layer_of(block)
        assert number is not None  # blocks are the members of a list
        out.setdefault(stack, {})[number] = cost
    return out


def _sizes(kinds: str, cost: Cost, target: float) -> tuple[int, ...]:
    """The units of each part so that together they have `target` numbers, less than a unit of the finest below it."""
    fixed = sum(cost[kind][1] for kind in kinds)
    scaled = sorted((kind for kind in kinds if cost[kind][0]), key=lambda kind: -cost[kind][0])
    units, left = dict.fromkeys(kinds, 0), target - fixed
    for i, kind in enumerate(scaled):
        units[kind] = max(1, int(left / (len(scaled) - i) / cost[kind][0]))
        left -= units[kind] * cost[kind][0]
    if left < 0:
        least = fixed + sum(cost[kind][0] for kind in scaled)
        raise ValueError(
            f"S4 budget leaves {int(target):,} numbers for each layer, and one of its groups needs {least:,}; "
            "raise budget"
        )
    return tuple(units[kind] for kind in kinds)


def _method(kind: str, units: int) -> Method:
    if kind == "L":
        return LoRA(rank=units, alpha=float(units))
    if kind == "P":
        return PrefixTuning(length=units, hidden=0)
    return Pfeiffer(size=units) if kind == "A" else BitFit()
