"""Masks by themselves: which numbers of which weights, to be saved, combined and used again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .engine.attach import all_adapters, names_of
from .engine.method import Tuner
from .engine.site import Site
from .engine.stack import Parts, Stack
from .engine.store import read_safetensors
from .methods._sparse import SparseTuner, checked

_FORMAT = "peft_kernels mask"


@dataclass(frozen=True, eq=False)
class Mask:
    """Which numbers of which weights: `a | b`, `a & b` and `a - b` make new ones, len() counts the numbers.

    positions: path of the module, "role@path" for some rows of a fused linear -> int64 [nnz], flat in the weight
        [out, in], ascending, on the CPU.
    shapes: the same -> (out, in).
    """

    positions: dict[str, Tensor]
    shapes: dict[str, tuple[int, int]]

    @staticmethod
    def of(model: nn.Module, name: str | None = None) -> Mask:
        """What one adapter (None: all) may change of the weights; methods that may change any number are left out.

        RuntimeError if a mask is not chosen yet; ValueError if there is none.
        """
        found: dict[str, list[Tensor]] = {}
        shapes = {}
        for key, site, tuner in _sites(model, name):
            touched = tuner.touched()
            if touched is None:
                continue
            if reason := tuner.ready():
                raise RuntimeError(reason)
            found.setdefault(key, []).append(touched.cpu())
            shapes[key] = (site.n_out, site.n_in)
        if not found:
            raise ValueError("the adapter has no mask; expected one of a sparse method such as pk.FishMask")
        return Mask({key: torch.cat(each).unique() for key, each in found.items()}, shapes)

    def apply(self, model: nn.Module, name: str | None = None) -> nn.Module:
        """Gives the sparse tuners of one adapter (None: all) this mask, their values starting from zero.

        Returns the model. ValueError, and nothing has changed, unless mask and tuners are of the same weights.
        """
        found = [(key, tuner) for key, _, tuner in _sites(model, name) if isinstance(tuner, SparseTuner)]
        for word, keys in (
            ("lacks", {key for key, _ in found} - self.shapes.keys()),
            ("has", self.shapes.keys() - {key for key, _ in found}),
        ):
            if keys:
                what = "" if word == "lacks" else ", where the adapter has no sparse tuner"
                raise ValueError(f"the mask {word} {min(keys)}{what}; attach the method to the targets of the mask")
        for key, tuner in found:
            if tuner.shape != self.shapes[key]:
                raise ValueError(f"the mask is of a {self.shapes[key]} weight at {key}, the model's is {tuner.shape}")
        for key, tuner in found:
            tuner.set_mask(self.positions[key])
        return model

    def save(self, path: str | os.PathLike) -> Path:
        """Writes a safetensors file, whole or not at all, and returns its path: int32 positions where they fit."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        fits = {key: rows * columns <= 2**31 for key, (rows, columns) in self.shapes.items()}
        values = {key: t.to(torch.int32) if fits[key] else t for key, t in self.positions.items()}
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            save_file(values, temporary, metadata={"format": _FORMAT, "shapes": json.dumps(self.shapes)})
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return path

    @staticmethod
    def load(path: str | os.PathLike) -> Mask:
        """Reads what `save` wrote. ValueError if the file is broken, of another format, or its positions cannot be."""
        path = Path(path)
        values, metadata = read_safetensors(path)
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"{path} is no mask; expected a file that pk.Mask.save wrote")
        shapes = {key: tuple(shape) for key, shape in json.loads(metadata["shapes"]).items()}
        if shapes.keys() != values.keys():
            raise ValueError(f"{path} has positions of other weights than it says; save the mask again")
        for key, t in values.items():
            try:
                checked(t, shapes[key])
            except ValueError as error:
                raise ValueError(f"{path}: {key}: {error}") from None
        return Mask({key: t.long() for key, t in values.items()}, shapes)

    def __or__(self, other: Mask) -> Mask:
        return self._with(other, lambda a, b: torch.cat([a, b]).unique())

    def __and__(self, other: Mask) -> Mask:
        return self._with(other, lambda a, b: a[torch.isin(a, b, assume_unique=True)])

    def __sub__(self, other: Mask) -> Mask:
        return self._with(other, lambda a, b: a[~torch.isin(a, b, assume_unique=True)])

    def __len__(self) -> int:
        return sum(map(len, self.positions.values()))

    def __str__(self) -> str:
        total = sum(rows * columns for rows, columns in self.shapes.values())
        part = len(self) / max(total, 1)
        return f"mask of {len(self):,} of {total:,} numbers ({part:.3%}) in {len(self.shapes)} weights"

    def _with(self, other: Mask, join: Callable[[Tensor, Tensor], Tensor]) -> Mask:
        """At every weight of either; one that a mask does not have is empty in it."""
        shapes = {**other.shapes, **self.shapes}
        for key, shape in other.shapes.items():
            if shape != shapes[key]:
                raise ValueError(f"{key} is a {shapes[key]} weight in one mask and {shape} in the other")
        none = torch.empty(0, dtype=torch.int64)
        both = ((key, self.positions.get(key, none), other.positions.get(key, none)) for key in shapes)
        return Mask({key: join(a, b) for key, a, b in both}, shapes)


def _sites(model: nn.Module, name: str | None) -> Iterator[tuple[str, Site, Tuner]]:
    """(name of the weight, site, tuner) of adapters: every block of rows and every part of a stack by itself."""

    def walk(site: Site, tuner: Tuner) -> Iterator[tuple[str, Site, Tuner]]:
        if isinstance(tuner, Parts):
            for inside, _, part in tuner.parts():
                yield from walk(inside, part)
        elif isinstance(tuner, Stack):
            for member in tuner.members():
                yield from walk(site, member)
        else:
            yield site.name if site.rows is None else site.address, site, tuner

    names = names_of(model, name)
    for _, adapters in all_adapters(model):
        for n, tuner in adapters.tuners.items():
            if n in names:
                yield from walk(adapters.site, tuner)
