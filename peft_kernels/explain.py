"""explain: which kernel serves each tuner of a model, and why the faster ones do not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .engine.attach import all_adapters, state_of
from .engine.site import Adapters, Site, base_modules
from .engine.taps import Tap, forget
from .engine.text import columns
from .ops._op import recording


class Explanation(list):
    """Rows dict(site, adapter, op, backend, reasons); str() is the table, equal rows folded into one line."""

    def __str__(self) -> str:
        groups: dict[tuple, list[str]] = {}
        for row in self:
            why = "; ".join(f"{k}: {v}" for k, v in row["reasons"].items())
            groups.setdefault((row["adapter"], row["op"], row["backend"], why), []).append(row["site"] or "(model)")
        lines = [("sites", "adapter", "op", "backend", "why not another")]
        for (adapter, op, backend, why), sites in groups.items():
            shown = sites[0] if len(sites) == 1 else f"{len(sites)} sites, {sites[0]} ..."
            lines.append((shown, adapter, op, backend, why))
        return columns(lines)


def explain(model: nn.Module) -> Explanation:
    """Runs every adapted linear once on one row and reports dict(site, adapter, op, backend, reasons).

    op "torch" means that the tuner is plain torch there: a folded weight, or a module trained whole.
    """
    rows = Explanation()
    active = state_of(model).active
    with _noted(model):
        for path, adapters in all_adapters(model):
            for name in (n for n in adapters.tuners if n in active):
                choices = _probe(adapters, name)
                for choice in choices or [{"op": "torch", "backend": "torch", "reasons": {}}]:
                    rows.append({"site": path, "adapter": name, **choice})
    return rows


@contextmanager
def _noted(model: nn.Module) -> Iterator[None]:
    """Within the `with`, tuners see one row of the inputs of other modules that a call of the model would note."""
    keys = []
    for path, module in base_modules(model):
        site = Site(path, module)
        if site.kind == "module":  # a block, whose input no tuner of a linear reads
            continue
        for hook in [h for h in module._forward_pre_hooks.values() if isinstance(h, Tap)]:
            hook(module, (_row(site),), {})
            keys.append(hook.key)
    try:
        yield
    finally:
        forget(tuple(keys))


def _row(site: Site) -> Tensor:
    return torch.zeros(1, site.n_in, dtype=site.dtype, device=site.device)


def _probe(adapters: Adapters, name: str) -> list[dict[str, Any]]:
    site, chain = adapters.site, adapters.chain
    while chain.below is not None and chain.tuner is not adapters.tuners[name]:
        chain = chain.below
    if site.kind != "linear" or chain.below is None:
        return []
    x = _row(site)
    with torch.no_grad(), torch.random.fork_rng(), recording() as choices:
        chain.below(x)
        below = [choice["op"] for choice in choices]
        choices.clear()
        chain(x)
        repeated = below == [choice["op"] for choice in choices[: len(below)]]
        return choices[len(below) :] if repeated else choices  # else it took the place of the base's own op
