"""route: one batch, another adapter for each row."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import nn

from .attach import all_adapters, names_of, state_of
from .rows import Routing, keeping, routed, routes


@contextmanager
def route(model: nn.Module, names: Sequence[str | None]) -> Iterator[nn.Module]:
    """Within the `with`, batch row i runs the adapter names[i] alone (None: the frozen base), whatever is active.

    A call with n * len(names) rows repeats each name n times, as beam search lays its beams out. Adapters of different
    methods may share a batch; forward, backward and torch.compile work, and a compiled graph serves every route. The
    route belongs to this thread: neither yield nor await inside. With gradient checkpointing pass `use_reentrant=False`
    and `context_fn=pk.checkpoint_context`. Names may be those of the model's `pk.AdapterBank` too, whose adapters stay
    as they are until the `with` ends, whatever is loaded or evicted meanwhile; they have no backward.
    ValueError for an unknown name and, in the call, for a batch whose rows are no multiple of the names; RuntimeError
    while merged, under torch.export, and under any other checkpointing, which would lose the route.
    """
    state = state_of(model)
    if isinstance(names, str) or not len(names) or not all(n is None or isinstance(n, str) for n in names):
        raise ValueError(f"route got {names!r}; expected a list with one adapter name or None per batch row")
    if state.merged:
        raise RuntimeError(f"{', '.join(state.merged)} is merged; pk.unmerge(model) before routing")
    bank, order = state.bank, {name: i for i, name in enumerate(state.adapters)}
    with nullcontext({}) if bank is None else bank.leased(names) as banked:
        for name in set(names) - {None, *banked}:
            names_of(model, name)
            if bank is not None and name == bank.name:
                raise ValueError(f"{name!r} is the bank itself; expected a name in it: {', '.join(bank.names)}")
        tensors = (t for _, a in all_adapters(model) for t in itertools.chain(a.parameters(), a.buffers()))
        routing = Routing(
            [-1 if n is None else order.get(n, -1) for n in names],
            next(tensors).device,  # not the base's, which may be offloaded
            None if bank is None else [-1 if n is None else banked.get(n, -1) for n in names],
        )
        with routed({**(routes() or {}), state.key.number: routing}):
            yield model


def checkpoint_context() -> tuple[AbstractContextManager, AbstractContextManager]:
    """`context_fn` for torch.utils.checkpoint(use_reentrant=False): the recomputation takes the route of the forward.

    Backward may then run outside the `with pk.route(...)`, and in another thread, as it does on CUDA.
    """
    return keeping(), routed(routes())
