"""Recipe files: a method, or several each at its own targets, in YAML or JSON; an error names the line."""

from __future__ import annotations

import contextlib
import os
import re
import types
import typing
from pathlib import Path
from typing import Any

from .engine.method import Method, Part, fields, method_of, methods, needed
from .engine.text import shown
from .methods import Union

SUFFIXES = (".yaml", ".yml", ".json")
_PLACE = {"targets": tuple[str, ...], "exclude": tuple[str, ...], "layers": tuple[int, ...] | None}


def recipe(source: str | os.PathLike) -> Method:
    """The method that a recipe says, in YAML or JSON.

    source: a path, which as a str ends in .yaml, .yml or .json; any other str is the text itself.

    A recipe is `method: KEY` with fields of the method beside it, or `parts:`, a list of such, which becomes a
    pk.Union in this order. Beside either may stand targets, exclude and layers, as pk.at takes them, unless the method
    has a field of that name; `method: {method: KEY, ...}` keeps the two apart. Where a field is a method, it is written
    in the same way, or as its key alone; what `to_json` of a method returns is a recipe too.

    ValueError "<file>:<line>: ..." on what cannot be read, and for targets and layers that a model lacks when the
    recipe is attached to it; OSError for a file that is not there; ImportError without PyYAML.
    """
    if isinstance(source, str) and not is_recipe(source):
        return _Reader("recipe", source).recipe()
    return _Reader(os.fspath(source), Path(source).read_text(encoding="utf-8")).recipe()


def is_recipe(word: str) -> bool:
    """Whether this is the path of a recipe file, and not the key of a method."""
    return "\n" not in word and word.endswith(SUFFIXES)


