"""search: the trainable numbers of an adapter by CMA-ES, from losses alone.

Black-Box Tuning: Sun et al. 2022, arXiv:2201.03514. The strategy is Hansen's (arXiv:1604.00772), in his package `cma`.
"""

from __future__ import annotations

import dataclasses
import math
import os
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint as files
from .attach import state_of, tuners
from .batches import LossFn, length, task_loss, to
from .life import device_of, method_terms, penalty, prepared, scheduled, timeline, trained, unmerged
from .store import described

OnStep = Callable[[int, nn.Module], dict[str, Any]]

EXTRA = 'pip install "peft-kernels[search]"'
MOST = 10_000  # numbers; the strategy learns nothing of more in any bearable number of evaluations
WHOLE = 1_000  # up to so many the whole covariance matrix adapts: its eigenvectors take seconds beyond


@dataclass(frozen=True)
class Settings(files.Comparable):
    """What decides the numbers of a search: a resume must have the same."""

    population: int
    sigma: float
    diagonal: bool | None
    draw: int | None
    seed: int
    batches: int
    cma: str  # its version
    method: dict[str, Any]  # by adapter


def search(
    model: nn.Module,
    batches: Iterable,
    *,
    evaluations: int | None = 8000,
    seconds: float | None = None,
    population: int = 20,
    sigma: float = 1.0,
    diagonal: bool | None = None,
    draw: int | None = None,
    loss_fn: LossFn | None = None,
    seed: int = 0,
    progress: bool = True,
    on_step: OnStep | None = None,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
) -> list[dict[str, Any]]:
    """Searches the trainable numbers of the active adapters by CMA-ES, without a backward pass, and returns the log.

    Meant for few numbers, such as those of PromptTuning(subspace=500). Sun et al. 2022, arXiv:2201.03514. The model
    runs in eval mode and without gradients; neither it nor the loss need be differentiable.

    batches: dicts (loss = model(**batch).loss), or pairs with loss_fn, as for `pk.fit`; read once and kept. The loss of
        a candidate is the mean over them, with what methods add to the loss. Nothing is shuffled.
    evaluations, seconds: at which the search ends, after the generation under way; None: no bound, but one is needed.
    population: candidates in a generation.   sigma: their first distance from where the numbers are, in every number.
    diagonal: adapt variances alone (sep-CMA-ES); None: where there are more than 1,000 numbers.
    draw: None compares all candidates on all batches, and the best of all is the result. A number draws so many anew
        for each generation: its candidates see the same ones, but generations cannot be compared, and the result is the
        mean of the last distribution.
    on_step(generation, model) -> dict: merged into the generation's row of the log; the model holds the result so far.
    checkpoint: directory written every `checkpoint_every` generations, at the end, and on KeyboardInterrupt, which is
        then raised again; `pk.load` reads the adapter from it.
    resume: go on from `checkpoint` if there is one. The strategy is told the losses of before again, which takes no
        call of the model, and goes on bit-equal, from the same batches, on the same kind of machine.
    The log has a row {"step", "evaluations", "loss", "mean", "sigma", "seconds"} per generation: the result's loss
    (with `draw` the generation's lowest), the candidates' mean loss, their spread. Row 0 is the start, and without
    `draw` nothing ends worse; the last row says why it "stopped": evaluations, seconds, or the strategy's own reason,
    such as tolfun. A candidate whose loss is not finite counts as the worst of its generation.
    ValueError if more than 10,000 numbers or none are trainable, there is no batch, a method has phases or a schedule,
    or a resume has other settings; RuntimeError if the loss is not finite at the start or all through a generation, or
    a method is to be calibrated first; FileExistsError if `checkpoint` holds a search that is not to be resumed;
    ImportError without the package `cma`.
    """
    cma = _cma()
    from tqdm.auto import tqdm

    unmerged(model, "a search")
    names = trained(model)
    if not names:
        raise ValueError("nothing is trainable; load the adapter with trainable=True or activate it")
    if evaluations is None and seconds is None:
        raise ValueError("a search needs a bound; give evaluations or seconds")
    for label, number, least in (
        ("evaluations", evaluations, 1),
        ("population", population, 4),
        ("draw", draw, 1),
        ("checkpoint_every", checkpoint_every, 1),
    ):
        if number is not None and number < least:
            raise ValueError(f"{label} = {number}; expected at least {least}")
    for label, value in (("sigma", sigma), ("seconds", seconds)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{label} = {value}; expected a positive number")
    if checkpoint is None and (resume or checkpoint_every):
        raise ValueError("resume and checkpoint_every need checkpoint=, the directory to use")
    entries = timeline(model, names, 1000)  # how many decides no more than whether a phase has any
    if len({(e.adapter, e.part) for e in entries}) < len(entries):
        raise ValueError(f"{', '.join(names)} has several phases of training, and a search is one; use pk.fit")
    if groups := scheduled(model, names):
        raise ValueError(
            f"{groups[0][0].key} follows a schedule of training steps, of which a search has none; use pk.fit"
        )
    number = length(batches)
    if draw is not None and draw > number:
        raise ValueError(f"draw = {draw}; expected at most the {number} batches there are")
    adapters = {n: described(state_of(model).adapters[n]) for n in names}
    settings = Settings(population, sigma, diagonal, draw, seed, number, cma.__version__, adapters)
    directory = None if checkpoint is None else Path(checkpoint)
    saved = None if directory is None else files.read(directory)
    if saved is None:
        prepared(model, names)
    elif not resume:
        raise FileExistsError(f"{directory} holds a checkpoint; pass resume=True to go on or choose another directory")
    else:
        settings.check(saved[0]["settings"], directory)
        files.set_weights(model, names, files.below(saved[1], "now/"), directory)
    for entry in entries:
        entry.enter(model)
    run = _Search(model, list(batches), settings, loss_fn, directory)
    model.eval()
    with torch.no_grad():
        if saved is None:
            run.start(cma)
        else:
            run.resume(cma, *saved)
        with tqdm(
            total=evaluations, initial=run.evaluated, disable=not progress, unit="evaluation", dynamic_ncols=True
        ) as bar:
            try:
                while not run.ended(evaluations, seconds):
                    run.generation(bar)
                    if on_step is not None:
                        run.log[-1].update(on_step(run.log[-1]["step"], model))
                        model.eval()
                    bar.set_postfix(loss=f"{run.log[-1]['loss']:.4g}", sigma=f"{run.log[-1]['sigma']:.2g}")
                    if checkpoint_every and run.log[-1]["step"] % checkpoint_every == 0:
                        run.save()
            finally:
                run.put(run.result())
                run.save()
    return run.log


def _cma() -> Any:
    try:
        import cma
    except ModuleNotFoundError as error:
        raise ImportError(f"{error.name} is not installed; {EXTRA}") from None
    return cma


class _Search:
    """One search: the strategy, what it was told, and its way into a checkpoint and back."""

    def __init__(
        self,
        model: nn.Module,
        batches: list[Any],
        settings: Settings,
        loss_fn: LossFn | None,
        directory: Path | None,
    ):
        self.model, self.batches, self.settings = model, batches, settings
        self.loss_fn, self.directory = loss_fn, directory
        self.names, self.device = list(settings.method), device_of(model)
        every = [p for n in self.names for _, tuner in tuners(model, n) for p in tuner.parameters()]
        self.params = list({id(p): p for p in every if p.requires_grad}.values())
        size = sum(p.numel() for p in self.params)
        if not 0 < size <= MOST:
            raise ValueError(
                f"{size:,} numbers are trainable; a search takes 1 to {MOST:,}: those of a small adapter, such as "
                "PromptTuning(subspace=500), and of no module trained whole"
            )
        self.diagonal = size > WHOLE if settings.diagonal is None else settings.diagonal
        self.terms = method_terms(model)
        self.told: list[list[float]] = []  # the losses of each generation
        self.log = list[dict[str, Any]]()
        self.best = self.origin = torch.empty(0)
        self.lowest = math.inf

    # -- from the start, or from a checkpoint -------------------------------------------------------------------------

    def start(self, cma: Any) -> None:
        self.began = time.perf_counter()
        self.origin = torch.cat([p.detach().double().flatten().cpu() for p in self.params])
        self.strategy = self._strategy(cma)
        self.best, self.lowest = self.origin, self._loss(self.origin, 0)
        if not math.isfinite(self.lowest):
            raise RuntimeError(f"the loss is {self.lowest} before the first generation; look at the batches")
        row = {"step": 0, "evaluations": 1, "loss": self.lowest, "mean": self.lowest, "sigma": self.settings.sigma}
        self.log.append({**row, "seconds": time.perf_counter() - self.began})

    def resume(self, cma: Any, record: dict[str, Any], values: dict[str, Tensor]) -> None:
        self.log = record["log"]
        self.log[-1].pop("stopped", None)
        self.began = time.perf_counter() - self.log[-1]["seconds"]
        self.origin = self.best = values["origin"]
        self.lowest, self.strategy = self.log[0]["loss"], self._strategy(cma)
        for losses in values["told"].tolist():
            self._tell(self.strategy.ask(), losses)
        if not torch.equal(self.result(), values["result"]):
            raise ValueError(
                f"{self.directory}: told the same losses, the strategy takes other steps here than where it was "
                "written (another processor or numpy); search there, or begin again in another directory"
            )
        self.put(self.result())

    def _strategy(self, cma: Any) -> Any:
        settings, generator = self.settings, torch.Generator().manual_seed(self.settings.seed)

        def normal(*shape: int) -> Any:
            return torch.randn(shape, generator=generator, dtype=torch.float64).numpy()

        options = {
            "popsize": settings.population,
            "CMA_diagonal": self.diagonal,
            "randn": normal,
            "seed": math.nan,  # leave numpy's generator alone
            "verbose": -10,  # no output, and no look for a file of signals
            "verb_log": 0,
        }
        return cma.CMAEvolutionStrategy(self.origin.numpy(), settings.sigma, options)

    def save(self) -> None:
        """Writes the checkpoint, if there is a directory for it, with the result so far as the adapter."""
        if self.directory is None or not self.log:
            return
        record = {"settings": dataclasses.asdict(self.settings), "log": self.log}
        told = torch.tensor(self.told, dtype=torch.float64).view(-1, self.settings.population)
        now = {f"now/{key}": t for key, t in files.weights(self.model, self.names).items()}
        values = {"origin": self.origin, "told": told, "result": self.result().clone(), **now}
        with files.uninterrupted():
            files.write(self.directory, self.model, self.names, record, values)

    # -- searching ----------------------------------------------------------------------------------------------------

    @property
    def evaluated(self) -> int:
        return self.log[-1]["evaluations"]

    def ended(self, evaluations: int | None, seconds: float | None) -> bool:
        """Whether that was the last generation; its row then says why."""
        last = self.log[-1]
        if evaluations is not None and last["evaluations"] >= evaluations:
            why = "evaluations"
        elif seconds is not None and last["seconds"] >= seconds:
            why = "seconds"
        else:
            why = ", ".join(self.strategy.stop())
        if why:
            last["stopped"] = why
        return bool(why)

    def generation(self, bar: Any) -> None:
        step = len(self.told) + 1
        candidates, losses = self.strategy.ask(), []
        for candidate in candidates:
            losses.append(self._loss(torch.from_numpy(candidate), step))
            bar.update()
        finite = [loss for loss in losses if math.isfinite(loss)]
        if not finite:
            raise RuntimeError(f"the loss is {losses[0]} of every candidate of generation {step}; lower sigma")
        losses = [loss if math.isfinite(loss) else max(finite) for loss in losses]
        with files.uninterrupted():
            self._tell(candidates, losses)
            self.put(self.result())
            row: dict[str, Any] = {"step": step, "evaluations": 1 + step * len(losses)}
            row |= {"loss": self.lowest if self.settings.draw is None else min(losses)}
            row |= {"mean": sum(losses) / len(losses), "sigma": float(self.strategy.sigma)}
            self.log.append({**row, "seconds": time.perf_counter() - self.began})

    def _tell(self, candidates: list[Any], losses: list[float]) -> None:
        self.strategy.tell(candidates, losses)
        self.told.append(losses)
        if min(losses) < self.lowest:
            self.lowest = min(losses)
            self.best = torch.from_numpy(candidates[losses.index(self.lowest)]).clone()

    def result(self) -> Tensor:
        """The numbers to be left in the model, [n] fp64."""
        if self.settings.draw is None or not self.told:
            return self.best
        return torch.from_numpy(self.strategy.mean.copy())

    def put(self, numbers: Tensor) -> None:
        """Into the adapters.   numbers [n]"""
        for p, own in zip(self.params, numbers.split([p.numel() for p in self.params]), strict=True):
            p.copy_(own.view(p.shape))

    def _loss(self, numbers: Tensor, step: int) -> float:
        self.put(numbers)
        chosen, draw = self.batches, self.settings.draw
        if draw is not None:
            chosen = random.Random(f"{self.settings.seed} {step}").sample(chosen, draw)
        return sum(self._of(to(batch, self.device)) for batch in chosen) / len(chosen)

    def _of(self, batch: Any) -> float:
        loss, outputs = task_loss(self.model, batch, self.loss_fn)
        if self.terms is not None and (term := self.terms(self.model, batch, outputs)) is not None:
            loss = loss + term
        return (loss + penalty(self.model)).item()
