"""Routing inside a call: which adapter serves which batch row, and running tuners on their rows."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction, checkpoint

if TYPE_CHECKING:
    from .method import Tuner
    from .site import Base, Site


Call = tuple[tuple, dict[str, Any]]  # args, kwargs


class Routing:
    """Adapter numbers of batch rows.  ids [n] int64 on the model's device, -1: the base alone.

    slots [n] int32: the same for the adapters of the model's bank, -1: none of them; None without a bank.
    """

    def __init__(self, numbers: list[int], device: torch.device, slots: list[int] | None = None):
        self.numbers = numbers
        self.ids = torch.tensor(numbers, device=device)
        self.slots = None if slots is None else torch.tensor(slots, dtype=torch.int32, device=device)
        self.banked = slots is not None and max(slots) >= 0
        self._known: dict[Any, Any] = {}

    def rows(self, leading: int, where: str) -> int:
        """How many rows a call with this leading dimension has; a leading 1 is one row for all."""
        n = len(self.numbers)
        if leading != 1 and (leading == 0 or leading % n):
            raise ValueError(
                f"the route has {n} names, but {where} sees {leading} rows; expected one name per batch row"
            )
        return max(leading, n)

    def expanded(self, rows: int, ids: Tensor | None = None) -> Tensor:
        """ids [rows], or `ids` of this route: each repeated rows / n times, as beams are."""
        n, ids = len(self.numbers), self.ids if ids is None else ids
        return ids if rows == n else ids.repeat_interleave(rows // n, output_size=rows)

    def index(self, numbers: tuple[int, ...], rows: int) -> Tensor:
        """The rows of these adapters, in order, [k] int64: known on the host, so that no device is waited for."""

        def found() -> Tensor:
            times = rows // len(self.numbers)
            places = [r * times + t for r, i in enumerate(self.numbers) if i in numbers for t in range(times)]
            return torch.tensor(places, dtype=torch.int64, device=self.ids.device)

        return self.once((numbers, rows), found)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """make(), which follows from the key: one copy to the device for all layers and calls of the route."""
        if torch.compiler.is_compiling():
            return make()
        if key not in self._known:
            with torch.inference_mode(False):  # a later call may keep it for its backward
                self._known[key] = make()
        return self._known[key]


_numbers = itertools.count(1)


class Key:
    """A model's number among the routes. A copy of it, as in a copy of the model, is another."""

    def __init__(self) -> None:
        self.number = next(_numbers)

    def __reduce__(self) -> tuple[type, tuple]:
        return Key, ()


class _Local(threading.local):
    # Runs in each thread, which sees an unrouted model. Of class attributes Dynamo of torch 2.11 sees the value alone.
    def __init__(self) -> None:
        self.routes: dict[int, Routing] | None = None  # by model, so that two routed models do not mix
        self.entered: tuple[routed, ...] = ()
        self.kept = False  # a checkpoint's recomputation will take the routes of now


_local = _Local()


def routing(key: Key) -> Routing | None:
    """The routing of the model `key` in this thread, or None."""
    routes = _local.routes
    return None if routes is None else routes.get(key.number)


class routed:
    """Within the `with`, this thread has exactly these routes (key of a model -> Routing).

    Blocks that end out of order, as those of suspended generators do, leave no route behind.
    """

    def __init__(self, routes: dict[int, Routing] | None):
        self.routes = routes

    def __enter__(self) -> None:
        _local.entered = (*_local.entered, self)
        _local.routes = self.routes

    def __exit__(self, *_: object) -> None:
        _local.entered = tuple(other for other in _local.entered if other is not self)
        _local.routes = _local.entered[-1].routes if _local.entered else None


class keeping:
    """Within the `with`, routed calls may be checkpointed: their recomputation takes the routes of now."""

    def __enter__(self) -> None:
        self.before, _local.kept = _local.kept, True

    def __exit__(self, *_: object) -> None:
        _local.kept = self.before


def routes() -> dict[int, Routing] | None:
    """All routes of this thread."""
    return _local.routes


