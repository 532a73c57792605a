"""Trainings that end after so many steps or seconds: their schedule ends with them, by a clock that batches move."""

import types

import pytest
import torch
from models import make
from toys import Toy, toys  # noqa: F401  # a fixture

import peft_kernels as pk
from peft_kernels.engine import fit as loop
from peft_kernels.engine.attach import tuners
from peft_kernels.engine.method import Phase, Tuner

cross_entropy = torch.nn.functional.cross_entropy


@pytest.fixture
def clock(monkeypatch):
    """Its time stands still but for what is added to `now`."""
    held = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(perf_counter=lambda: held.now))
    return held


class Batches:
    """Batches that take `cost(n)` seconds, the n-th of the training."""

    def __init__(self, clock, cost, length=7, stop=None):
        self.clock, self.cost, self.length, self.stop, self.taken = clock, cost, length, stop, 0

    def __len__(self):
        return self.length

    def __iter__(self):
        made = torch.Generator().manual_seed(1)
        for _ in range(self.length):
            self.taken += 1
            if self.taken == self.stop:
                raise KeyboardInterrupt
            self.clock.now += self.cost(self.taken)
            x = torch.randn(4, 12, generator=made)
            yield x, (x[:, 0] > 0).long()


def run(batches, method=None, **options):
    case = make("mlp")
    pk.attach(case.model, method or pk.LoRA(rank=2), ("first", "second"))
    log = pk.fit(case.model, batches, loss_fn=cross_entropy, progress=False, **options)
    return [row for row in log if "lr" in row], log, case.model


def test_steps_end_within_an_epoch(clock):
    steps, log, _ = run(Batches(clock, lambda n: 1.0), steps=10)
    assert [row["step"] for row in steps] == list(range(1, 11)) and [row["epoch"] for row in steps][-1] == 2
    assert [row["epoch"] for row in log if "step" not in row] == [1, 2]
    rates = [row["lr"] for row in steps]
    whole, _, _ = run(Batches(clock, lambda n: 1.0, length=10), epochs=1)
    assert rates == [row["lr"] for row in whole]


@pytest.mark.parametrize(
    "cost",
    [lambda n: 0.1, lambda n: 3.0 if n == 1 else 0.1, lambda n: 0.05 if n < 60 else 0.2, lambda n: 0.02 * (n % 9 + 1)],
    ids=["even", "slow at first", "slower later", "uneven"],
)
def test_seconds_end_with_the_schedule(clock, cost):
    steps, _, _ = run(Batches(clock, cost), seconds=12.0)
    assert clock.now == pytest.approx(12.0, abs=0.3)
    rates, peak = [row["lr"] for row in steps], pk.LoRA.lr
    assert max(rates) > 0.9 * peak and rates[0] < 0.05 * peak
    assert rates[-1] < 0.05 * peak
    top = rates.index(max(rates))
    assert top < 0.35 * len(rates)


def test_what_is_no_step_does_not_count(clock):
    def on_epoch(epoch, model):
        clock.now += 100
        return {}

    steps, _, _ = run(Batches(clock, lambda n: 0.1), seconds=3.0, on_epoch=on_epoch)
    assert len(steps) == 30


def test_phases_and_schedules_follow_the_clock(clock, toys):  # noqa: F811
    heard = []

    class Half(Toy):
        def phases(self, total_steps):
            first = total_steps // 2
            return [Phase("a", first), Phase("b", total_steps - first), Phase("c", 0)]

    class Hearing(Tuner, method=Half):
        def __init__(self, cfg, site):
            super().__init__(cfg, site)
            self.shift = site.param(site.n_out)

        def step(self, progress):
            heard.append(progress)

        def fold(self, weight, bias):
            return weight, self.shift if bias is None else bias + self.shift

    steps, log, _ = run(Batches(clock, lambda n: 0.1), Half(), seconds=10.0)
    assert [row["phase"] for row in log if "phase" in row] == ["a", "b", "c"]
    second = next(row["step"] for row in log if row.get("phase") == "b")
    assert second == pytest.approx(len(steps) / 2, abs=2)
    assert steps[second - 3]["lr"] < 0.15 * max(row["lr"] for row in steps), "a phase has a schedule of its own"
    own = heard[:: len(heard) // len(steps)]
    assert own == sorted(own) and own[-1] == 1.0


def test_a_budget_can_be_resumed(clock, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(Batches(clock, lambda n: 0.1, stop=31), seconds=6.0, checkpoint=tmp_path / "c")
    steps, _, model = run(Batches(clock, lambda n: 0.1), seconds=6.0, checkpoint=tmp_path / "c", resume=True)
    assert len(steps) == 60 and steps[-1]["lr"] < 0.05 * pk.LoRA.lr
    assert any(t.abs().sum() for _, tuner in tuners(model, "default") for t in tuner.state_dict().values())
    with pytest.raises(ValueError, match="seconds"):
        run(Batches(clock, lambda n: 0.1), seconds=7.0, checkpoint=tmp_path / "c", resume=True)


def test_one_step_at_least(clock):
    steps, _, _ = run(Batches(clock, lambda n: 5.0), seconds=1.0)
    assert len(steps) == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [({"steps": 0}, "steps = 0"), ({"seconds": 0.0}, "seconds = 0"), ({"steps": 1, "seconds": 1.0}, "one of them")],
)
def test_bad_budgets(clock, options, says):
    with pytest.raises(ValueError, match=says):
        run(Batches(clock, lambda n: 1.0), **options)
