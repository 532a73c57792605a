"""merge and unmerge: writing folded weights into the base in place, and taking them back bit by bit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .attach import all_adapters, names_of, refresh, refuse_routed, state_of
from .method import NotMergeable, Tuner, promoted
from .site import Adapters, base_modules, base_parameters


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    names: the adapters.   modules: how many modules changed.   numbers: how many base numbers were written.
    rounding: the largest difference between a folded weight and what its dtype could store.
    created: biases the base did not have and now has.
    """

    names: tuple[str, ...]
    modules: int
    numbers: int
    rounding: float
    created: tuple[str, ...]

    def __str__(self) -> str:
        created = f", {len(self.created)} new biases" if self.created else ""
        return (
            f"merged {', '.join(self.names)} into {self.modules} modules: {self.numbers:,} numbers written{created}, "
            f"largest rounding {self.rounding:.3g}"
        )


def merge(model: nn.Module, name: str | None = None, *, into: None = None, stash: bool = True) -> MergeReport:
    """Folds one adapter (None: all active ones) into the base weights, in place and all or nothing.

    Folding runs in fp32 or wider and each weight is rounded once. stash=True keeps the original values, so that
    unmerge is bit-exact; stash=False keeps nothing (then `detach` leaves a plain merged model).
    into: the weight format to write; None, the weights' own, is the only one for dense models.
    RuntimeError if a tuner has no weight-space form, is not at the bottom of its stack, a weight is tied to another
    module, or a folded weight is not finite; the model is untouched then.
    """
    if into is not None:
        raise ValueError(f"into={into!r}; a dense model merges into its own format, into=None")
    state = state_of(model)
    if state.merged:
        raise RuntimeError(f"{', '.join(state.merged)} is merged already; pk.unmerge(model) first")
    refuse_routed(state, "merge")
    names = [n for n in names_of(model, name) if name is not None or n in state.active]
    if idle := [n for n in names if n not in state.active]:
        raise RuntimeError(f"{idle[0]} is not active; pk.set_active(model, ...) before merging it")
    places = [(path, a) for path, a in all_adapters(model) if any(n in a.tuners for n in names)]
    for path, adapters in places:
        _check(path, adapters, names, state.active)
    _check_ties(model, places)

    for path, adapters in places:  # first pass: nothing is written until every weight is known to fit its dtype
        targets = _targets(adapters.module)
        for key, value in _folded(adapters, names).items():
            target = targets.get(key)
            if not torch.isfinite(value if target is None else value.to(target.dtype)).all():
                raise RuntimeError(f"{path}.{key} would not be finite after the merge; the model is unchanged")
    before: dict[str, Tensor | None] = {}
    numbers, rounding, created = 0, 0.0, []
    state.merged, state.stash = names, before
    try:
        for path, adapters in places:
            targets = _targets(adapters.module)
            for key, value in _folded(adapters, names).items():
                full, target = f"{path}.{key}" if path else key, targets.get(key)
                before[full] = target.detach().clone() if stash and target is not None else None
                if target is None:
                    dtype = next(adapters.module.parameters()).dtype
                    target = nn.Parameter(value.to(dtype), requires_grad=False)
                    adapters.module._parameters[key] = target
                    created.append(full)
                else:
                    with torch.no_grad():
                        target.copy_(value)
                numbers += target.numel()
                if target.numel() and target.device.type != "meta":
                    rounding = max(rounding, (target.detach().to(value.dtype) - value).abs().max().item())
    except BaseException:
        if stash:
            unmerge(model)
        raise
    state.stash = before if stash else None
    refresh(model)
    return MergeReport(tuple(names), len(places), numbers, rounding, tuple(created))


def unmerge(model: nn.Module) -> nn.Module:
    """Restores the base weights bit by bit. RuntimeError if nothing is merged or it was merged with stash=False."""
    state = state_of(model)
    if not state.merged:
        raise RuntimeError("nothing is merged; pk.merge(model) comes first")
    if state.stash is None:
        raise RuntimeError("merged with stash=False, so the original weights are gone; load the base model again")
    modules = dict(base_modules(model))
    for full, value in state.stash.items():
        path, _, leaf = full.rpartition(".")
        if value is None:
            modules[path]._parameters[leaf] = None
        else:
            with torch.no_grad():
                _targets(modules[path])[leaf].copy_(value)
    state.merged, state.stash = [], None
    refresh(model)
    return model


def _check(path: str, adapters: Adapters, names: list[str], active: list[str]) -> None:
    stack = [n for n in adapters.tuners if n in active]
    below = [n for n in stack[: 1 + max(stack.index(n) for n in names if n in stack)] if n not in names]
    if below:
        raise RuntimeError(
            f"{path}: {below[0]} lies below in the stack and would not be merged; merge it too or deactivate it"
        )
    for n in names:
        if n in adapters.tuners and not adapters.tuners[n].mergeable:
            inner = [t for t in adapters.tuners[n].modules() if isinstance(t, Tuner) and not t.mergeable][-1]
            raise NotMergeable(f"{path}: {type(inner).__name__} of {n!r} has no weight-space form; it cannot be merged")
        if n in adapters.tuners and not adapters.tuners[n].opaque and not adapters.site.plain:
            kind = type(adapters.module).__name__
            raise NotMergeable(f"{path}: {kind} has a forward of its own, so weights alone do not describe it")
    offloaded = any(p.device.type == "meta" for p in adapters.module.parameters(recurse=False))
    if adapters.site.lifted is not None and offloaded:
        raise RuntimeError(f"{path}: its weights are offloaded; load the whole model before merging")


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


def _folded(adapters: Adapters, names: list[str]) -> dict[str, Tensor]:
    """The module's parameters, by path inside it, with the tuners of `names` folded in, in fp32 or wider."""
    site, module = adapters.site, adapters.module
    with torch.no_grad():
        params = {key: t.detach().to(promoted(t.dtype)) for key, t in _targets(module).items()}
        for n, tuner in adapters.tuners.items():
            if n in names:
                if site.kind != "module" and "weight" not in params:
                    raise NotMergeable(f"{site.name}: its weight is parametrized; remove the parametrization first")
                params = {key: v.to(promoted(v.dtype)) for key, v in tuner.folded(site, params).items()}
    return params


def _targets(module: nn.Module) -> dict[str, Tensor]:
    """Floating parameters and buffers of the base under `module`, by path in it."""
    tensors: dict[str, Tensor] = {}
    for path, inner in base_modules(module):
        for name, t in (*inner._parameters.items(), *inner._buffers.items()):
            if t is not None and t.is_floating_point():
                tensors[f"{path}.{name}" if path else name] = t
    return tensors
