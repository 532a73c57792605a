"""Batches and their loss: what fit and calibrate take from the user, checked in one place."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

LossFn = Callable[[Any, Any], Tensor]


def length(batches: Iterable) -> int:
    """How many batches an epoch has; ValueError for none, or for an iterator, which one epoch uses up."""
    if isinstance(batches, Iterator):
        raise ValueError("batches is an iterator, which one epoch uses up; pass a list or a DataLoader")
    try:
        n = len(batches)  # type: ignore[arg-type]
    except TypeError:  # a DataLoader over a stream has __len__ and raises all the same
        n = sum(1 for _ in batches)
    if not n:
        raise ValueError("batches is empty; expected at least one batch")
    return n


def mapped(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The batch with every tensor in it changed."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {k: mapped(v, change) for k, v in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(mapped(v, change) for v in batch)
    return batch


def to(batch: Any, device: torch.device) -> Any:
    return mapped(batch, lambda t: t.to(device))


def check(batch: Any, loss_fn: LossFn | None) -> None:
    """ValueError unless the batch is a dict, or with loss_fn a pair."""
    kind = type(batch).__name__
    if loss_fn is None and not isinstance(batch, Mapping):
        raise ValueError(f"a batch is a {kind}; expected a dict for model(**batch), or pass loss_fn")
    if loss_fn is not None and not (isinstance(batch, (tuple, list)) and len(batch) == 2):
        raise ValueError(f"a batch is a {kind}; expected a pair (inputs, target) for loss_fn")


def answered(model: nn.Module, batch: Any, loss_fn: LossFn | None) -> Any:
    """What the model makes of a batch."""
    check(batch, loss_fn)
    return model(**batch) if loss_fn is None else model(batch[0])


def task_loss(model: nn.Module, batch: Any, loss_fn: LossFn | None) -> tuple[Tensor, Any]:
    """(loss, the model's outputs): model(**batch).loss, or loss_fn(model(inputs), target) of a pair."""
    outputs = answered(model, batch, loss_fn)
    if loss_fn is not None:
        return loss_fn(outputs, batch[1]), outputs
    loss = getattr(outputs, "loss", None)
    if loss is None:
        raise ValueError("model(**batch) returned no loss; put labels into the batch or pass loss_fn")
    return loss, outputs


def logits_of(outputs: Any) -> Tensor | None:
    """What a model returned, or its `logits`; None where it has none."""
    logits = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
    return logits if isinstance(logits, Tensor) else None


def labels_of(batch: Any) -> Any:
    """The labels of a dict, None without; of a pair the target."""
    return batch.get("labels") if isinstance(batch, Mapping) else batch[1]


def finite(loss: Tensor, where: str, fix: str) -> float:
    """The loss as a number; RuntimeError if it is not finite."""
    value = loss.item()
    if not math.isfinite(value):
        raise RuntimeError(f"the loss is {value} at {where}; {fix}")
    return value


def rows(batch: Any) -> int:
    """The batch size: the leading dimension of the labels (of a pair: the target), or else of the first tensor."""
    labels = batch.get("labels", batch) if isinstance(batch, Mapping) else batch[1]
    size = next((t.shape[0] for t in _tensors(labels) if t.dim()), 0)
    if not size:
        raise ValueError("a batch has no rows; expected tensors whose first dimension is the batch size")
    return size


def _tensors(batch: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def note(t: Tensor) -> Tensor:
        found.append(t)
        return t

    mapped(batch, note)
    return found


def split(batch: Any) -> Iterator[Any]:
    """The batch row by row: every tensor whose leading dimension is the batch size is cut, the others stay whole."""
    size = rows(batch)
    for i in range(size):
        yield mapped(batch, functools.partial(_cut, size=size, row=slice(i, i + 1)))


def _cut(t: Tensor, size: int, row: slice) -> Tensor:
    return t[row] if t.dim() and t.shape[0] == size else t
