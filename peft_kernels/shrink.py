"""shrink: the smaller dense model that structured pruning leaves."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .engine.attach import active, all_adapters, names_of
from .engine.merge import merge, unmerge
from .engine.packed import Packed
from .engine.roles import beside
from .engine.site import Site, base_class, base_modules, is_adapted
from .methods.structured import StructuredTuner

# Fields of a config that say how wide a feed-forward layer is, and how many heads there are.
_WIDTHS = (
    *("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim"),
    *("d_ff", "n_inner", "hidden_dim", "ffn_hidden_size"),
)
_HEADS = ("num_attention_heads", "num_key_value_heads", "num_kv_heads")


def shrink(model: nn.Module, name: str | None = None) -> nn.Module:
    """A new model without the units that an adapter with `pk.StructuredPruning` has pruned, and with it merged.

    Rows and columns of pruned units are cut off; the config says so (intermediate_size, number of heads), and
    save_pretrained and from_pretrained take the result as they take any model of its class. It computes what `model`
    does. All active adapters are merged into it, or the one called `name`; `model` itself is afterwards as before.
    ValueError where nothing is pruned, the model has no config, is quantised, or its config cannot say what is left:
    layers of different widths (scope = "global"), or fewer heads where their width follows from their number.
    RuntimeError where an adapter cannot be merged.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        raise ValueError(f"{type(model).__name__} has no transformers config; shrink needs one to make a smaller model")
    if packed := [path for path, m in base_modules(model) if isinstance(m, Packed)]:
        raise ValueError(f"{packed[0]} is quantised; shrink needs a dense model")
    names = active(model) if name is None else names_of(model, name)
    pruned = list(_pruned(model, names))
    if not pruned:
        raise ValueError(f"nothing is pruned by {', '.join(names) or 'any adapter'}; attach pk.StructuredPruning first")
    kept = _kept(model, pruned)
    merge(model, name)
    try:
        return _made(model, _smaller(config, pruned), _cut(model, kept))
    finally:
        unmerge(model)


def _pruned(model: nn.Module, names: list[str]) -> Iterator[tuple[str, StructuredTuner]]:
    for path, adapters in all_adapters(model):
        for name in names:
            if name in adapters.tuners:
                found = [t for t in adapters.tuners[name].modules() if isinstance(t, StructuredTuner)]
                yield from ((path, t) for t in found if t.units is not None)


# -- what is left ------------------------------------------------------------------------------------------------------


class _Features(NamedTuple):
    """Which features of a module are left, of its output ("rows") and its input."""

    rows: Tensor | None
    columns: Tensor | None


def _kept(model: nn.Module, pruned: list[tuple[str, StructuredTuner]]) -> dict[str, _Features]:
    """By path; bool [features], None for all of them."""
    rows: dict[str, Tensor] = {}
    columns: dict[str, Tensor] = {}
    for path, tuner in pruned:
        units = torch.zeros(tuner.count, dtype=torch.bool)
        units[cast(Tensor, tuner.units).cpu().long()] = True
        left = units.repeat_interleave(tuner.size)
        columns[path] = columns[path] & left if path in columns else left
        role, wanted = ("o", ("q", "k", "v")) if tuner.heads else ("down", ("up", "gate"))
        producers = beside(model, path, role, wanted)
        if not producers:
            raise ValueError(f"{path}: what comes before it is not known, so its units cannot be cut off")
        for site in producers:
            own = rows.setdefault(site.name, torch.ones(Site(site.name, site.module).n_out, dtype=torch.bool))
            places = torch.arange(len(own)) if site.rows is None else site.rows.of(torch.arange(len(own)))
            own[places] &= units.repeat_interleave(len(places) // tuner.count)
    return {path: _Features(rows.get(path), columns.get(path)) for path in {**rows, **columns}}


def _cut(model: nn.Module, kept: dict[str, _Features]) -> dict[str, Tensor]:
    """The base's parameters and buffers, as copies, without the features that are not kept."""
    modules, out = dict(base_modules(model)), {}
    for key, value in model.state_dict().items():
        path, _, leaf = key.rpartition(".")
        if "peft" in path.split("."):  # the tuners
            continue
        if path in kept and leaf in ("weight", "bias"):
            (rows, columns), flipped = kept[path], value.dim() == 2 and Site(path, modules[path]).layout == "columns"
            value = value.T if flipped else value
            value = value if rows is None else value[rows.to(value.device)]
            value = value if columns is None or value.dim() == 1 else value[:, columns.to(value.device)]
            value = value.T if flipped else value
        out[key] = value.clone(memory_format=torch.contiguous_format)
    return out


# -- the model of that size --------------------------------------------------------------------------------------------


def _smaller(config: Any, pruned: list[tuple[str, StructuredTuner]]) -> Any:
    config = copy.deepcopy(config)
    for heads, what in ((False, "neurons"), (True, "heads")):
        sizes = {(t.count, len(t.gain), t.shape[1]) for _, t in pruned if t.heads == heads}
        if len({before for before, *_ in sizes}) < len(sizes):
            left = sorted({after for _, after, _ in sizes})
            raise ValueError(
                f"the layers have {left[0]} to {left[-1]} {what} left, and the config of {config.model_type} has one "
                "number for all; prune with scope='layer'"
            )
        for before, after, features in sizes:
            if heads:
                _set_heads(config, before, after, features)
                continue
            for name in _WIDTHS:
                if getattr(config, name, None) == before or name == "n_inner" and hasattr(config, name):
                    setattr(config, name, after)
    return config


def _set_heads(config: Any, before: int, after: int, features: int) -> None:
    """`before` key-value heads become `after`, and the queries of each stay."""
    size = features // config.num_attention_heads
    numbers = {name: n * after // before for name in _HEADS if (n := getattr(config, name, None))}
    for name, n in numbers.items():
        setattr(config, name, n)
    if not isinstance(getattr(type(config), "head_dim", None), property):  # one that follows from the others
        config.head_dim = size


def _made(model: nn.Module, config: Any, values: dict[str, Tensor]) -> nn.Module:
    """A model of the class and config that holds `values`."""
    cls = base_class(model) if is_adapted(model) else type(model)
    try:
        made: Any = cls(config)
    except ValueError as error:
        raise ValueError(f"{cls.__name__} cannot be made of what is left: {error}") from None
    wanted = {key: tuple(t.shape) for key, t in made.state_dict().items()}
    if wrong := [key for key, shape in wanted.items() if key not in values or tuple(values[key].shape) != shape]:
        given = tuple(values[wrong[0]].shape) if wrong[0] in values else "missing"
        raise ValueError(
            f"the config of {config.model_type} cannot say what is left: {wrong[0]} would be {wanted[wrong[0]]}, and "
            f"{given} is left; prune neurons alone (heads=1.0), or what this family can say"
        )
    if more := sorted(values.keys() - wanted.keys()):
        raise ValueError(
            f"{cls.__name__} has no place for {more[0]}, which a merged adapter has made; shrink without it"
        )
    made.load_state_dict(values, assign=True)
    made.to(next(iter(values.values())).device)  # buffers that no file holds
    made.tie_weights()
    if hasattr(model, "generation_config"):
        made.generation_config = copy.deepcopy(model.generation_config)
    return made.train(model.training)
