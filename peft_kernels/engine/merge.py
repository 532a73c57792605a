"""merge and unmerge: writing folded weights into the base in place, and taking them back bit by bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .attach import all_adapters, names_of, refresh, refuse_routed, state_of, tuners
from .method import Method, NotMergeable, Tuner, as_matrix, promoted
from .packed import Packed
from .site import Adapters, Unpacked, base_modules, base_parameters, base_values, unpack
from .stack import union

_DENSE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    names: the adapters.   modules: how many modules changed.   numbers: how many base numbers were written.
    rounding: the largest difference between a folded weight and what its dtype or format could store.
    created: biases the base did not have and now has.
    error: the norm of these differences relative to that of the folded weights.
    """

    names: tuple[str, ...]
    modules: int
    numbers: int
    rounding: float
    created: tuple[str, ...]
    error: float

    def __str__(self) -> str:
        created = f", {len(self.created)} new biases" if self.created else ""
        return (
            f"merged {', '.join(self.names)} into {self.modules} modules: {self.numbers:,} numbers written{created}, "
            f"largest rounding {self.rounding:.3g}, relative error {self.error:.3g}"
        )


def merge(model: nn.Module, name: str | None = None, *, into: str | None = None, stash: bool = True) -> MergeReport:
    """Folds one adapter (None: all active ones) into the base weights, in place and all or nothing.

    Folding runs in fp32 or wider and each weight is rounded once. stash=True keeps the original values, so that
    unmerge is bit-exact; stash=False keeps nothing (then `detach` leaves a plain merged model).
    into: None writes every weight in its own format: a packed one (NF4, int8) is read, changed and packed again.
        "bf16", "fp16" or "fp32" makes all packed layers of the model dense instead, those without a tuner too; what
        is not packed keeps its dtype.
    RuntimeError if a tuner has no weight-space form, is not at the bottom of its stack, a weight is tied to another
    module, or a folded weight is not finite; the model is untouched then.
    """
    state = state_of(model)
    packed = {path: m for path, m in base_modules(model) if isinstance(m, Packed)}
    if into is not None and not packed:
        raise ValueError(f"into={into!r}; a dense model merges into its own format, into=None")
    if into is not None and into not in _DENSE:
        raise ValueError(f"into={into!r}; expected into=None, the weights' own format, or one of {', '.join(_DENSE)}")
    dense = None if into is None else _DENSE[into]
    if state.merged:
        raise RuntimeError(f"{', '.join(state.merged)} is merged already; pk.unmerge(model) first")
    refuse_routed(state, "merge")
    names = [n for n in names_of(model, name) if name is not None or n in state.active]
    if idle := [n for n in names if n not in state.active]:
        raise RuntimeError(f"{idle[0]} is not active; pk.set_active(model, ...) before merging it")
    places = [(path, a) for path, a in all_adapters(model) if any(n in a.tuners for n in names)]
    for path, adapters in places:
        _check(model, path, adapters, names)
    _check_ties(model, places)

    for path, adapters in places:  # first pass: nothing is written until every weight is known to fit its dtype
        for key, value in _folded(adapters, names, dense).items():
            if not torch.isfinite(value.to(_dtype(adapters.module, key, dense))).all():
                raise RuntimeError(f"{path}.{key} would not be finite after the merge; the model is unchanged")
    before: dict[str, Any] = {}
    numbers, rounding, created, off, length = 0, 0.0, [], 0.0, 0.0
    state.merged, state.stash = names, before
    try:
        for path, adapters in places:
            folded = _folded(adapters, names, dense)  # of the packed weights, before they are made dense
            touched = _touched(adapters, names)
            if dense:
                _unpack(packed, [p for p in packed if _below(p, path)], dense, before if stash else None)
            for key, value in folded.items():
                full, (module, leaf) = f"{path}.{key}" if path else key, _owner(adapters.module, key)
                if _tensor(module, leaf) is None:
                    before[full] = None
                    empty = value.new_empty(value.shape, dtype=_dtype(adapters.module, key, dense))
                    module._parameters[leaf] = nn.Parameter(empty, requires_grad=False)
                    created.append(full)
                elif stash and full.rpartition(".")[0] not in before:
                    before[full] = _stashed(module, leaf, touched if key == "weight" else None)
                value, stored = _write(module, leaf, value, touched if key == "weight" else None)
                numbers += value.numel()
                if value.numel() and value.device.type != "meta":
                    difference = stored - value
                    rounding = max(rounding, difference.abs().max().item())
                    off += torch.linalg.vector_norm(difference, dtype=torch.float64).item() ** 2
                    length += torch.linalg.vector_norm(value, dtype=torch.float64).item() ** 2
        if dense:
            _unpack(packed, list(packed), dense, before if stash else None)
    except BaseException:
        if stash:
            unmerge(model)
        raise
    state.stash = before if stash else None
    refresh(model)
    error = (off / length) ** 0.5 if length else 0.0
    return MergeReport(tuple(names), len(places), numbers, rounding, tuple(created), error)


