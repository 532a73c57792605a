"""fit: the reference training loop."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .attach import state_of, tuners
from .method import Tuner

LossFn = Callable[[Any, Any], Tensor]


def param_groups(model: nn.Module, lr: float | None = None) -> list[dict[str, Any]]:
    """Optimizer groups: the trainable tensors by learning rate, `lr` or each method's own."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, adapter in state_of(model).adapters.items():
        # Modules trained beside the method (train=...) keep their own rate.
        rates = [part.method.lr if lr is None or not own else lr for part, own in adapter.expanded()]
        for _, tuner in tuners(model, name):
            for module in tuner.modules():
                if isinstance(module, Tuner) and module.part is not None:
                    groups.setdefault(rates[module.part], []).extend(p for p in module.parameters() if p.requires_grad)
    return [{"params": params, "lr": rate} for rate, params in groups.items()]


def fit(
    model: nn.Module,
    batches: Iterable,
    *,
    epochs: int = 1,
    lr: float | None = None,
    warmup: float = 0.1,
    weight_decay: float = 0.0,
    clip: float = 1.0,
    loss_fn: LossFn | None = None,
    seed: int = 0,
    progress: bool = True,
    on_epoch: Callable[[int, nn.Module], dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Trains the adapter with AdamW, linear warm-up and linear decay, and returns the log.

    batches: what each epoch iterates over; dicts (loss = model(**batch).loss), or (inputs, target) pairs with
        loss_fn(model(inputs), target). `batches.set_epoch(epoch)` is called if it exists; without `len(batches)` one
        epoch is run to count.
    lr: None takes each method's own; heads keep theirs.   warmup: fraction of all steps.   clip: gradient norm.
    on_epoch(epoch, model) -> dict: merged into the epoch's row of the log.
    The log has a row {"step", "epoch", "loss", "lr", "seconds"} per step and a row {"epoch", "loss", ...} per epoch.
    ValueError if nothing is trainable or there is no batch; RuntimeError if the loss is not finite.
    """
    from tqdm.auto import tqdm

    state = state_of(model)
    if state.merged:
        raise RuntimeError(f"{', '.join(state.merged)} is merged; pk.unmerge(model) before training")
    groups = param_groups(model, lr)
    params = [p for group in groups for p in group["params"]]
    if not params:
        raise ValueError("nothing is trainable; load the adapter with trainable=True")
    if iter(batches) is batches:
        raise ValueError("batches is an iterator, which one epoch uses up; pass a list or a DataLoader")
    per_epoch = _length(batches)
    if not per_epoch:
        raise ValueError("batches is empty; expected at least one batch")
    total = epochs * per_epoch
    optimizer = torch.optim.AdamW(groups, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _triangle(total, warmup))
    torch.manual_seed(seed)
    random.seed(seed)
    device = params[0].device
    log: list[dict[str, Any]] = []
    step, began = 0, time.perf_counter()
    with tqdm(total=total, disable=not progress, unit="step", dynamic_ncols=True) as bar:
        for epoch in range(1, epochs + 1):
            if hasattr(batches, "set_epoch"):
                batches.set_epoch(epoch)
            model.train()
            losses = []
            for batch in batches:
                loss = _loss(model, _to(batch, device), loss_fn)
                value = loss.item()
                if not math.isfinite(value):
                    raise RuntimeError(f"the loss is {value} at step {step + 1}; lower the learning rate")
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(params, clip)
                optimizer.step()
                rate = schedule.get_last_lr()[0]
                schedule.step()
                step += 1
                losses.append(value)
                seconds = time.perf_counter() - began
                log.append({"step": step, "epoch": epoch, "loss": value, "lr": rate, "seconds": seconds})
                bar.set_postfix(epoch=epoch, loss=f"{value:.3f}", refresh=False)
                bar.update()
            row = {"epoch": epoch, "loss": sum(losses) / max(len(losses), 1)}
            if on_epoch is not None:
                model.eval()
                row.update(on_epoch(epoch, model))
            log.append(row)
    model.eval()
    return log


def _length(batches: Iterable) -> int:
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:  # a DataLoader over a stream has __len__ and raises all the same
        return sum(1 for _ in batches)


def _triangle(total: int, warmup: float) -> Callable[[int], float]:
    rising = max(1, round(total * warmup))
    return lambda step: min((step + 1) / rising, (total - step) / max(1, total - rising))


def _to(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {k: _to(v, device) for k, v in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(_to(v, device) for v in batch)
    return batch


def _loss(model: nn.Module, batch: Any, loss_fn: LossFn | None) -> Tensor:
    if loss_fn is not None:
        inputs, target = batch
        return loss_fn(model(inputs), target)
    if not isinstance(batch, Mapping):
        raise ValueError(f"a batch is a {type(batch).__name__}; expected a dict for model(**batch), or pass loss_fn")
    loss = getattr(model(**batch), "loss", None)
    if loss is None:
        raise ValueError("model(**batch) returned no loss; put labels into the batch or pass loss_fn")
    return loss
