"""quantize: the linear layers of a model packed in place; footprint: what the model then takes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..engine.attach import is_attached
from ..engine.method import words
from ..engine.packed import Packed
from ..engine.roles import picked
from ..engine.site import Site, adapters_of, base_modules, base_numbers, base_parameters
from ..ops.nf4 import checked_blocksize
from .int8 import Int8Linear
from .layer import QuantLinear
from .nf4 import NF4Linear


@dataclass(frozen=True)
class Footprint:
    """What the numbers of a base model take.

    packed: kind -> number of packed layers.   dense: paths of the linear layers that are not packed.
    bytes: of all parameters and of the scales.   dense_bytes: the same if no layer were packed.
    """

    packed: dict[str, int]
    dense: tuple[str, ...]
    bytes: int
    dense_bytes: int

    def __str__(self) -> str:
        layers = ", ".join(f"{n} layers {kind}" for kind, n in self.packed.items()) or "no packed layer"
        kept = f", {len(self.dense)} linear layers dense ({self.dense[0]}, ...)" if self.dense else ""
        share = 100 * self.bytes / max(self.dense_bytes, 1)
        return f"{layers}{kept}: {self.bytes:,} bytes, {share:.1f} % of {self.dense_bytes:,} dense"


def footprint(model: nn.Module) -> Footprint:
    """Counts the packed layers of a base model and its bytes, adapters left out."""
    kinds: dict[str, int] = {}
    dense, size, whole = [], 0, 0
    for path, module in base_modules(model):
        if isinstance(module, Packed):
            kinds[module.format] = kinds.get(module.format, 0) + 1
            size += sum(t.numel() * t.element_size() for n, t in module.stored().items() if n != "weight")
        elif Site(path, module).kind == "linear":
            dense.append(path)
    for (_, p), (_, full) in zip(base_parameters(model), base_numbers(model), strict=True):
        size += p.numel() * p.element_size()
        whole += full.numel() * full.element_size()
    return Footprint(kinds, tuple(dense), size, whole)


KINDS: dict[str, type[QuantLinear]] = {"nf4": NF4Linear, "int8": Int8Linear}


def quantize(
    model: nn.Module,
    kind: str = "nf4",
    *,
    double_quant: bool = True,
    blocksize: int = 64,
    skip: Iterable[str] = ("head", "embed"),
    progress: bool = True,
) -> nn.Module:
    """Quantises the linear layers of the model in place, one after the other, and returns the model.

    kind: "nf4", 4 bits and a scale per block, or "int8", 8 bits and a scale per row.
    double_quant: of nf4, quantise the scales too, 0.37 bits less per weight.
    blocksize: of nf4, weights that share a scale, 32, 64, ... 4096.
    skip: roles, or globs over module paths, of what stays dense with all that is in it.
    progress: a bar, if it takes longer than three seconds.
    Transformers' Conv1D becomes such a layer too. Left dense besides: a weight that two modules share (a head tied to
    the embedding), what transformers keeps in fp32 (T5's wo), parametrized layers, and what
    torch.nn.MultiheadAttention and TransformerEncoderLayer read without a call. Layers that are quantised already stay
    as they are; those of bitsandbytes (Linear4bit in NF4, Linear8bitLt) are taken over with their tensors. The dense
    weight of a layer is let go before the next layer's turn; hooks and module objects stay. On the meta device only
    shapes are made, for a packed state_dict to be loaded with assign=True.
    ValueError where nothing is left to quantise, for an unknown kind or block size, a weight that is on the meta
    device while others are not, and a model with adapters: quantise first, then attach. Dettmers et al. 2023,
    arXiv:2305.14314.
    """
    from tqdm.auto import tqdm

    if not isinstance(model, nn.Module):
        raise ValueError(f"quantize got a {type(model).__name__}; expected a torch.nn.Module")
    chosen = plan(model, kind, blocksize=blocksize, skip=skip)
    if not chosen:
        raise ValueError(f"nothing to quantise in {type(model).__name__}: {footprint(model)}")
    settings = {"double_quant": double_quant, "blocksize": blocksize} if kind == "nf4" else {}
    for _, module in tqdm(chosen, desc=kind, unit="layer", delay=3, disable=not progress, dynamic_ncols=True):
        held = _held(module)
        new = held.from_linear(module) if held else KINDS[kind].from_linear(module, **settings)  # type: ignore[attr-defined]
        _turn(module, new)
    return model


def quantized(model: nn.Module, kind: str, **settings: Any) -> bool:
    """`quantize` where anything is left to be quantised; whether it did anything."""
    if not plan(model, kind, **{k: v for k, v in settings.items() if k != "double_quant"}):
        return False
    quantize(model, kind, **settings)
    return True


def plan(
    model: nn.Module, kind: str = "nf4", *, blocksize: int = 64, skip: Iterable[str] = ("head", "embed")
) -> list[tuple[str, nn.Module]]:
    """(path, module) of the layers that `quantize` takes; its errors."""
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}; expected one of {', '.join(KINDS)}")
    checked_blocksize("quantize", blocksize)
    chosen = _quantizable(model, words(skip))
    if chosen and (is_attached(model) or any(adapters_of(m) is not None for _, m in base_modules(model))):
        raise ValueError("the model has an adapter, made for its dense weights; quantise first, then attach")
    meta = all(p.is_meta for p in model.parameters())
    for path, module in chosen:
        if module.weight.is_meta and not meta:  # type: ignore[union-attr]
            raise ValueError(f"{path}.weight is on the meta device while others are not; load its values first")
    return chosen


def _turn(module: nn.Module, new: Packed) -> None:
    """Gives a module the tensors and the class of `new`; its identity, hooks and mode stay."""
    own = ("_parameters", "_buffers", "_non_persistent_buffers_set")
    blank = vars(nn.Module())
    vars(module).update({k: v for k, v in vars(new).items() if k in own or k not in blank})
    module.__class__ = type(new)


def _held(module: nn.Module) -> type[NF4Linear] | type[Int8Linear] | None:
    """What a live layer of bitsandbytes becomes."""
    name, weight = type(module).__name__, module._parameters.get("weight")
    if name == "Linear4bit" and getattr(getattr(weight, "quant_state", None), "quant_type", None) == "nf4":
        return NF4Linear
    return Int8Linear if name == "Linear8bitLt" and weight is not None and weight.dtype == torch.int8 else None


def _quantizable(model: nn.Module, skip: tuple[str, ...]) -> list[tuple[str, nn.Module]]:
    """(path, module) of the linear layers to pack."""
    modules = dict(base_modules(model))
    left = picked(model, skip)
    owners: dict[int, int] = {}
    for module in modules.values():
        for p in module._parameters.values():
            owners[id(p)] = owners.get(id(p), 0) + 1
    kept = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    wide = {name for attribute in kept for name in getattr(model, attribute, None) or ()}
    unseen = tuple(p for p, m in modules.items() if isinstance(m, (nn.MultiheadAttention, nn.TransformerEncoderLayer)))
    chosen = []
    for path, module in modules.items():
        if _held(module):
            chosen.append((path, module))
            continue
        site = Site(path, module)
        taken = site.kind == "linear" and site.plain and not isinstance(module, Packed)
        if not taken or path in left or any(name in wide for name in path.split(".")):
            continue
        if any(not top or path.startswith(f"{top}.") for top in unseen):
            continue
        weight = module._parameters.get("weight")
        if weight is not None and owners[id(weight)] == 1 and weight.is_floating_point():
            chosen.append((path, module))
    return chosen
