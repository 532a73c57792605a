"""Files of Hugging Face PEFT for methods of single layers, and beside them modules that are trained whole.

base_model.model.<path>.<tensor of the method>    base_model.model.<path>.<parameter>
"""

from __future__ import annotations

import re
import statistics
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..engine.attach import Adapter, chosen_sites, state_of, tuners
from ..engine.method import Method, Part, Replica, Tuner
from ..engine.site import Site, base_modules
from ..engine.stack import Parts
from ..engine.store import tensors
from ._peft_form import Form, common, kept
from ._updates import at_path

PREFIX = "base_model.model."
Own = dict[str, dict[str, Tensor]]  # path -> tensor of the method -> its value


class Member(NamedTuple):
    """A tuner as its method has it at its site."""

    site: Site
    method: Any
    tuner: Any


class Layers(Form):
    """A kind of methods of single layers.   key: (path, tensor) of PEFT's keys.   tuners: of the methods."""

    key: ClassVar[re.Pattern]
    tuners: ClassVar[tuple[type[Tuner], ...]]

    def takes(self, method):
        return method.tuner in self.tuners

    # -- what a kind says ---------------------------------------------------------------------------------------------

    @abstractmethod
    def ours(self, config: Mapping[str, Any], own: Own, where: str) -> tuple[Method, dict[str, Tensor]]:
        """(the method, its tensors under our keys)"""

    @abstractmethod
    def unfit(self, member: Member) -> str:
        """Why PEFT has no such layer, or ""."""

    @abstractmethod
    def theirs(self, own: dict[str, list[Member]], where: str) -> tuple[Own, dict[str, Any]]:
        """(PEFT's tensors, fields of its configuration)   own: path -> the tuners of its rows, or the one of all."""

    # -- reading ------------------------------------------------------------------------------------------------------

    def read(self, model, config, given, where):
        own: Own = {}
        rest: dict[str, Tensor] = {}
        for key, value in given.items():
            if match := self.key.fullmatch(key.removeprefix(PREFIX)):
                own.setdefault(match[1], {})[match[2]] = value
            else:
                rest[key] = value
        heads, values = self.whole(model, rest, PREFIX, config.get("modules_to_save") or (), where)
        if not own:
            raise ValueError(f"{where} has no tensors of {self.title}; expected some under {PREFIX}<path>")
        method, found = self.ours(config, own, where)
        return Adapter([Part(method, tuple(f"@{path}" for path in own)), *heads], 0), values | found

    # -- writing ------------------------------------------------------------------------------------------------------

    def write(self, model, name):
        made = dict(tuners(model, name))
        own: dict[str, list[Member]] = {}
        whole: list[str] = []
        for _, method, site in chosen_sites(model, state_of(model).adapters[name]):
            tuner = made[site.name]
            if isinstance(tuner, Replica) and site.name:
                whole.append(site.name)
                continue
            if isinstance(tuner, Parts):
                tuner = tuner.get_submodule(site.role)
            if not self.takes(method) or type(tuner) is not method.tuner:
                raise ValueError(f"{name!r} has {method.key} at {site}; these files of PEFT take {self.title} alone")
            member = Member(site, method, tuner)
            if reason := self.unfit(member):
                raise ValueError(f"{site} {reason}")
            own.setdefault(site.name, []).append(member)
        values, fields = self.theirs(own, repr(name))
        flat = {f"{PREFIX}{path}.{key}": value for path, some in values.items() for key, value in some.items()}
        return flat | kept(tensors(model, name), whole, PREFIX), {
            **common(model, self.kind),
            "target_modules": targets(model, list(own)),
            "modules_to_save": whole or None,
            **fields,
        }


def targets(model: nn.Module, paths: list[str]) -> list[str] | str:
    """The paths, or where PEFT, which looks at the ends of paths, would find others too, an expression for them."""
    others = [path for path, _ in base_modules(model) if path not in paths]
    if any(other.endswith(f".{path}") for other in others for path in paths):
        return "|".join(map(re.escape, paths))
    return paths


def ranked(config: Mapping[str, Any], names: tuple[str, str], defaults: tuple[Any, Any], own: Own, where: str) -> dict:
    """The fields of rank and alpha, of all and by path.   names: PEFT's.   defaults: its."""
    fields: dict[str, Any] = {}
    for field, name, default in zip(("rank", "alpha"), names, defaults, strict=True):
        value, pattern = config.get(name, default), config.get(f"{field}_pattern")
        at = {f"@{path}": at_path(path, value, pattern, where) for path in own}
        fields[field], fields[f"{field}_pattern"] = value, {path: v for path, v in at.items() if v != value}
    return fields


def patterned(found: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(the commonest value, the others by an expression of the path), of path -> value."""
    value = statistics.mode(found.values())
    return value, {f"^{re.escape(path)}": v for path, v in found.items() if v != value}


def placed(member: Member, rows: Tensor, whole: Tensor) -> Tensor:
    """`whole`, one of the rows of a layer, with the rows of a tuner in their place."""
    if member.site.rows is None:
        return rows
    places = member.site.rows.of(torch.arange(len(whole)))
    whole[places] = rows.to(whole)
    return whole


def width(site: Site) -> int:
    """Features of the output of the layer that a site is of."""
    return Site(site.name, site.module).n_out


def conv1d(own: dict[str, list[Member]]) -> bool:
    """PEFT's word for transformers' Conv1D, of which it warns where the others are plain linears."""
    return {type(m.site.module).__name__ for some in own.values() for m in some if m.site.kind == "linear"} == {
        "Conv1D"
    }
