"""Passes that show tuners the input and the output gradient of their linear layers, sample by sample."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batches import LossFn, finite, labels_of, logits_of, rows, split, task_loss
from .method import Tuner
from .site import Site

Observers = list[tuple[Site, Tuner]]


class _Pass(NamedTuple):
    """One backward pass, of the sum over rows of their losses."""

    loss: Tensor
    weight: Tensor | None  # [rows]: how much each row counts


def observe(model: nn.Module, batch: Any, loss_fn: LossFn | None, observers: Observers, expected: bool) -> None:
    """Calls `Tuner.observe` of every observer for every backward pass of a batch.

    expected: one pass per class, each row weighted with the model's probability of that class; ValueError where the
    output is no [rows, classes]. Else one pass for all rows where their losses can be told apart, which takes a
    classifier (logits [rows, classes], a label each) and layers whose inputs lead with the rows; or one per row.
    """
    n = rows(batch)
    with _recorded(model, observers, n) as seen:
        outputs = task_loss(model, batch, loss_fn)[1]
        logits = logits_of(outputs)
        passes = _classified(logits, labels_of(batch), n, loss_fn, expected)
        if passes is not None and seen.by_rows:
            seen.show(passes)
            return
    if expected:
        shape = None if logits is None else tuple(logits.shape)
        raise ValueError(
            f"the expected Fisher needs the probabilities of [{n}, classes], the model returned {shape}; "
            "use the empirical one, of the labels"
        )
    for number, row in enumerate(split(batch)):
        with _recorded(model, observers, 1) as seen:
            loss, _ = task_loss(model, row, loss_fn)
            finite(loss, f"row {number + 1} of a batch", "check the batch and the weights")
            seen.show(iter([_Pass(loss, None)]))


def _classified(
    logits: Tensor | None, labels: Any, n: int, loss_fn: LossFn | None, expected: bool
) -> Iterator[_Pass] | None:
    """The passes of a classifier, or None for another model."""
    if logits is None or logits.dim() != 2 or len(logits) != n or logits.shape[1] < 2:
        return None
    if not expected:
        whole = isinstance(labels, Tensor) and labels.shape == (n,) and not labels.is_floating_point()
        if not whole or loss_fn not in (None, F.cross_entropy):
            return None
    log = logits.double().log_softmax(-1)  # [rows, classes]
    finite(log.sum(), "the logits", "check the batch and the weights")
    if not expected:
        return iter([_Pass(-log.gather(1, labels[:, None]).sum(), None)])
    return (_Pass(-log[:, c].sum(), log[:, c].detach().exp().float()) for c in range(log.shape[1]))


class _Recorder:
    """Notes what goes into the frozen linears and hands it over with the gradient of what comes out."""

    def __init__(self, observers: Observers, n: int):
        self.observers, self.n = observers, n
        self.by_rows = True
        self.sources: list[Tensor] = []  # where the graph begins
        self.calls: dict[int, list[Tensor]] = {}  # by observer: the inputs of each call of its module
        self.grads: dict[tuple[int, int], Tensor] = {}  # by observer and call
        self.weight: Tensor | None = None  # of the pass under way

    def note(self, i: int, x: Tensor, y: Tensor) -> Tensor:
        """The output to go on with."""
        if not y.requires_grad:
            self.sources.append(y.detach().requires_grad_())
            y = self.sources[-1].clone()  # what comes next may write into it
        self.by_rows = self.by_rows and len(x) == self.n
        own = self.calls.setdefault(i, [])
        call = len(own)
        own.append(x.detach())
        y.register_hook(lambda dy: self._noted(i, call, dy))
        return y

    def _noted(self, i: int, call: int, dy: Tensor) -> None:
        self.grads[i, call] = dy
        if all((i, c) in self.grads for c in range(len(self.calls[i]))):
            self._observed(i)

    @torch.no_grad()
    def _observed(self, i: int) -> None:
        """Hands over all calls of a module: each row has one gradient, over the tokens of all of them."""
        site, tuner = self.observers[i]
        found = [(x, self.grads.pop((i, c))) for c, x in enumerate(self.calls[i]) if (i, c) in self.grads]
        x = self._joined([x for x, _ in found])
        dy = self._joined([g if site.rows is None else site.rows.of(g, -1) for _, g in found])
        samples = torch.arange(self.n + 1, device=x.device) * (len(x) // self.n)
        tuner.observe(site, x, dy, samples, self.weight)

    def _joined(self, calls: list[Tensor]) -> Tensor:
        """[rows, ..., features] of each call -> [tokens, features], row by row."""
        return torch.cat([t.reshape(self.n, -1, t.shape[-1]) for t in calls], 1).flatten(0, 1)

    def show(self, passes: Iterator[_Pass]) -> None:
        for loss, self.weight in passes:
            if self.sources:
                torch.autograd.backward(loss, inputs=self.sources, retain_graph=True)
            for i in {i for i, _ in self.grads}:  # the loss does not depend on all calls
                self._observed(i)


@contextmanager
def _recorded(model: nn.Module, observers: Observers, n: int) -> Iterator[_Recorder]:
    """Within the `with`, the linears are seen, and no parameter asks for a gradient."""
    seen, trained = _Recorder(observers, n), [p for p in model.parameters() if p.requires_grad]
    handles = []
    for i, (site, _) in enumerate(observers):

        def note(module: nn.Module, args: tuple, kwargs: dict[str, Any], y: Tensor, i: int = i) -> Tensor:
            return seen.note(i, args[0] if args else next(iter(kwargs.values())), y)

        handles.append(site.module.register_forward_hook(note, with_kwargs=True))
    try:
        for p in trained:
            p.requires_grad_(False)
        yield seen
    finally:
        for p in trained:
            p.requires_grad_(True)
        for handle in handles:
            handle.remove()