def unmerge(model: nn.Module) -> nn.Module:
    """Restores the base weights bit by bit. RuntimeError if nothing is merged or it was merged with stash=False."""
    state = state_of(model)
    if not state.merged:
        raise RuntimeError("nothing is merged; pk.merge(model) comes first")
    if state.stash is None:
        raise RuntimeError("merged with stash=False, so the original weights are gone; load the base model again")
    modules = dict(base_modules(model))
    for full, value in reversed(state.stash.items()):
        path, _, leaf = full.rpartition(".")
        if isinstance(value, Unpacked):
            value.restore(modules[full])
        elif value is None:
            modules[path]._parameters[leaf] = None
        elif isinstance(value, _Stashed):
            value.restore(modules[path], leaf)
        else:
            with torch.no_grad():
                for name, t in _own(modules[path], leaf).items():
                    t.copy_(value[name])
    state.merged, state.stash = [], None
    refresh(model)
    return model


def _check(model: nn.Module, path: str, adapters: Adapters, names: list[str]) -> None:
    stack = [n for n in adapters.tuners if n in state_of(model).active]
    below = [n for n in stack[: 1 + max(stack.index(n) for n in names if n in stack)] if n not in names]
    if below:
        raise RuntimeError(
            f"{path}: {below[0]} lies below in the stack and would not be merged; merge it too or deactivate it"
        )
    for n in names:
        if n in adapters.tuners and not adapters.tuners[n].mergeable:
            inner = [t for t in adapters.tuners[n].modules() if isinstance(t, Tuner) and not t.mergeable][-1]
            what = f"{type(inner).__name__} of {n!r} has no weight-space form; it cannot be merged"
            raise NotMergeable(f"{path}: {what}{_parts(model, n)}")
        if n in adapters.tuners and not adapters.tuners[n].opaque and not adapters.site.plain:
            kind = type(adapters.module).__name__
            raise NotMergeable(f"{path}: {kind} has a forward of its own, so weights alone do not describe it")
    offloaded = any(p.device.type == "meta" for p in adapters.module.parameters(recurse=False))
    if adapters.site.lifted is not None and offloaded:
        raise RuntimeError(f"{path}: its weights are offloaded; load the whole model before merging")


def _parts(model: nn.Module, name: str) -> str:
    """Of an adapter with several parts, which of them cannot be merged."""
    parts = [part.method for part, own in state_of(model).adapters[name].expanded() if own]
    if len(parts) == 1:
        return ""
    inside = [t for _, top in tuners(model, name) for t in top.modules() if isinstance(t, Tuner) and t.part is not None]
    lost = {t.part for t in inside if not t.mergeable}
    inner = [getattr(m, "inner", None) for m in parts]
    keys = [f"{m.key}({i.key})" if isinstance(i, Method) else m.key for m, i in zip(parts, inner, strict=True)]
    can, cannot = (", ".join(dict.fromkeys(k for i, k in enumerate(keys) if (i in lost) == no)) for no in (False, True))
    return f"; of its parts {cannot} cannot" + (f" and {can} could, as an adapter of their own" if can else "")


def _check_ties(model: nn.Module, places: list[tuple[str, Adapters]]) -> None:
    owners: dict[int, list[str]] = {}
    for path, module in base_modules(model):
        for leaf, p in module._parameters.items():
            if p is not None:
                owners.setdefault(id(p), []).append(f"{path}.{leaf}" if path else leaf)
    for path, adapters in places:
        for _, p in base_parameters(adapters.module):
            outside = [o for o in owners[id(p)] if path and not o.startswith(path + ".")]
            if outside:
                raise RuntimeError(
                    f"{path} shares its weight with {outside[0]}, which a merge would change too; untie them first"
                )


