"""Methods from words of the command line: a key or a recipe file, and field=value."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import types
import typing
from collections.abc import Sequence
from typing import Any

from .engine.method import Method, Part, fields, method_of, needed
from .engine.text import shown
from .recipes import is_recipe, recipe

_BOOL = {"true": True, "1": True, "false": False, "0": False}


def method_from(key: str, settings: Sequence[str]) -> Any:
    """The method `key`, or that of a recipe file, with its fields set from "field=value" words.

    ValueError names the known methods or fields.
    """
    given = method_of_word(key)
    cls: Any = given if isinstance(given, type) else type(given)
    hints = typing.get_type_hints(cls)
    known = [f.name for f in fields(cls)]
    values = {}
    for word in settings:
        name, equals, text = word.partition("=")
        if not equals:
            raise ValueError(f"--set {word}: expected field=value")
        if name not in known:
            raise ValueError(f"--set {word}: {cls.key} has no field {name!r}; it has {', '.join(known) or 'none'}")
        try:
            values[name] = parse(hints[name], text)
        except (ValueError, TypeError):  # of json and int too, whose text says less than the line below
            raise ValueError(f"--set {word}: expected {shown(hints[name])}") from None
    if cls is not given:
        return dataclasses.replace(given, **values)
    if missing := [name for name in needed(cls) if name not in values]:
        raise ValueError(f"--method {key} needs --set {missing[0]}=..., {shown(hints[missing[0]])} such as lora")
    return cls(**values)


def method_of_word(key: str) -> Any:
    """The class of a method, or the method of a recipe file."""
    return recipe(key) if is_recipe(key) else method_of(key)


def parse(hint: Any, text: str) -> Any:
    """`text` as a value of the type `hint`; ValueError if it is none.

    bool: true, false, 1 or 0; a tuple: a,b,c or a JSON list; a dict: a JSON object; an optional value: none; a method:
    its key, or its JSON as in an adapter's configuration.
    """
    origin, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for choice in sorted(inner, key=lambda t: t is str):  # any text is a str, so that comes last
            with contextlib.suppress(ValueError, TypeError):
                return parse(choice, text)
    elif origin is typing.Literal and text in map(str, inner):
        return next(choice for choice in inner if str(choice) == text)
    elif origin is type(None) and text.lower() in ("none", "null"):
        return None
    elif origin is bool and text.lower() in _BOOL:
        return _BOOL[text.lower()]
    elif origin in (tuple, list):
        items = json.loads(text) if text.startswith("[") else [word for word in text.split(",") if word]
        return origin(parse(inner[0], _text(item)) if inner else item for item in items)
    elif origin is dict:
        items = json.loads(text)
        return {name: parse(inner[1], str(item)) if inner else item for name, item in dict(items).items()}
    elif origin in (int, float, str):
        return origin(text)
    elif origin is Method:
        return Method.from_json(json.loads(text) if text.startswith("{") else {"method": text})
    elif origin is Part:
        data = json.loads(text) if text.startswith("{") else {"method": text}
        return Part.from_json(data) if isinstance(data.get("method"), dict) else Part(Method.from_json(data))
    raise ValueError(f"{text!r} is no {shown(hint)}")


def _text(item: Any) -> str:
    return item if isinstance(item, str) else json.dumps(item)