def by_rows(base: Base, tuners: dict[int, Tuner], route: Routing, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Each tuner on its own rows and `base` on the others: the default of Tuner.forward_many.

    The base runs once on all rows, so rows without an adapter are bit-equal to an unrouted call. In a compiled graph
    every tuner runs on all rows and a mask chooses, because shapes must not depend on the route.
    """
    refuse(base, args, kwargs)
    where = base.site.name or "the model"
    leading = next((t.shape[0] for t in tensors((args, kwargs)) if t.dim() > 1), None)
    if leading is None and len(set(route.numbers)) > 1:
        raise ValueError(f"the route names several adapters, but {where} gets no tensor with batch rows")
    rows = route.rows(1 if leading is None else leading, where)
    args, kwargs = in_rows((args, kwargs), rows)
    shared, call = _Once(base, args, kwargs), (args, kwargs)
    if torch.compiler.is_compiling():
        ids, out = route.expanded(rows), shared()
        for number, tuner in tuners.items():
            own = tuner(RowBase(base.site, call, shared), *args, **kwargs)
            out = together([own, out], functools.partial(_masked, ids == number))
        return out
    pieces: list[tuple[Tensor, Any]] = []
    for number, tuner in tuners.items():
        index = route.index((number,), rows)
        if len(index) == rows:
            return tuner(RowBase(base.site, call, shared), *args, **kwargs)
        if len(index):
            own_call = _take(call, index, rows)
            below = RowBase(base.site, own_call, shared, _Chosen(route, number, index, rows))
            pieces.append((index, tuner(below, *own_call[0], **own_call[1])))
    others = tuple(sorted({-1, *route.numbers} - set(tuners)))
    rest = route.index(others, rows)
    if not pieces:
        return shared()
    if len(rest):
        pieces.append((rest, _take(shared(), rest, rows, of_output=True)))
    return _put(pieces)


def refuse_cache(site: Site, args: tuple, kwargs: dict[str, Any], why: str) -> None:
    """RuntimeError if the module at this site gets a key-value cache of transformers."""
    if any(map(_is_cache, (*args, *kwargs.values()))):
        raise RuntimeError(f"{site} gets a key-value cache, {why}; pass use_cache=False")


def _is_cache(value: Any) -> bool:
    return hasattr(value, "get_seq_length")


def refuse(base: Base, args: tuple, kwargs: dict[str, Any]) -> None:
    """Raises where the route would be lost or fixed without a word, or rows cannot be taken."""
    refuse_cache(base.site, args, kwargs, "which has no rows to route")
    if torch.compiler._is_exporting_flag:  # is_exporting() is True whenever torch 2.11 compiles
        raise RuntimeError("torch.export would fix the route of this call for ever; export outside pk.route")
    if torch.compiler.is_compiling():
        return
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is _REENTRANT or frame.f_code is _CHECKPOINT and torch.is_grad_enabled() and not _local.kept:
            raise RuntimeError(
                "routed under checkpointing, whose recomputation would lose the route; checkpoint with "
                "use_reentrant=False, context_fn=pk.checkpoint_context"
            )
        frame = frame.f_back


_REENTRANT, _CHECKPOINT = CheckpointFunction.forward.__code__, inspect.unwrap(checkpoint).__code__


class _Once:
    """base(*args) for all rows, at the first demand: a tuner that replaces the module never asks."""

    def __init__(self, base: Base, args: tuple, kwargs: dict[str, Any]):
        self.base, self.args, self.kwargs, self.known = base, args, kwargs, None

    def __call__(self) -> Any:
        if self.known is None:
            self.known = self.base(*self.args, **self.kwargs)
        return self.known


@dataclasses.dataclass(frozen=True, eq=False)
class _Chosen:
    """The rows of one adapter."""

    route: Routing
    number: int
    index: Tensor
    of: int  # rows in all

    def alone(self) -> routed:
        """The routes of this thread for a call that has these rows only."""
        one = self.route.once(("alone", self.number), lambda: Routing([self.number], self.route.ids.device))
        return routed({key: one if r is self.route else r for key, r in (routes() or {}).items()})


class RowBase:
    """The base of a tuner that runs on some rows of a batch (None: all): they were computed with all the others."""

    innermost = False
    packed = None

    def __init__(self, site: Site, call: Call, shared: _Once, rows: _Chosen | None = None):
        self.site, self.call, self.shared, self.rows = site, call, shared, rows
        self.fresh = rows is not None and site.kind == "linear"  # then the rows are a copy

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not same((args, kwargs), self.call):  # the tuner changed the input: its rows are computed anew
            return self.beside(self.site.call, *args, **kwargs)
        y = self.shared()
        return y if self.rows is None else _take(y, self.rows.index, self.rows.of, of_output=True)

    def seen(self, what: str) -> Tensor:
        return self.own(self.shared.base.seen(what))

    def own(self, whole: Tensor) -> Tensor:
        """Of a tensor for all rows, [rows, ...], these."""
        return whole if self.rows is None else _take(whole, self.rows.index, self.rows.of)

    def beside(self, module: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self.rows.alone() if self.rows else nullcontext():
            return module(*args, **kwargs)

    def effective(self) -> tuple[Tensor, Tensor | None]:
        return self.site.weight, self.site.bias


# -- nested values ----------------------------------------------------------------------------------------------------


def same(call: Call, other: Call) -> bool:
    """Whether two calls have the very same arguments."""
    (args, kwargs), (others, named) = call, other
    if len(args) != len(others) or kwargs.keys() != named.keys():
        return False
    return all(a is b for a, b in zip(args, others, strict=True)) and all(v is named[k] for k, v in kwargs.items())


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
    return None if _is_cache(first) else first  # a key-value cache has no rows to take or put


def _per_row(t: Tensor, rows: int, of_output: bool = False) -> bool:
    return t.dim() > (0 if of_output else 1) and len(t) == rows  # 1-d inputs count positions, not rows


def _take(value: Any, index: Tensor, rows: int, of_output: bool = False) -> Any:
    """The chosen rows of every tensor that has `rows` of them."""

    def take(ts: Sequence[Tensor]) -> Tensor:
        (t,) = ts
        return t.index_select(0, index.to(t.device)) if _per_row(t, rows, of_output) else t

    return together([value], take)


def _put(pieces: list[tuple[Tensor, Any]]) -> Any:
    """The inverse of _take over all pieces: rows back in their order."""
    order = torch.cat([index for index, _ in pieces]).argsort()
    lengths = [len(i) for i, _ in pieces]

    def join(ts: Sequence[Tensor]) -> Tensor:
        if all(t is ts[0] for t in ts):
            return ts[0]
        return torch.cat(_rows_of(ts, lengths)).index_select(0, order.to(ts[0].device))

    return together([value for _, value in pieces], join)


def _masked(mask: Tensor, ts: Sequence[Tensor]) -> Tensor:
    if ts[0] is ts[1]:
        return ts[0]
    own, other = _rows_of(ts, [len(mask)] * 2)
    return torch.where(mask.view(-1, *([1] * (own.dim() - 1))), own, other)


def _rows_of(ts: Sequence[Tensor], lengths: list[int]) -> list[Tensor]:
    """Outputs of so many rows each; RuntimeError for what has none."""
    found = [_expanded(t, rows) for t, rows in zip(ts, lengths, strict=True)]
    if not all(_per_row(t, rows, of_output=True) for t, rows in zip(found, lengths, strict=True)):
        shapes = ", ".join(str(tuple(t.shape)) for t in ts)
        raise RuntimeError(
            f"an output without batch rows ({shapes}) of a module that is routed by rows cannot be put together; "
            "compute a loss from its logits"
        )
    return found


def in_rows(call: Call, rows: int) -> Call:
    """The call, one row for all in it as so many."""
    leading = next((t.shape[0] for t in tensors(call) if t.dim() > 1), 1)
    return call if leading == rows else together([call], lambda ts: _expanded(ts[0], rows))


def _expanded(t: Tensor, rows: int) -> Tensor:
    """One row for all as so many."""
    return t.expand(rows, *t.shape[1:]) if _per_row(t, 1) else t
