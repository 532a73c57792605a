"""What drives the methods of a model through a training: its phases, schedules and terms of the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from .attach import names_of, state_of, tuners
from .method import Method, Phase, Tuner
from .site import base_parameters


def unmerged(model: nn.Module, what: str) -> None:
    """RuntimeError while an adapter is merged; ValueError if nothing is attached."""
    if merged := state_of(model).merged:
        raise RuntimeError(f"{', '.join(merged)} is merged; pk.unmerge(model) before {what}")


def device_of(model: nn.Module) -> torch.device:
    """Where the model is: the device of its first parameter."""
    return next(p for _, p in base_parameters(model)).device


def trained(model: nn.Module) -> list[str]:
    """The active adapters with something trainable in them."""
    names = state_of(model).active
    return [n for n in names if any(p.requires_grad for _, t in tuners(model, n) for p in t.parameters())]


def all_tuners(model: nn.Module, name: str) -> Iterator[Tuner]:
    """The tuners of one adapter, those inside other tuners too."""
    for _, tuner in tuners(model, name):
        yield from (module for module in tuner.modules() if isinstance(module, Tuner))


def eject(model: nn.Module, name: str | None = None) -> nn.Module:
    """Takes what only training needed off one adapter (None: all), and returns the model, whose outputs stay bit-equal.

    That is the network that makes a prefix or a prompt; the rows that it makes take its place, in the saved adapter
    too. Where there is none, nothing happens.
    """
    for n in names_of(model, name):
        with torch.no_grad():  # all before the first goes: tuners share parts of their networks
            made = [(tuner, values) for tuner in all_tuners(model, n) if (values := tuner.ejected())]
        for tuner, values in made:
            trainable = any(p.requires_grad for p in tuner.parameters())
            for own in (*tuner._parameters, *tuner._modules):
                delattr(tuner, own)
            for own, value in values.items():
                setattr(tuner, own, nn.Parameter(value.clone(), trainable))
        adapter = state_of(model).adapters[n]
        adapter.parts = [replace(part, method=part.method.ejected()) for part in adapter.parts]
    return model


def penalty(model: nn.Module) -> Tensor:
    """The sum of the penalties of all active tuners: 0-d, on the model's device, 0. if there is none.

    `pk.fit` and `pk.hf.Callback` add it to the loss; a training loop of your own does it with this.
    """
    total = torch.zeros((), device=device_of(model))
    for name in state_of(model).active:
        for tuner in all_tuners(model, name):
            if (term := tuner.penalty()) is not None:
                total = total + term.to(total.device)
    return total


Terms = Callable[[nn.Module, Any, Any], Tensor | None]


def method_terms(model: nn.Module) -> Terms | None:
    """(model, batch, outputs) -> the sum of the active methods' Method.loss; None if none of them has one."""
    state = state_of(model)
    methods = [part.method for n in state.active for part, _ in state.adapters[n].expanded()]
    methods = [m for m in methods if type(m).loss is not Method.loss]

    def terms(model: nn.Module, batch: Any, outputs: Any) -> Tensor | None:
        found = [t for m in methods if (t := m.loss(model, batch, outputs)) is not None]
        return sum(found[1:], found[0]) if found else None

    return terms if methods else None


def has_penalty(model: nn.Module) -> bool:
    """Whether any active tuner has a penalty; without one, training need not ask."""
    return any(type(t).penalty is not Tuner.penalty for n in state_of(model).active for t in all_tuners(model, n))


Group = tuple[Method, list[Tuner]]


def groups(model: nn.Module, names: list[str]) -> list[Group]:
    """The methods of the named adapters, each with its tuners; those inside other tuners are a group by their class."""
    found: dict[Any, Group] = {}
    for name in names:
        parts = [part.method for part, _ in state_of(model).adapters[name].expanded()]
        for tuner in all_tuners(model, name):
            own = tuner.part is None
            if own and not hasattr(tuner, "cfg"):
                continue  # around others
            method = tuner.cfg if own else parts[cast(int, tuner.part)]
            found.setdefault((name, type(tuner) if own else tuner.part), (method, []))[1].append(tuner)
    return list(found.values())


def scheduled(model: nn.Module, names: list[str]) -> list[Group]:
    """The groups of the named adapters that want `step`."""
    return [
        (method, own)
        for method, own in groups(model, names)
        if type(method).step is not Method.step or any(type(t).step is not Tuner.step for t in own)
    ]


@torch.no_grad()
def advance(scheduled: list[Group], progress: float) -> None:
    """An optimizer step is done."""
    for method, own in scheduled:
        method.step(own, progress)


def prepared(model: nn.Module, names: list[str]) -> None:
    """RuntimeError if a tuner of the named adapters is not ready to be trained."""
    for name in names:
        for tuner in all_tuners(model, name):
            if reason := tuner.ready():
                raise RuntimeError(reason)


@dataclass(frozen=True)
class Entry:
    """One part of an adapter begins a phase before optimizer step `start` (from 0)."""

    start: int
    adapter: str
    part: int
    method: Method
    phase: Phase

    @torch.no_grad()
    def enter(self, model: nn.Module) -> None:
        own = [tuner for tuner in all_tuners(model, self.adapter) if tuner.part == self.part]
        self.method.enter(own, self.phase.name)


def timeline(model: nn.Module, names: list[str], total: int) -> list[Entry]:
    """The phases of every part of the named adapters, in the order in which they begin."""
    entries = []
    for name in names:
        for number, (part, _) in enumerate(state_of(model).adapters[name].expanded()):
            phases, start = part.method.phases(total), 0
            if any(p.steps < 0 for p in phases) or sum(p.steps for p in phases) != total:
                steps = ", ".join(f"{p.name} {p.steps}" for p in phases)
                raise ValueError(f"the phases of {part.method.key} ({steps}) do not add up to {total} steps")
            for phase in phases:
                entries.append(Entry(start, name, number, part.method, phase))
                start += phase.steps
    return sorted(entries, key=lambda entry: entry.start)
