"""Files of Hugging Face PEFT for methods of single layers, and beside them modules that are trained whole.

base_model.model.<path>.<tensor of the method>    base_model.model.<path>.<parameter>
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..engine.attach import Adapter, chosen_sites, state_of, tuners
from ..engine.method import Method, Part, Replica, Tuner
from ..engine.site import Site, base_modules, base_numbers
from ..engine.stack import Parts
from ..engine.store import tensors
from ._updates import at_path
from .full import Head

PREFIX = "base_model.model."
Own = dict[str, dict[str, Tensor]]  # path -> tensor of the method -> its value


class Member(NamedTuple):
    """A tuner as its method has it at its site."""

    site: Site
    method: Any
    tuner: Any


class Layers:
    """A kind of PEFT's files.   kind: its peft_type.   title: of the method.   key: (path, tensor) of PEFT's keys."""

    kind: ClassVar[str]
    title: ClassVar[str]
    key: ClassVar[re.Pattern]

    # -- what a kind says ---------------------------------------------------------------------------------------------

    def takes(self, method: Method) -> bool:
        """Whether these files are for such a method."""
        raise NotImplementedError

    def ours(self, config: Mapping[str, Any], own: Own, where: str) -> tuple[Method, dict[str, Tensor]]:
        """(the method, its tensors under our keys)"""
        raise NotImplementedError

    def unfit(self, member: Member) -> str:
        """Why PEFT has no such layer, or ""."""
        raise NotImplementedError

    def theirs(self, own: dict[str, list[Member]], where: str) -> tuple[Own, dict[str, Any]]:
        """(PEFT's tensors, fields of its configuration)   own: path -> the tuners of its rows, or the one of all."""
        raise NotImplementedError

    # -- reading ------------------------------------------------------------------------------------------------------

    def read(
        self, model: nn.Module, config: Mapping[str, Any], given: dict[str, Tensor], where: str
    ) -> tuple[Adapter, dict[str, Tensor]]:
        """(what to attach, its tensors under our keys)."""
        own: Own = {}
        values: dict[str, Tensor] = {}
        whole: dict[str, None] = {}
        for key, value in given.items():
            body = key.removeprefix(PREFIX)
            if match := self.key.fullmatch(body):
                own.setdefault(match[1], {})[match[2]] = value
            elif path := _whole(body, config.get("modules_to_save") or ()):
                whole[path], values[f"{path}.copy.{body[len(path) + 1 :]}"] = None, value
            elif not _of_the_base(model, body, value):
                raise ValueError(f"{where} has {key}, which is neither {self.title} nor of modules_to_save")
        if not own:
            raise ValueError(f"{where} has no tensors of {self.title}; expected some under {PREFIX}<path>")
        method, found = self.ours(config, own, where)
        parts = [Part(method, tuple(f"@{path}" for path in own))]
        if whole:
            parts.append(Part(Head(), tuple(f"@{path}" for path in whole)))
        return Adapter(parts, 0), values | found

    # -- writing ------------------------------------------------------------------------------------------------------

    def write(self, model: nn.Module, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors under PEFT's keys, what its adapter_config.json says) of an adapter of ours."""
        made = dict(tuners(model, name))
        own: dict[str, list[Member]] = {}
        whole: list[str] = []
        for _, method, site in chosen_sites(model, state_of(model).adapters[name]):
            tuner: Tuner = made[site.name]
            if isinstance(tuner, Replica) and site.name:
                whole.append(site.name)
                continue
            if isinstance(tuner, Parts):
                tuner = tuner.get_submodule(site.role)  # type: ignore[assignment]
            if not self.takes(method) or type(tuner) is not method.tuner:
                raise ValueError(f"{name!r} has {method.key} at {site}; these files of PEFT take {self.title} alone")
            member = Member(site, method, tuner)
            if reason := self.unfit(member):
                raise ValueError(f"{site} {reason}")
            own.setdefault(site.name, []).append(member)
        values, fields = self.theirs(own, repr(name))
        flat = {f"{PREFIX}{path}.{key}": value for path, some in values.items() for key, value in some.items()}
        for key, value in tensors(model, name).items():
            if path := next((path for path in whole if key.startswith(f"{path}.copy.")), None):
                flat[f"{PREFIX}{path}.{key.removeprefix(f'{path}.copy.')}"] = value
        return flat, {
            **common(model, self.kind),
            "target_modules": targets(model, list(own)),
            "modules_to_save": whole or None,
            **fields,
        }


def common(model: nn.Module, kind: str, task: str | None = None) -> dict[str, Any]:
    """The fields that all of PEFT's configurations have."""
    source = str(getattr(getattr(model, "config", None), "name_or_path", "")) or None
    return {"peft_type": kind, "task_type": task, "base_model_name_or_path": source, "inference_mode": True}


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


def _whole(key: str, names: Iterable[str]) -> str | None:
    """The path of the module in modules_to_save that a key is of."""
    parts = key.split(".")
    starts = (".".join(parts[:i]) for i in range(1, len(parts)))
    return next((path for path in starts if any(path == n or path.endswith(f".{n}") for n in names)), None)


def _of_the_base(model: nn.Module, key: str, value: Tensor) -> bool:
    """Whether it is a number of the model as it is: PEFT saves embeddings beside adapters of them."""
    name = key.replace(".base_layer.", ".")
    known = next((p for path, p in base_numbers(model) if path == name), None)
    return known is not None and known.shape == value.shape and torch.equal(known.to(value), value)