def _folded(adapters: Adapters, names: list[str], dense: torch.dtype | None) -> dict[str, Tensor]:
    """The module's parameters, by path inside it, with the tuners of `names` folded in, in fp32 or wider.

    dense: the packed weights are to become dense, and then keep the rounding with which a tuner was trained.
    """
    site, module = adapters.site, adapters.module
    with torch.no_grad():
        params = {key: t.detach().to(promoted(t.dtype)) for key, t in base_values(module).items()}
        for n, tuner in adapters.tuners.items():
            if n in names:
                if site.kind != "module" and "weight" not in params:
                    raise NotMergeable(f"{site.name}: its weight is parametrized; remove the parametrization first")
                params = {key: v.to(promoted(v.dtype)) for key, v in tuner.folded(site, params).items()}
                if dense and tuner.rounds and "weight" in params:
                    params["weight"] = site.rounded(params["weight"])
    return params


# -- some numbers of a weight -----------------------------------------------------------------------------------------


class _Touched(NamedTuple):
    """The numbers of a weight that tuners change, by row and column as [out, in]."""

    layout: str
    rows: Tensor
    columns: Tensor

    def of(self, weight: Tensor) -> Tensor:
        return as_matrix(weight.detach(), self.layout)[self.rows, self.columns]

    def put(self, weight: Tensor, values: Tensor) -> None:
        as_matrix(weight.detach(), self.layout)[self.rows, self.columns] = values.to(weight.dtype)


class _Stashed(NamedTuple):
    """What a merge has overwritten of a weight."""

    touched: _Touched
    values: Tensor

    def restore(self, module: nn.Module, leaf: str) -> None:
        self.touched.put(cast(Tensor, _tensor(module, leaf)), self.values)


def _touched(adapters: Adapters, names: list[str]) -> _Touched | None:
    """None: any number, or the weight is packed."""
    places = union(t.touched() for n, t in adapters.tuners.items() if n in names)
    if places is None or isinstance(adapters.module, Packed):
        return None
    n_in = adapters.site.n_in
    return _Touched(adapters.site.layout, places // n_in, places % n_in)


# -- one tensor of the base, packed or not ----------------------------------------------------------------------------


def _unpack(packed: dict[str, Packed], paths: list[str], dense: torch.dtype, stash: dict[str, Any] | None) -> None:
    """Makes packed layers dense and takes them out of `packed`; what undoes it goes into the stash."""
    for path in paths:
        undo = unpack(packed.pop(path), dense)
        if stash is not None:
            stash[path] = undo


def _owner(module: nn.Module, key: str) -> tuple[nn.Module, str]:
    place, _, leaf = key.rpartition(".")
    return module.get_submodule(place), leaf


def _below(path: str, top: str) -> bool:
    return not top or path == top or path.startswith(top + ".")


def _tensor(module: nn.Module, leaf: str) -> Tensor | None:
    t = module._parameters.get(leaf)
    return module._buffers.get(leaf) if t is None else t


def _dtype(module: nn.Module, key: str, dense: torch.dtype | None) -> torch.dtype:
    """In which the number will be read after the merge."""
    module, leaf = _owner(module, key)
    if isinstance(module, Packed):
        return dense or module.dtype
    own = _tensor(module, leaf)
    return next(module.parameters()).dtype if own is None else own.dtype


def _own(module: nn.Module, leaf: str) -> dict[str, Tensor]:
    """The tensors that hold the number."""
    if isinstance(module, Packed) and leaf == "weight":
        return module.stored()
    return {leaf: t} if (t := _tensor(module, leaf)) is not None else {}


def _stashed(module: nn.Module, leaf: str, touched: _Touched | None) -> _Stashed | dict[str, Tensor]:
    if touched is not None:
        return _Stashed(touched, touched.of(cast(Tensor, _tensor(module, leaf))))
    return {name: t.detach().clone() for name, t in _own(module, leaf).items()}


def _write(module: nn.Module, leaf: str, value: Tensor, touched: _Touched | None) -> tuple[Tensor, Tensor]:
    """Writes a folded value where it differs; (what was to be written, what was stored), in the value's dtype."""
    with torch.no_grad():
        if touched is not None:
            own, value = cast(Tensor, _tensor(module, leaf)), touched.of(value)
            touched.put(own, value)
            return value, touched.of(own).to(value.dtype)
        if isinstance(module, Packed) and leaf == "weight":
            module.pack_(value)
            return value, module.dense(value.dtype)
        (own,) = _own(module, leaf).values()
        return value, own.copy_(value).detach().to(value.dtype)
