"""Routing inside a call: which adapter serves which batch row, and running tuners on their rows."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction

if TYPE_CHECKING:
    from .method import Tuner
    from .site import Base, Site


class Routing:
    """Adapter numbers of batch rows.  ids [n] int64 on the model's device, -1: the base alone."""

    def __init__(self, numbers: list[int], device: torch.device):
        self.numbers = numbers
        self.ids = torch.tensor(numbers, device=device)
        self._indices: dict[Any, Tensor] = {}

    def rows(self, leading: int, where: str) -> int:
        """How many rows a call with this leading dimension has; a leading 1 is one row for all."""
        n = len(self.numbers)
        if leading != 1 and (leading == 0 or leading % n):
            raise ValueError(
                f"the route has {n} names, but {where} sees {leading} rows; expected one name per batch row"
            )
        return max(leading, n)

    def expanded(self, rows: int) -> Tensor:
        """ids [rows]: each repeated rows / n times, as beams are."""
        n = len(self.numbers)
        return self.ids if rows == n else self.ids.repeat_interleave(rows // n, output_size=rows)

    def index(self, numbers: tuple[int, ...], rows: int) -> Tensor:
        """The rows of these adapters, in order, [k] int64: known on the host, so that no device is waited for."""
        key = numbers, rows
        if key not in self._indices:
            times = rows // len(self.numbers)
            found = [r * times + t for r, i in enumerate(self.numbers) if i in numbers for t in range(times)]
            self._indices[key] = torch.tensor(found, dtype=torch.int64, device=self.ids.device)
        return self._indices[key]


class _Local(threading.local):
    # Class-level default: another thread sees an unrouted model. By model, so that two routed models do not mix.
    routes: dict[int, Routing] | None = None


_local = _Local()


def routing(key: int | None) -> Routing | None:
    """The routing of the model `key` in this thread, or None."""
    routes = _local.routes
    return None if routes is None or key is None else routes.get(key)


class routed:
    """Within the `with`, this thread has exactly these routes (key of a model -> Routing)."""

    def __init__(self, routes: dict[int, Routing] | None):
        self.routes = routes

    def __enter__(self) -> None:
        self.before, _local.routes = _local.routes, self.routes

    def __exit__(self, *_: object) -> None:
        _local.routes = self.before


def routes() -> dict[int, Routing] | None:
    """All routes of this thread."""
    return _local.routes


def by_rows(base: Base, tuners: dict[int, Tuner], route: Routing, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Each tuner on its own rows and `base` on the others: the default of Tuner.forward_many.

    The base runs once on all rows, so rows without an adapter are bit-equal to an unrouted call. In a compiled graph
    every tuner runs on all rows and a mask chooses, because shapes must not depend on the route.
    """
    refuse(base, kwargs)
    leading = next((t.shape[0] for t in tensors((args, kwargs)) if t.dim()), 0)
    rows = route.rows(leading, base.site.name or "the model")
    if leading != rows:
        args, kwargs = together([(args, kwargs)], lambda ts: _expanded(ts[0], rows))
    shared = _Once(base, args, kwargs)
    if torch.compiler.is_compiling():
        ids, out = route.expanded(rows), shared()
        for number, tuner in tuners.items():
            own = tuner(RowBase(base.site, args, shared), *args, **kwargs)
            out = together([own, out], functools.partial(_masked, ids == number))
        return out
    pieces: list[tuple[Tensor, Any]] = []
    for number, tuner in tuners.items():
        index = route.index((number,), rows)
        if len(index):
            own_args, own_kwargs = (args, kwargs) if len(index) == rows else _take((args, kwargs), index, rows)
            below = RowBase(base.site, own_args, shared, index if len(index) < rows else None, rows)
            pieces.append((index, tuner(below, *own_args, **own_kwargs)))
    others = tuple(sorted({-1, *route.numbers} - set(tuners)))
    rest = route.index(others, rows)
    if len(rest) == rows or not pieces:
        return shared()
    if len(rest):
        pieces.append((rest, _take(shared(), rest, rows)))
    return _put(pieces) if len(pieces) > 1 else pieces[0][1]


def refuse(base: Base, kwargs: dict[str, Any]) -> None:
    """Raises where the route would be lost or fixed without a word, or rows cannot be taken."""
    if cache := next((name for name, value in kwargs.items() if hasattr(value, "get_seq_length")), None):
        raise RuntimeError(
            f"{base.site} gets a key-value cache ({cache}), which has no rows to route; pass use_cache=False"
        )
    if torch.compiler.is_exporting():
        raise RuntimeError("torch.export would fix the route of this call for ever; export outside pk.route")
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not base.site.module.training:
        return
    frame, code = inspect.currentframe(), CheckpointFunction.forward.__code__
    while frame is not None:
        if frame.f_code is code:
            raise RuntimeError(
                "routed under reentrant checkpointing, whose recomputation would lose the route; checkpoint with "
                "use_reentrant=False, context_fn=pk.checkpoint_context"
            )
        frame = frame.f_back


class _Once:
    """base(*args) for all rows, at the first demand: a tuner that replaces the module never asks."""

    def __init__(self, base: Base, args: tuple, kwargs: dict[str, Any]):
        self.base, self.args, self.kwargs, self.known = base, args, kwargs, None

    def __call__(self) -> Any:
        if self.known is None:
            self.known = self.base(*self.args, **self.kwargs)
        return self.known


class RowBase:
    """The base of a tuner that runs on some rows of a batch: their output was computed with all the others."""

    innermost = False

    def __init__(self, site: Site, args: tuple, shared: _Once, index: Tensor | None = None, rows: int = 0):
        self.site, self.args, self.shared, self.index, self.all_rows = site, args, shared, index, rows
        self.fresh = index is not None and site.kind == "linear"  # then the rows are a copy

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) != len(self.args) or any(a is not b for a, b in zip(args, self.args, strict=True)):
            return self.site.call(*args, **kwargs)  # the tuner changed the input: its rows are computed anew
        y = self.shared()
        return y if self.index is None else _take(y, self.index, self.all_rows)

    def seen(self, what: str) -> Tensor:
        whole = self.shared.base.seen(what)
        return whole if self.index is None else _take(whole, self.index, self.all_rows)

    def effective(self) -> tuple[Tensor, Tensor | None]:
        return self.site.weight, self.site.bias


# -- nested values ----------------------------------------------------------------------------------------------------


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and mappings, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, tuple, list)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors(item)


def together(values: Sequence[Any], function: Callable[[Sequence[Tensor]], Any]) -> Any:
    """One value shaped like each of `values`, with function(the tensors in the same place) for its tensors."""
    first = values[0]
    if isinstance(first, Tensor):
        return function(values)
    if isinstance(first, Mapping):
        items = {key: together([v.get(key) for v in values], function) for key in first}
        # A ModelOutput is both, and its constructor takes fields.
        return dataclasses.replace(first, **items) if dataclasses.is_dataclass(first) else type(first)(items)  # type: ignore[type-var, call-arg]
    if isinstance(first, (tuple, list)):
        parts = [together(column, function) for column in zip(*values, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    return None if hasattr(first, "get_seq_length") else first  # a key-value cache has no rows to take or put


def _per_row(t: Tensor, rows: int) -> bool:
    return t.dim() > 1 and len(t) == rows  # 1-d tensors count positions, not rows


def _take(value: Any, index: Tensor, rows: int) -> Any:
    """The chosen rows of every tensor that has `rows` of them."""
    return together(
        [value], lambda ts: ts[0].index_select(0, index.to(ts[0].device)) if _per_row(ts[0], rows) else ts[0]
    )


def _put(pieces: list[tuple[Tensor, Any]]) -> Any:
    """The inverse of _take over all pieces: rows back in their order."""
    index = torch.cat([index for index, _ in pieces])
    order = index.argsort()
    lengths = [len(i) for i, _ in pieces]

    def join(ts: Sequence[Tensor]) -> Tensor:
        if [len(t) if t.dim() else 0 for t in ts] == lengths:
            return torch.cat(list(ts)).index_select(0, order.to(ts[0].device))
        if ts[0].dim():
            return ts[0]
        raise RuntimeError(
            "a loss inside a module that is routed by rows cannot be put together; compute it from its logits"
        )

    return together([value for _, value in pieces], join)


def _masked(mask: Tensor, ts: Sequence[Tensor]) -> Tensor:
    own, other = ts
    return torch.where(mask.view(-1, *([1] * (own.dim() - 1))), own, other) if _per_row(own, len(mask)) else own


def _expanded(t: Tensor, rows: int) -> Tensor:
    return t.expand(rows, *t.shape[1:]) if _per_row(t, 1) else t
