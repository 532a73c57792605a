"""calibrate: gradient statistics of the tensors that tuners watch and of the layers they observe, before training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .attach import all_adapters, state_of
from .batches import LossFn, check, finite, rows, task_loss, to
from .life import device_of, unmerged
from .life import groups as groups_of
from .method import Method, Stats, Tuner
from .observe import observe
from .site import Site
from .stack import Parts, Spanned


def calibrate(
    model: nn.Module,
    batches: Iterable,
    loss_fn: LossFn | None = None,
    *,
    steps: int | None = None,
    progress: bool = True,
) -> nn.Module:
    """Measures the gradients that active tuners watch or observe, hands them over, and returns the model.

    batches: as for `pk.fit`; each is taken once, none if nothing is watched, and kept where a method asks for second
        derivatives. The batch size is the leading dimension of the labels; rows weigh the same, so the loss should be a
        mean over them.
    steps: how many batches at most; None: all, or as many as the methods ask for (`Method.samples` rows).
    Runs in eval mode, with gradients even inside no_grad. Modes, requires_grad and .grad are afterwards, and after an
    error, as they were.
    ValueError if there is no batch or a watched tensor is no parameter; RuntimeError while merged, or if the loss is
    not finite.
    """
    from tqdm.auto import tqdm

    unmerged(model, "calibrating")
    if steps is not None and steps < 1:
        raise ValueError(f"steps = {steps}; expected at least 1")
    groups = [_Group(*found) for found in _active(model)]
    watchers = [w for group in groups for w in group.watchers if w.watched]
    observing = [group for group in groups if group.observers]
    if not watchers and not observing:
        return model
    params = list({id(p): p for w in watchers for p in w.params}.values())
    curved = [group for group in groups if group.method.curvature and any(w.watched for w in group.watchers)]
    device, seen, taken = device_of(model), 0, []
    asked = [group.method.samples for group in groups if group.asks]
    enough = max(asked) if steps is None and all(asked) else float("inf")
    total = min((n for n in (steps, getattr(batches, "__len__", lambda: None)()) if n is not None), default=None)
    with _calibrating(model, params), tqdm(total=total, disable=not progress, unit="batch", dynamic_ncols=True) as bar:
        for batch in islice(batches, steps):
            check(batch, loss_fn)
            batch, n = to(batch, device), rows(batch)
            for group in observing:
                observe(model, batch, loss_fn, group.observers, group.method.expected)
            if watchers:
                loss, _ = task_loss(model, batch, loss_fn)
                finite(loss, f"row {seen + 1}", "check the batch and the weights")
                grads = torch.autograd.grad(loss, params, allow_unused=True)
                for watcher in watchers:
                    watcher.add(dict(zip(map(id, params), grads, strict=True)), n, watcher.grad)
            if curved:
                taken.append((batch, n))
            seen += n
            bar.update()
            if seen >= enough:
                break
        for group in curved:
            group.curve(model, taken, loss_fn, seen)
    if not seen:
        raise ValueError("batches is empty; expected at least one batch")
    with torch.no_grad():
        for group in groups:
            if group.asks:
                group.method.calibrate([(w.tuner, w.stats(seen)) for w in group.watchers], group.beside)
    return model


class _Group:
    """The active tuners of one method in one adapter."""

    def __init__(self, method: Method, own: list[tuple[Site, Tuner]], beside: int):
        self.method, self.beside = method, beside
        self.watchers = [_Watcher(site, tuner) for site, tuner in own]
        self.observers = [(site, tuner) for site, tuner in own if type(tuner).observe is not Tuner.observe]
        self.asks = bool(self.observers) or any(w.watched for w in self.watchers)

    def curve(self, model: nn.Module, batches: list[tuple[Any, int]], loss_fn: LossFn | None, seen: int) -> None:
        """A second pass: how the gradients of what is watched change along their mean over all batches."""
        params = list({id(p): p for w in self.watchers for p in w.params}.values())
        for watcher in self.watchers:
            watcher.curved = {name: torch.zeros_like(g) for name, g in watcher.grad.items()}
        for batch, n in batches:
            with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
                loss, _ = task_loss(model, batch, loss_fn)
                grads = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
                found = dict(zip(map(id, params), grads, strict=True))
                along = [(g * w.grad[name] / seen).sum() for w in self.watchers for name, g in w.parts(found)]
                bent = [a for a in along if a.requires_grad]
                changes = torch.autograd.grad(bent, params, allow_unused=True) if bent else [None] * len(params)
            for watcher in self.watchers:
                watcher.add(dict(zip(map(id, params), changes, strict=True)), n, watcher.curved)


class _Watcher:
    """A tuner, what it watches, and the sums so far."""

    def __init__(self, site: Site, tuner: Tuner):
        self.tuner, self.watched = tuner, tuner.watched(site)
        # Of a view (rows of a fused linear, a transposed weight) autograd only knows the parameter.
        self.params = [t if t._base is None else t._base for t in self.watched.values()]
        for name, p in zip(self.watched, self.params, strict=True):
            if not isinstance(p, nn.Parameter):
                raise ValueError(
                    f"{site.name}: {type(tuner).__name__} watches {name!r}, which is no parameter or view of one; "
                    "watch the parameter itself, such as site.module.weight"
                )
        self.grad = {name: torch.zeros_like(t, dtype=torch.float32) for name, t in self.watched.items()}
        self.curved: dict[str, Tensor] = {}

    def parts(self, grads: Mapping[int, Tensor | None]) -> Iterator[tuple[str, Tensor]]:
        """Of gradients by id of the parameter, None where the loss does not depend on it: those of what is watched."""
        for (name, t), p in zip(self.watched.items(), self.params, strict=True):
            if (g := grads[id(p)]) is None:
                continue
            if t is not p:
                offset = t.storage_offset() - p.storage_offset()
                g = torch.empty_like(p).copy_(g).as_strided(t.shape, t.stride(), offset)
            yield name, g

    def add(self, grads: Mapping[int, Tensor | None], n: int, sums: dict[str, Tensor]) -> None:
        """Adds the mean gradient of n rows to `sums`, the watcher's `grad` or `curved`."""
        for name, g in self.parts(grads):
            sums[name].add_(g, alpha=n)

    def stats(self, samples: int) -> Stats:
        means = ({name: g / samples for name, g in sums.items()} for sums in (self.grad, self.curved))
        return Stats(samples, *means)


