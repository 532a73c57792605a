"""The parts of a recipe's adapter, each of which can be attached without the others."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from torch import Tensor, nn

from .attach import Adapter, chosen_sites, places
from .method import Part
from .recipe import Recipe


def parts_of(adapter: Adapter) -> list[tuple[Part, int]]:
    """(part, its first number in `Adapter.expanded`): of recipes their parts, then what is trained beside them."""
    out, level = [], 0
    for given in adapter.parts:
        for part in _leaves(given):
            out.append((part, level))
            level += len(part.method.expand(part))
    return out


def _leaves(part: Part) -> Iterator[Part]:
    if isinstance(part.method, Recipe):
        for own in part.method.placed(part):
            yield from _leaves(own)
    else:
        yield part


def part_of(
    model: nn.Module, adapter: Adapter, values: dict[str, Tensor], wanted: str | int
) -> tuple[Adapter, dict[str, Tensor]]:
    """(an adapter of one part, its tensors) of an adapter for `model` and its tensors, as `tensors` names them.

    wanted: the key of its method, or its number. ValueError lists the parts if that is none or several of them.
    """
    parts = parts_of(adapter)
    found = [n for n, (part, _) in enumerate(parts) if wanted in (part.method.key, n)]
    if len(found) != 1:
        listed = ", ".join(f"{n} {part.method.key}" for n, (part, _) in enumerate(parts))
        fix = f"is {len(found)} parts; give a number" if found else "is no part of it; choose one"
        raise ValueError(f"part = {wanted!r} {fix}: {listed}")
    part, first = parts[found[0]]
    single = Adapter([part], adapter.seed + first)  # a tuner's seed is the adapter's plus the number of its part
    old, own = _placed(model, adapter, first), _placed(model, single)
    if covered := sorted({f"@{path}" for _, path, *_ in own.keys() - old.keys()}):  # another part trains these whole
        single.parts = [dataclasses.replace(part, exclude=(*part.exclude, *covered))]
        own = _placed(model, single)
    moved, known = {}, {place: own.get(where) for where, place in old.items()}
    for key, value in values.items():
        at = next((start for start in _starts(key) if start in known), None)  # the longest: sites may lie in others
        if at is None:
            raise ValueError(f"the adapter does not fit this model, which lacks the place of {key}")
        if (place := known[at]) is not None:
            moved[".".join(filter(None, (place, key[len(at) :].lstrip("."))))] = value
    return single, moved


def _placed(model: nn.Module, adapter: Adapter, first: int = 0) -> dict[tuple, str]:
    """(number of the part less `first`, path, role, rows, is it a span) of each tuner -> its place in the tensors."""
    chosen = chosen_sites(model, adapter)
    return {
        (level - first, site.name, site.role, site.rows, site.entry is not None): place
        for (level, _, site), place in zip(chosen, places(chosen), strict=True)
    }


def _starts(key: str) -> Iterator[str]:
    """The places that may hold a tensor of this name, the longest first."""
    words = key.split(".")
    return (".".join(words[:n]) for n in range(len(words) - 1, -1, -1))
