"""Methods that no user needs and the tests of training do: with phases, schedules, penalties, terms of the loss."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import peft_kernels as pk
from peft_kernels.engine import method as registry


@dataclass(frozen=True)
class Toy(pk.Method, roles=("q",), lr=1e-2, tiny={}, family="additive"):
    """Adds a learned vector to the output, of which the second phase keeps the larger half beside a new one."""

    penalty: float = 0.0
    term: float = 0.0
    prime: float = 0.0  # of all steps
    prime_lr: float = 0.0
    train_lr: float = 0.0

    def phases(self, total_steps):
        first = round(self.prime * total_steps)
        train = pk.Phase("train", total_steps - first, self.train_lr or None)
        return [pk.Phase("prime", first, self.prime_lr or None), train] if first else [train]

    def loss(self, model, batch, outputs):
        if not self.term:
            return None
        again = model(**batch).logits if isinstance(batch, dict) else model(batch[0])
        before = outputs if isinstance(outputs, torch.Tensor) else outputs.logits
        return self.term * (again - before.detach() + 1).square().mean()


class ToyTuner(pk.Tuner, method=Toy):
    def __init__(self, cfg, site):
        super().__init__(cfg, site)
        self.cfg = cfg
        self.shift = site.param(site.n_out, init="ones")
        self.late = site.param(site.n_out)
        self.late.requires_grad_(not cfg.prime)
        self.register_buffer("mask", torch.ones(site.n_out))
        self.register_buffer("progress", torch.zeros(()))
        self.entered = []

    def fold(self, weight, bias):
        shift = self.shift * self.mask + self.late * (1 + self.progress)
        return weight, shift if bias is None else bias + shift

    def enter(self, phase):
        self.entered.append(phase)
        if phase == "train" and self.cfg.prime:
            order = self.shift.detach().abs().argsort()
            self.mask[order[: len(order) // 2]] = 0
            self.shift = nn.Parameter(
                self.shift.detach() * self.mask * torch.rand(())
            )  # a draw, which a resume repeats
            self.late.requires_grad_(True)

    def step(self, progress):
        self.progress.fill_(progress)

    def penalty(self):
        return self.cfg.penalty * self.shift.square().sum() if self.cfg.penalty else None


@dataclass(frozen=True)
class Watch(pk.Method, roles=("q",), lr=1e-3, tiny={}, family="additive"):
    """Watches the weight and bias of its site."""

    view: bool = False


class WatchTuner(pk.Tuner, method=Watch):
    def __init__(self, cfg, site):
        super().__init__(cfg, site)
        self.cfg, self.stats = cfg, None
        self.shift = site.param(site.n_out)

    def fold(self, weight, bias):
        return weight, self.shift if bias is None else bias + self.shift

    def watched(self, site):
        weight = site.weight if self.cfg.view else site.module.weight
        return {"weight": weight, "shift": self.shift}

    def calibrate(self, stats):
        self.stats = stats


@dataclass(frozen=True)
class Observe(pk.Method, roles=("q",), lr=1e-3, tiny={}, family="additive"):
    """Sums the squares of the gradient of its weight over rows, from what it observes."""

    expected: bool = False
    samples: int = 0

    def calibrate(self, measured, beside):
        super().calibrate(measured, beside)
        self.together.append([tuner for tuner, _ in measured])
        self.beside.append(beside)

    together, beside = [], []


class ObserveTuner(pk.Tuner, method=Observe):
    def __init__(self, cfg, site):
        super().__init__(cfg, site)
        self.fisher, self.passes = torch.zeros(site.n_out, site.n_in, dtype=torch.float64), 0
        self.shift = site.param(site.n_out)

    def fold(self, weight, bias):
        return weight, self.shift if bias is None else bias + self.shift

    def observe(self, site, x, dy, samples, weight):
        self.passes += 1
        for n, (begin, end) in enumerate(samples.unfold(0, 2, 1).tolist()):
            grad = dy[begin:end].T.double() @ x[begin:end].double()
            self.fisher += grad.square() * (1 if weight is None else weight[n])

    def ready(self):
        return "" if self.passes else "Observe has seen nothing; call pk.calibrate(model, batches) first"


@dataclass(frozen=True)
class Beside(pk.Method, roles=("ffn",), lr=1e-3, tiny={}, family="additive", kinds=("span", "module")):
    """y + x A: a linear path around a sublayer, from its input to its output."""


class BesideTuner(pk.Tuner, method=Beside):
    def __init__(self, cfg, site):
        super().__init__(cfg, site)
        self.a = site.param(site.n_out, site.n_in)

    def forward(self, base, x, *args, **kwargs):
        y = base(x, *args, **kwargs)
        return y + (x @ self.a.T).to(y.dtype)


@dataclass(frozen=True)
class Onto(pk.Method, roles=("o", "down"), lr=1e-3, tiny={}, family="additive"):
    """y + c r, with the residual r of the sublayer."""


class OntoTuner(pk.Tuner, method=Onto):
    needs_residual = True

    def __init__(self, cfg, site):
        super().__init__(cfg, site)
        self.c = site.param(1)

    def forward(self, base, x):
        y = base(x)
        return y + (self.c * base.seen("residual")).to(y.dtype)


def signs(rows=4, batches=5):
    """Batches for the MLP: is the first input above zero?"""
    made = torch.Generator().manual_seed(1)
    x = torch.randn(rows * batches, 12, generator=made)
    return [(own, (own[:, 0] > 0).long()) for own in x.split(rows)]


def fitted(method, **options):
    """(MLP with the method on its inner linears and its output trained whole, the log of two epochs)"""
    from models import make

    model = make("mlp").model
    pk.attach(model, method, ("first", "second"), train=("out",))
    options = {"epochs": 2, "lr": 1e-2, "loss_fn": nn.functional.cross_entropy, "progress": False, **options}
    return model, pk.fit(model, signs(), **options)


def classified(rows=5):
    """(tiny BERT with three classes, batches of 3 rows)"""
    from models import make

    made = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 50, (rows, 7), generator=made)
    labels = torch.arange(rows) % 3
    batches = [{"input_ids": ids[i : i + 3], "labels": labels[i : i + 3]} for i in range(0, rows, 3)]
    return make("bert").model, batches


_TOYS = {key: registry._registry.pop(key) for key in ("toy", "watch", "observe", "beside", "onto")}


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    """In the registry for the length of a test: nobody else's tests see them."""
    for key, cls in _TOYS.items():
        monkeypatch.setitem(registry._registry, key, cls)