def _active(model: nn.Module) -> Iterator[tuple[Method, list[tuple[Site, Tuner]], int]]:
    """`life.groups` of the active adapters, each tuner with its site, and how much is trained whole beside them."""
    sites: dict[int, Site] = {}

    def walk(site: Site, module: nn.Module) -> None:
        if isinstance(module, Tuner):
            site = module.site if isinstance(module, Spanned) else site
            sites[id(module)] = site
        inside = module.sites if isinstance(module, Parts) else {}
        for label, child in module.named_children():
            walk(inside.get(label, site), child)

    names = state_of(model).active
    for _, adapters in all_adapters(model):
        for name in names:
            if name in adapters.tuners:
                walk(adapters.site, adapters.tuners[name])
    for name in names:
        found = groups_of(model, [name])
        whole = {i: sum(p.numel() for t in own if t.opaque for p in t.parameters()) for i, (_, own) in enumerate(found)}
        for i, (method, own) in enumerate(found):
            yield method, [(sites[id(t)], t) for t in own], sum(whole.values()) - whole[i]


@contextmanager
def _calibrating(model: nn.Module, params: list[Any]) -> Iterator[None]:
    """Eval mode and gradients of `params`, all of it undone at the end. (autograd.grad leaves .grad alone.)"""
    modes = {module: module.training for module in model.modules()}
    wanted = [p.requires_grad for p in params]
    try:
        model.eval()
        for p in params:
            p.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for p, before in zip(params, wanted, strict=True):
            p.requires_grad_(before)
        for module, training in modes.items():
            module.training = training
