"""route: one batch, another adapter for each row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from torch import nn

from .attach import all_adapters, names_of, state_of
from .rows import Routing, keeping, routed, routes


@contextmanager
def route(model: nn.Module, names: Sequence[str | None]) -> Iterator[nn.Module]:
    """Within the `with`, batch row i runs the adapter names[i] alone (None: the frozen base), whatever is active.

    A call with n * len(names) rows repeats each name n times, as beam search lays its beams out. Adapters of different
    methods may share a batch; forward, backward and torch.compile work, and a compiled graph serves every route. The
    route belongs to this thread: neither yield nor await inside. With gradient checkpointing pass `use_reentrant=False`
    and `context_fn=pk.checkpoint_context`.
    ValueError for an unknown name and, in the call, for a batch whose rows are no multiple of the names; RuntimeError
    while merged, under torch.export, and under any other checkpointing, which would lose the route.
    """
    state = state_of(model)
    if isinstance(names, str) or not len(names):
        raise ValueError(f"route got {names!r}; expected a list with one adapter name or None per batch row")
    for name in {n for n in names if n is not None}:
        names_of(model, name)
    if state.merged:
        raise RuntimeError(f"{', '.join(state.merged)} is merged; pk.unmerge(model) before routing")
    order = list(state.adapters)
    device = next(p.device for _, a in all_adapters(model) for p in a.parameters())  # the base may be offloaded
    routing = Routing([-1 if n is None else order.index(n) for n in names], device)
    with routed({**(routes() or {}), state.key.number: routing}):
        yield model


def checkpoint_context() -> tuple[AbstractContextManager, AbstractContextManager]:
    """`context_fn` for torch.utils.checkpoint(use_reentrant=False): the recomputation takes the route of the forward.

    Backward may then run outside the `with pk.route(...)`, and in another thread, as it does on CUDA.
    """
    return keeping(), routed(routes())