class _Reader:
    """Reads the nodes of a YAML document, whose lines are known, into methods by the types of their fields."""

    def __init__(self, name: str, text: str):
        try:
            import yaml
        except ModuleNotFoundError:
            raise ImportError('PyYAML is not installed; pip install "peft-kernels[cli]"') from None
        self.name = name
        if text.lstrip().startswith(("{", "[")):
            text = text.replace("\t", " ")  # JSON may be indented with tabs, and YAML may not
        try:
            for event in yaml.parse(text, yaml.SafeLoader):
                if isinstance(event, yaml.AliasEvent):
                    raise ValueError(f"{self.at(event)}: an alias (*{event.anchor}); write out what it stands for")
            self.root = yaml.compose(text, yaml.SafeLoader)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = mark.line if mark else text.count("\n", 0, getattr(error, "position", 0))
            why = getattr(error, "problem", None) or getattr(error, "reason", "not YAML")
            raise ValueError(f"{name}:{line + 1}: {why}") from None
        if self.root is None:
            raise ValueError(f"{name}:1: an empty recipe; expected `method: lora` or `parts:`")

    def at(self, node: Any) -> str:
        return f"{self.name}:{node.start_mark.line + 1}"

    def wrong(self, node: Any, text: object) -> ValueError:
        return ValueError(f"{self.at(node)}: {text}")

    def recipe(self) -> Method:
        part = self.part(self.root)
        placed = part.targets or part.exclude or part.layers is not None
        return Union(part) if placed else part.method

    def part(self, node: Any) -> Part:
        if node.id == "scalar":
            return Part(self.made(node, {}), lines={"method": self.at(node)})
        entries = self.entries(node)
        cls = methods().get(str(entries["method"][1].value)) if "method" in entries else None
        own = {f.name for f in fields(cls)} if cls else set()
        place = {key: entries.pop(key) for key in _PLACE if key in entries and key not in own}
        if "parts" in entries:
            key, listed = entries.pop("parts")
            self.refuse(entries, (*_PLACE, "parts"))
            if listed.id != "sequence" or not listed.value:
                raise self.wrong(listed, "parts; expected a list of methods")
            method: Method = Union(*(self.part(item) for item in listed.value))
        elif "method" not in entries:
            self.refuse(entries, ("method with its fields", "parts"))
            raise self.wrong(node, "no method; expected `method: lora` or `parts:`")
        else:
            key, named = entries.pop("method")
            if named.id == "mapping":  # as in the configuration of a saved adapter
                self.refuse(entries, (*_PLACE, "method"))
                method = self.method(named, "method")
            else:
                method = self.made(named, entries)
        lines = {"method": self.at(key), **{name: self.at(own) for name, (own, _) in place.items()}}
        values = {name: self.value(value, _PLACE[name], name) for name, (_, value) in place.items()}
        return Part(method, **values, lines=lines)

    def method(self, node: Any, what: str) -> Method:
        part = self.part(node)
        for name in _PLACE:
            if name in part.lines:
                raise ValueError(f"{part.lines[name]}: {name} of the method inside {what}; give them outside of it")
        return part.method

    def made(self, named: Any, entries: dict[str, Any]) -> Method:
        """The method whose key is a node, with these fields."""
        if named.id != "scalar":
            raise self.wrong(named, "a list as a method; several methods are `parts:`")
        try:
            cls: Any = method_of(named.value)
        except ValueError as error:
            raise self.wrong(named, error) from None
        known, hints = [f.name for f in fields(cls)], typing.get_type_hints(cls)
        for name, (key, _) in entries.items():
            if name not in known:
                raise self.wrong(key, f"unknown field {name!r} of {cls.__name__}; it has {', '.join(known) or 'none'}")
        for name in needed(cls):
            if name not in entries:
                raise self.wrong(named, f"{cls.__name__} needs the field {name}")
        values = {name: self.value(node, hints[name], name) for name, (_, node) in entries.items()}
        try:
            return cls(**values)
        except ValueError as error:
            told = [key for name, (key, _) in entries.items() if re.search(rf"\b{name}\b", str(error))]
            only = [key for key, _ in entries.values()] if len(entries) == 1 else []
            raise self.wrong([*told, *only, named][0], error) from None

    def refuse(self, entries: dict[str, Any], expected: tuple[str, ...]) -> None:
        """ValueError on the first of them."""
        for name, (key, _) in entries.items():
            raise self.wrong(key, f"unknown key {name!r}; expected {', '.join(expected[:-1])} or {expected[-1]}")

    def entries(self, node: Any) -> dict[str, Any]:
        """Of a mapping: name -> (node of the name, node of the value)."""
        if node.id != "mapping":
            raise self.wrong(node, "a list; several methods are `parts:`")
        out: dict[str, Any] = {}
        for key, value in node.value:
            if key.id != "scalar":
                raise self.wrong(key, "a key that is no word")
            if key.value in out:
                raise self.wrong(key, f"{key.value} is given twice")
            out[key.value] = key, value
        return out

    def value(self, node: Any, hint: Any, name: str) -> Any:
        """A node as a value of the type `hint`; `name`: of the field that it is for."""
        origin, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
        scalar, plain = node.id == "scalar", node.id == "scalar" and node.style is None
        if origin in (typing.Union, types.UnionType):
            for choice in sorted(inner, key=lambda t: t is str):  # any text is a str, so that comes last
                with contextlib.suppress(ValueError):
                    return self.value(node, choice, name)
        elif origin is Method:
            return self.method(node, name)
        elif origin is Part:
            return self.part(node)
        elif origin is types.NoneType and plain and node.value in ("null", "none", "~", ""):
            return None
        elif origin is bool and plain and node.value in ("true", "false"):
            return node.value == "true"
        elif origin in (int, float) and plain:
            with contextlib.suppress(ValueError):
                return origin(node.value)
        elif origin is str and scalar:
            return node.value
        elif origin in (tuple, list) and node.id != "mapping":
            items = [node] if scalar else node.value
            return origin(self.value(item, inner[0] if inner else str, name) for item in items)
        elif origin is dict and node.id == "mapping":
            kinds = inner or (str, str)
            pairs = self.entries(node).values()
            return {self.value(k, kinds[0], name): self.value(v, kinds[1], name) for k, v in pairs}
        given = repr(node.value) if scalar else {"mapping": "a mapping", "sequence": "a list"}[node.id]
        raise self.wrong(node, f"{name} = {given}; expected {shown(hint)}")
