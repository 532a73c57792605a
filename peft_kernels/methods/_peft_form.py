"""What all files of Hugging Face PEFT have in common: fields of their configuration, and modules trained whole."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..engine.attach import Adapter
from ..engine.method import Method, Part
from ..engine.site import base_numbers
from .full import Head


class Form(ABC):
    """A kind of PEFT's files.   kind: its peft_type.   title: of the method."""

    kind: ClassVar[str]
    title: ClassVar[str]

    @abstractmethod
    def takes(self, method: Method) -> bool:
        """Whether these files are for such a method."""

    @abstractmethod
    def read(
        self, model: nn.Module, config: Mapping[str, Any], given: dict[str, Tensor], where: str
    ) -> tuple[Adapter, dict[str, Tensor]]:
        """(what to attach, its tensors under our keys)."""

    @abstractmethod
    def write(self, model: nn.Module, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors under PEFT's keys, what its adapter_config.json says) of an adapter of ours."""

    def whole(
        self, model: nn.Module, given: Mapping[str, Tensor], prefix: str, names: Iterable[str], where: str
    ) -> tuple[list[Part], dict[str, Tensor]]:
        """The modules called `names` that are trained whole: a part of them, if any, and its tensors under our keys.

        given: prefix and path of the parameter -> value. Numbers of the model as it is count for nothing: PEFT saves
        embeddings and heads beside some adapters. ValueError for any other.
        """
        values: dict[str, Tensor] = {}
        paths: dict[str, None] = {}
        known = dict(base_numbers(model))
        for full, value in given.items():
            key = full.removeprefix(prefix)
            path, at = _module(key, names), known.get(key.replace(".base_layer.", "."))
            if path is not None:
                paths[path], values[f"{path}.copy.{key[len(path) + 1 :]}"] = None, value
            elif at is None or at.shape != value.shape or not torch.equal(at.to(value), value):
                raise ValueError(f"{where} has {full}, which is neither {self.title} nor of modules_to_save")
        return [Part(Head(), tuple(f"@{path}" for path in paths))] if paths else [], values


def common(model: nn.Module, kind: str, task: str | None = None) -> dict[str, Any]:
    """The fields that all of PEFT's configurations have."""
    source = str(getattr(getattr(model, "config", None), "name_or_path", "")) or None
    return {"peft_type": kind, "task_type": task, "base_model_name_or_path": source, "inference_mode": True}


def kept(values: Mapping[str, Tensor], whole: list[str], prefix: str) -> dict[str, Tensor]:
    """The tensors of modules trained whole under PEFT's keys."""
    places = {f"{path}.copy.": path for path in whole}
    found = ((key, at) for key in values for at in places if key.startswith(at))
    return {f"{prefix}{places[at]}.{key.removeprefix(at)}": values[key] for key, at in found}


def _module(key: str, names: Iterable[str]) -> str | None:
    """The path of the module among `names` that a key is of."""
    parts, names = key.split("."), tuple(names)
    starts = (".".join(parts[:i]) for i in range(1, len(parts)))
    return next((path for path in starts if any(path == n or path.endswith(f".{n}") for n in names)), None)
