"""fit: the reference training loop."""

from __future__ import annotations

import dataclasses
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint as files
from .attach import state_of, tuners
from .batches import LossFn, finite, length, task_loss, to
from .distil import Distillation
from .life import (
    Entry,
    advance,
    all_tuners,
    has_penalty,
    method_terms,
    penalty,
    prepared,
    scheduled,
    trained,
    unmerged,
)
from .method import Tuner
from .plan import Plan, timed
from .store import described

OnEpoch = Callable[[int, nn.Module], dict[str, Any]]

_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def param_groups(model: nn.Module, lr: float | None = None, phases: Iterable[Entry] = ()) -> list[dict[str, Any]]:
    """Optimizer groups of the active adapters: the trainable tensors by learning rate.

    A phase that was entered decides the rate of its method, else `lr` does, else the method; modules trained beside
    it (train=...) and what a tuner names in `rates` keep their own.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    seen: set[int] = set()
    for name in trained(model):
        parts = state_of(model).adapters[name].expanded()
        rates = [lr if main and lr is not None else part.rate for part, main in parts]
        latest = {entry.part: entry.phase.lr for entry in phases if entry.adapter == name}
        rates = [rate if (now := latest.get(part)) is None else now for part, rate in enumerate(rates)]
        for tuner in all_tuners(model, name):
            if tuner.part is None:  # inside another or around others
                continue
            for module in tuner.modules():
                own = module.rates if isinstance(module, Tuner) else {}
                for key, p in module.named_parameters(recurse=False):
                    if p.requires_grad and id(p) not in seen:
                        seen.add(id(p))
                        groups.setdefault(own.get(key, rates[tuner.part]), []).append(p)
    return [{"params": params, "lr": rate} for rate, params in groups.items()]


def fit(
    model: nn.Module,
    batches: Iterable,
    *,
    epochs: int = 1,
    steps: int | None = None,
    seconds: float | None = None,
    lr: float | None = None,
    warmup: float = 0.1,
    weight_decay: float = 0.0,
    clip: float = 1.0,
    loss_fn: LossFn | None = None,
    teacher: Distillation | None = None,
    seed: int = 0,
    progress: bool = True,
    on_epoch: OnEpoch | None = None,
    accumulate: int = 1,
    precision: str | None = None,
    patience: int | None = None,
    monitor: str = "validation_loss",
    checkpoint: str | os.PathLike | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
) -> list[dict[str, Any]]:
    """Trains the active adapters with AdamW, linear warm-up and linear decay, and returns the log.

    batches: what each epoch iterates over; dicts (loss = model(**batch).loss), or (inputs, target) pairs with
        loss_fn(model(inputs), target). `batches.set_epoch(epoch)` is called if it exists; without `len(batches)` one
        epoch is run to count.
    steps: end after so many optimizer steps, within an epoch or after several, whatever `epochs` is.
    seconds: end after so much wall time of steps (on_epoch and checkpoints do not count) instead. How many steps that
        will be is estimated anew at each step from the time that the last ones took; phases and the learning rate
        follow the estimate and end with it. Such a training cannot be repeated to the bit. At least one step.
    lr: None takes each method's own; heads keep theirs.   warmup: fraction of all steps.   clip: gradient norm.
    teacher: pk.Distillation(model): what it predicts is a part of the loss.
    on_epoch(epoch, model) -> dict: merged into the epoch's row of the log.
    accumulate: batches per optimizer step, which takes the mean of their losses.
    precision: "bf16" or "fp16" runs the forward under autocast; adapters stay in their own dtype. fp16 needs CUDA.
    patience: stop when `monitor`, a number of the epoch's row of which lower is better, has not improved for so many
        epochs, and in any case end with the best epoch's weights. Of several phases only the last one is watched.
    checkpoint: directory written after each epoch, every `checkpoint_every` steps, and on KeyboardInterrupt, which is
        then raised again; `pk.load` reads the adapter from it.
    resume: go on from `checkpoint` if there is one. Weights and log (but for its times) end bit-equal to those of a run
        without a break if the batches come in the same order again: those of a list, of a DataLoader that shuffles
        with torch's global generator (no persistent_workers: they draw in the first epoch only), or of any `batches`
        whose set_epoch(epoch) alone decides their order.
    Where a method has several phases, each has a new optimizer and a schedule of its own.
    The log has a row {"step", "epoch", "loss", "lr", "seconds"} per step, a row {"epoch", "loss", ...} per epoch, and
    of several phases a row {"phase", "step", "trainable"} before the first step of each.
    ValueError if nothing is trainable, there is no batch, or a resume has other settings; RuntimeError if the loss is
    not finite, or a method is to be calibrated first; FileExistsError if `checkpoint` holds a training that is not to
    be resumed.
    """
    from tqdm.auto import tqdm

    unmerged(model, "training")
    names = trained(model)
    if not names:
        raise ValueError("nothing is trainable; load the adapter with trainable=True or activate it")
    whole = {"accumulate": accumulate, "steps": steps, "patience": patience, "checkpoint_every": checkpoint_every}
    for label, number in whole.items():
        if number is not None and number < 1:
            raise ValueError(f"{label} = {number}; expected at least 1")
    if seconds is not None and not 0 < seconds < float("inf"):
        raise ValueError(f"seconds = {seconds}; expected a positive number")
    if steps is not None and seconds is not None:
        raise ValueError(f"steps = {steps} and seconds = {seconds}; expected one of them")
    if precision is not None and precision not in _PRECISIONS:
        raise ValueError(f"precision {precision!r}; expected None, {' or '.join(map(repr, _PRECISIONS))}")
    if patience is not None and on_epoch is None and monitor != "loss":
        raise ValueError(f"patience watches {monitor!r}; give an on_epoch that returns it, or monitor='loss'")
    if checkpoint is None and (resume or checkpoint_every):
        raise ValueError("resume and checkpoint_every need checkpoint=, the directory to use")
    if teacher is not None:
        if not isinstance(teacher, Distillation):
            raise ValueError(f"teacher is a {type(teacher).__name__}; expected pk.Distillation(teacher)")
        teacher.check(model)
    per_epoch = length(batches)
    adapters = {n: described(state_of(model).adapters[n]) for n in names}
    directory = None if checkpoint is None else Path(checkpoint)
    taught = None if teacher is None or directory is None else teacher.described(model)
    settings = files.Settings(
        epochs,
        lr,
        warmup,
        weight_decay,
        clip,
        seed,
        accumulate,
        precision,
        patience,
        monitor,
        per_epoch,
        adapters,
        taught,
        steps,
        seconds,
    )
    run = _Run(model, batches, settings, loss_fn, teacher, on_epoch, directory, checkpoint_every)
    saved = None if directory is None else files.read(directory)
    if saved is not None and not resume:
        raise FileExistsError(f"{directory} holds a checkpoint; pass resume=True to go on or choose another directory")
    if saved is None:
        prepared(model, names)
        run.start()
    else:
        run.resume(*saved)
    with tqdm(total=run.plan.total, initial=run.at.step, disable=not progress, unit="step", dynamic_ncols=True) as bar:
        try:
            run.train(bar)
        except KeyboardInterrupt:
            run.roll_back()
            run.save()
            raise
    model.eval()
    return run.log


class _Run:
    """One training: its state, a step, an epoch, and their way into a checkpoint and back."""

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable,
        settings: files.Settings,
        loss_fn: LossFn | None,
        teacher: Distillation | None,
        on_epoch: OnEpoch | None,
        directory: Path | None,
        every: int | None,
    ):
        self.model, self.batches, self.settings = model, batches, settings
        self.loss_fn, self.teacher, self.on_epoch = loss_fn, teacher, on_epoch
        self.directory, self.every = directory, every
        self.names = list(settings.method)
        self.device = next(p for n in self.names for _, t in tuners(model, n) for p in t.parameters()).device
        if settings.precision == "fp16" and self.device.type != "cuda":
            raise ValueError(f"precision 'fp16' on {self.device.type}; it needs CUDA, use 'bf16' here")
        self.plan = Plan(model, self.names, settings)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "fp16")
        self.at, self.log = files.Position(), list[dict[str, Any]]()
        self.best: dict[str, Tensor] = {}
        self.buffers: list[tuple[Tensor, Tensor]] = []  # each with its value at the last mark

    # -- from the start, or from a checkpoint -------------------------------------------------------------------------

    def start(self) -> None:
        self.began = time.perf_counter()
        torch.manual_seed(self.settings.seed)
        random.seed(self.settings.seed)
        self.epoch_rng = self.rng = files.rng_state(self.device)

    def resume(self, record: dict[str, Any], values: dict[str, Tensor]) -> None:
        self.settings.check(record["settings"], self.directory)
        self.at, self.log = files.Position(**record["position"]), record["log"]
        self.began = time.perf_counter() - self.at.seconds
        for entry in self.plan.entries[: self.at.entered]:
            entry.enter(self.model)
        self.plan.follow(self.at)
        if self.at.step:
            advance(scheduled(self.model, self.names), self.plan.progress(self.at))
        files.set_weights(self.model, self.names, files.below(values, "now/"), self.directory)
        if self.at.entered:
            self._begin()
            files.set_moments(self.optimizer, files.below(values, "optimizer/"))
            if record["scaler"]:
                self.scaler.load_state_dict(record["scaler"])
        self.best = files.below(values, "best/")
        self.epoch_rng, self.rng = files.below(values, "epoch_rng/"), files.below(values, "rng/")
        files.set_rng_state(self.epoch_rng if self.at.begun else self.rng, self.device)

    def save(self) -> None:
        """Writes the checkpoint, if there is a directory for it."""
        if self.directory is None:
            return
        parts = {
            "now": files.weights(self.model, self.names),
            "best": self.best,
            "optimizer": files.moments(self.optimizer) if self.at.entered else {},
            "epoch_rng": self.epoch_rng if self.at.begun else {},  # else the next one is the same
            "rng": self.rng,
        }
        record = {
            "settings": dataclasses.asdict(self.settings),
            "position": dataclasses.asdict(self.at),
            "scaler": self.scaler.state_dict(),
            "log": self.log,
        }
        values = {f"{part}/{key}": t for part, found in parts.items() for key, t in found.items()}
        files.write(self.directory, self.model, self.names, record, values)

    def _mark(self) -> None:
        """The state is whole here: what a checkpoint written before the next mark goes back to."""
        self.at.seconds = time.perf_counter() - self.began
        if self.directory is not None:
            self.rng = files.rng_state(self.device)
            for b, held in self.buffers:
                held.copy_(b)

    def roll_back(self) -> None:
        """Undoes what forward passes since the last mark have moved (BatchNorm); weights move in whole steps only."""
        for b, held in self.buffers:
            b.copy_(held)

    # -- training -----------------------------------------------------------------------------------------------------

    def train(self, bar: Any) -> None:
        while (self.at.begun or not self.plan.over(self.at)) and not self.at.stopped:
            self._epoch(bar)
        if self.best:
            files.set_weights(self.model, self.names, self.best, self.directory)
        self._enter(self.plan.entries[self.at.entered :])  # phases without steps at the end

    def _epoch(self, bar: Any) -> None:
        at, settings = self.at, self.settings
        if hasattr(self.batches, "set_epoch"):
            self.batches.set_epoch(at.epoch)
        self.model.train()
        if not at.begun:
            self.epoch_rng = self.rng
        iterator = iter(self.batches)
        if at.begun:
            for _ in range(at.batch):
                self._next(iterator)
            files.set_rng_state(self.rng, self.device)
        while at.batch < settings.batches and not self.plan.over(at):
            began = time.perf_counter()
            if due := self.plan.due(at):
                with files.uninterrupted():
                    self._enter(due)
                    at.begins = at.step
                    self._begin()
                    at.begun = True
                    self._mark()
            self._step(iterator, began)
            bar.total = self.plan.total
            bar.set_postfix(epoch=at.epoch, loss=f"{self.log[-1]['loss']:.3f}", refresh=False)
            bar.update()
            if self.every and at.step % self.every == 0:
                self.save()
        losses = [row["loss"] for row in self.log if row.get("epoch") == at.epoch]
        row = {"epoch": at.epoch, "loss": sum(losses) / len(losses)}
        if self.on_epoch is not None:
            self.model.eval()
            row.update(self.on_epoch(at.epoch, self.model))
        with files.uninterrupted():
            self.log.append(row)
            self._watch(row)
            at.epoch, at.batch, at.begun = at.epoch + 1, 0, False
            self._mark()
        self.save()

    def _step(self, iterator: Iterator, began: float) -> None:
        """One optimizer step on the next batches.   began: when what it needs first did."""
        at, settings, start = self.at, self.settings, time.perf_counter()
        size = min(settings.accumulate, settings.batches - at.batch)
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        for _ in range(size):
            loss = self._loss(to(self._next(iterator), self.device))
            losses.append(finite(loss, f"step {at.step + 1}", "lower the learning rate"))
            self.scaler.scale(loss / size).backward()
        with files.uninterrupted():
            factor = _triangle(at.step - at.begins, self.plan.ends(at) - at.begins, settings.warmup)
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], settings.clip)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            at.step, at.batch, at.begun = at.step + 1, at.batch + size, True
            at.spent += time.perf_counter() - began
            timed(at, time.perf_counter() - start)
            self.plan.follow(at)
            advance(self.scheduled, self.plan.progress(at))
            self._mark()
            row = {"step": at.step, "epoch": at.epoch, "loss": sum(losses) / size}
            self.log.append({**row, "lr": self.optimizer.param_groups[0]["lr"], "seconds": at.seconds})

    def _next(self, iterator: Iterator) -> Any:
        try:
            return next(iterator)
        except StopIteration:
            raise ValueError(f"an epoch of batches ended early; len(batches) is {self.settings.batches}") from None

    def _loss(self, batch: Any) -> Tensor:
        with self._autocast():
            if self.teacher is None:
                loss, outputs = task_loss(self.model, batch, self.loss_fn)
            else:
                loss, outputs = self.teacher.taught(self.model, batch, self.loss_fn)
            term = self.terms and self.terms(self.model, batch, outputs)
        if term is not None:
            loss = loss + term
        return loss + penalty(self.model) if self.penalised else loss

    def _autocast(self) -> AbstractContextManager:
        precision = self.settings.precision
        return torch.autocast(self.device.type, _PRECISIONS[precision]) if precision else nullcontext()

    # -- phases and early stopping ------------------------------------------------------------------------------------

    def _enter(self, entries: list[Entry]) -> None:
        several = len(self.plan.entries) > len({(e.adapter, e.part) for e in self.plan.entries})
        for entry in entries:
            entry.enter(self.model)
            self.at.entered += 1
        trainable = sum(p.numel() for group in param_groups(self.model) for p in group["params"])
        rows = [
            {"phase": e.phase.name, "step": max(e.start, self.at.step) + 1, "trainable": trainable} for e in entries
        ]
        if several:
            self.log += [row for i, row in enumerate(rows) if row not in rows[:i]]  # methods may enter one together

    def _begin(self) -> None:
        """A new optimizer and schedule, up to where the next phase begins."""
        entered = self.plan.entries[: self.at.entered]
        groups = param_groups(self.model, self.settings.lr, entered)
        if not groups:
            raise ValueError(f"nothing is trainable in phase {entered[-1].phase.name!r}")
        for group in groups:
            group["initial_lr"] = group["lr"]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=self.settings.weight_decay)
        self.scheduled = scheduled(self.model, self.names)
        if self.directory is not None:
            self.buffers = [(b, b.clone()) for b in self.model.buffers()]
        self.terms, self.penalised = method_terms(self.model), has_penalty(self.model)

    def _watch(self, row: dict[str, Any]) -> None:
        """Keeps the weights of the best epoch, and stops when none has been better for too long."""
        settings, at = self.settings, self.at
        if settings.patience is None or at.step <= self.plan.last_start():
            return
        if settings.monitor not in row:
            raise ValueError(f"patience watches {settings.monitor!r}; on_epoch returned {', '.join(row)}")
        value = float(row[settings.monitor])
        if value < (float("inf") if at.best is None else at.best):
            at.best, at.waited = value, 0
            self.best = {k: t.clone() for k, t in files.weights(self.model, self.names).items()}
        else:
            at.waited += 1
            at.stopped = at.waited >= settings.patience


def _triangle(step: int, total: int, warmup: float) -> float:
    """The learning rate of a step (from 0) as a fraction of the highest."""
    rising = max(1, round(total * warmup))
    return min((step + 1) / rising, (total - step) / max(1, total - rising))
