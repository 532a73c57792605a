"""The search without gradients: what it finds, that it takes none, and that a break leaves no trace."""

import json
import sys

import numpy
import pytest
import torch
from models import make
from torch import nn
from toys import Toy, ToyTuner, toys  # noqa: F401  # a fixture

import peft_kernels as pk
from peft_kernels.engine.attach import tuners

pytest.importorskip("cma")
cross_entropy = nn.functional.cross_entropy


def data(rows=64):
    made = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 12, generator=made)
    target = (x[:, 0] > 0).long()
    return [(x[i : i + 16], target[i : i + 16]) for i in range(0, rows, 16)]


def tuned(method=None, **how):
    case = make("mlp")
    return pk.attach(case.model, method or pk.BitFit(), **how)


def search(model, batches=None, **how):
    how = {"evaluations": 121, "population": 12, "sigma": 0.3, "loss_fn": cross_entropy, "progress": False, **how}
    return pk.search(model, data() if batches is None else batches, **how)


def loss_of(model):
    with torch.no_grad():
        return sum(cross_entropy(model.eval()(x), y).item() for x, y in data()) / 4


def values(model):
    return {f"{path}.{k}": v.clone() for path, t in tuners(model, "default") for k, v in t.state_dict().items()}


def assert_equal(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def untimed(log):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in log]


# -- what it finds ----------------------------------------------------------------------------------------------------


def test_it_learns_and_logs_and_leaves_the_best():
    model = tuned()
    base = {key: p.clone() for key, p in model.named_parameters() if ".peft." not in f".{key}"}
    before = loss_of(model)
    log = search(model, evaluations=601)
    assert [row["step"] for row in log] == list(range(51))
    assert log[0]["loss"] == pytest.approx(before) and log[0]["evaluations"] == 1
    assert [row["evaluations"] for row in log[1:]] == list(range(13, 602, 12))
    assert all(a["loss"] >= b["loss"] for a, b in zip(log, log[1:], strict=False))
    assert log[-1]["loss"] < 0.7 * before
    assert loss_of(model) == pytest.approx(log[-1]["loss"])
    assert log[-1]["stopped"] == "evaluations" and not any("stopped" in row for row in log[:-1])
    assert all(torch.equal(p, base[key]) for key, p in model.named_parameters() if key in base)
    assert all(row.keys() >= {"step", "evaluations", "loss", "mean", "sigma", "seconds"} for row in log)


def test_there_is_no_backward_pass():
    """Not even a graph for one: the loss may be one that no gradient goes through."""
    model, seen = tuned(), []

    def errors(logits, target):
        seen.append(logits.requires_grad)
        return (logits.argmax(-1) != target).double().mean()

    log = search(model, loss_fn=errors)
    assert not any(seen) and len(seen) == 4 * log[-1]["evaluations"] == 4 * 121
    assert log[-1]["loss"] < log[0]["loss"]
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for _, t in tuners(model, "default") for p in t.parameters()] == [True] * 3


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_transformers(family):
    case = make(family)
    labels = (
        torch.zeros(len(case.inputs["input_ids"]), dtype=torch.long) if family == "bert" else case.inputs["input_ids"]
    )
    pk.attach(case.model, pk.LoRA(rank=1), "v", layers=0)
    log = pk.search(case.model, [{**case.inputs, "labels": labels}], evaluations=200, sigma=0.3, progress=False)
    assert log[-1]["loss"] < log[0]["loss"]
    with torch.no_grad():
        assert case.model(**case.inputs, labels=labels).loss.item() == pytest.approx(log[-1]["loss"])


def test_a_seed_decides_everything():
    first, again, other = tuned(), tuned(), tuned()
    state = numpy.random.get_state()[1].copy(), torch.get_rng_state()
    log = search(first, seed=3)
    assert (numpy.random.get_state()[1] == state[0]).all() and torch.equal(torch.get_rng_state(), state[1])
    numpy.random.seed(7)
    torch.manual_seed(7)
    assert untimed(search(again, seed=3)) == untimed(log)
    assert_equal(values(first), values(again))
    assert untimed(search(other, seed=4)) != untimed(log)


def test_a_search_never_ends_worse_than_it_began():
    model = tuned()
    search(model, evaluations=601)
    found = values(model)
    log = search(model, sigma=100.0, evaluations=13)
    assert log[0]["loss"] == log[-1]["loss"] < log[-1]["mean"]
    assert_equal(values(model), found)


def test_drawn_batches():
    """Every candidate of a generation sees the same ones; the result is the mean of the distribution."""
    model, seen = tuned(), []

    def noted(logits, target):
        seen.append(target.sum().item())
        return cross_entropy(logits, target)

    log = search(model, draw=2, evaluations=601, loss_fn=noted)
    assert len(seen) == 2 * 601
    generations = [{tuple(seen[i : i + 2]) for i in range(k, k + 24, 2)} for k in range(2, len(seen), 24)]
    assert all(len(pairs) == 1 for pairs in generations) and len(set.union(*generations)) > 3
    assert loss_of(model) < log[0]["loss"]
    assert all(row["loss"] <= row["mean"] for row in log)


@pytest.mark.parametrize("diagonal", [True, None, False])
def test_many_numbers(diagonal):
    """More than a thousand have no covariance unless they are told to."""
    model = nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    pk.attach(model, pk.LoRA(rank=14), ("0",))
    x = torch.randn(32, 40)
    log = search(model, [(x, x[:, :1])], loss_fn=nn.functional.mse_loss, diagonal=diagonal, evaluations=60)
    assert log[-1]["loss"] < log[0]["loss"]


def test_what_methods_add_to_the_loss_is_searched_too(toys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(ToyTuner, "step", pk.Tuner.step)

    def start(**fields):
        return search(tuned(Toy(**fields), targets=("first",)), evaluations=1)[0]["loss"]

    assert start(term=0.5) == pytest.approx(start() + 0.5, abs=1e-6)  # the second pass says the same, plus one
    assert start(penalty=0.5) == pytest.approx(start() + 0.5 * 20)


def test_seconds_and_the_strategy_itself_end_it():
    log = search(tuned(), evaluations=None, seconds=1e-9)
    assert [row["step"] for row in log] == [0] and log[-1]["stopped"] == "seconds"
    model = tuned()
    log = search(model, loss_fn=lambda y, t: torch.zeros(()), evaluations=10_000)
    assert "tolfun" in log[-1]["stopped"] and len(log) < 200


def test_candidates_without_a_loss_are_the_worst():
    def loss(logits, target):
        made = cross_entropy(logits, target)
        return made if made < 0.8 else made * float("inf")

    model = tuned()
    search(model, evaluations=601)
    assert all(row["mean"] <= 0.8 for row in search(model, loss_fn=loss))


def test_on_step():
    model, seen = tuned(), []

    def on_step(step, model):
        model.train()
        seen.append((step, loss_of(model)))
        return {"accuracy": 0.5}

    log = search(model, on_step=on_step)
    assert [row["step"] for row in log[1:]] == [step for step, _ in seen] == list(range(1, 11))
    assert [row["loss"] for row in log[1:]] == pytest.approx([loss for _, loss in seen])
    assert all(row["accuracy"] == 0.5 for row in log[1:]) and "accuracy" not in log[0]


def test_a_progress_bar(capsys):
    search(tuned(), progress=True)
    assert "121/121" in capsys.readouterr().err


# -- breaks -----------------------------------------------------------------------------------------------------------


class Stop:
    """A loss that is interrupted at the call of this number."""

    def __init__(self, at):
        self.calls, self.at = 0, at

    def __call__(self, logits, target):
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return cross_entropy(logits, target)


@pytest.mark.parametrize("draw", [None, 2])
@pytest.mark.parametrize("at", [30, 150, 400])
def test_a_break_leaves_no_trace(tmp_path, at, draw):
    whole, first, second = tuned(), tuned(), tuned()
    log = search(whole, draw=draw)
    with pytest.raises(KeyboardInterrupt):
        search(first, draw=draw, loss_fn=Stop(at if draw is None else at // 2), checkpoint=tmp_path)
    so_far = pk.load(make("mlp").model, tmp_path, trainable=True)
    assert_equal(values(so_far), values(first))
    counted = Stop(None)
    again = search(second, draw=draw, loss_fn=counted, checkpoint=tmp_path, resume=True)
    assert untimed(again) == untimed(log)
    assert_equal(values(second), values(whole))
    assert counted.calls < (4 if draw is None else 2) * 121, "it evaluated again what it had been told"
    assert all(a["seconds"] <= b["seconds"] for a, b in zip(again, again[1:], strict=False))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"training.safetensors", "training.json", "adapter_model.safetensors", "adapter_config.json"}


def test_more_evaluations_go_on(tmp_path):
    whole, model = tuned(), tuned()
    log = search(whole)
    search(model, evaluations=61, checkpoint=tmp_path, checkpoint_every=2)
    assert untimed(search(tuned(), checkpoint=tmp_path, resume=True)) == untimed(log)
    assert json.loads((tmp_path / "training.json").read_text())["log"][-1]["stopped"] == "evaluations"


def test_a_resume_asks_for_the_same(tmp_path):
    search(tuned(), evaluations=13, checkpoint=tmp_path)
    with pytest.raises(FileExistsError, match="resume=True"):
        search(tuned(), checkpoint=tmp_path)
    with pytest.raises(ValueError, match="was written with sigma=0.3, this training has 0.5"):
        search(tuned(), sigma=0.5, checkpoint=tmp_path, resume=True)
    with pytest.raises(ValueError, match="was written with method="):
        search(tuned(targets=("first",)), checkpoint=tmp_path, resume=True)
    with pytest.raises(ValueError, match="this training has"):
        pk.fit(tuned(), data(), loss_fn=cross_entropy, checkpoint=tmp_path, resume=True, progress=False)


def test_other_steps_are_noticed(tmp_path, monkeypatch):
    """As on another processor, whose sums round otherwise."""
    search(tuned(), evaluations=61, checkpoint=tmp_path)
    draw = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *shape, **how: draw(*shape, **how) * (1 + 1e-12))
    with pytest.raises(ValueError, match="takes other steps here"):
        search(tuned(), checkpoint=tmp_path, resume=True)


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"evaluations": None}, "needs a bound; give evaluations or seconds"),
        ({"evaluations": 0}, "evaluations = 0; expected at least 1"),
        ({"population": 3}, "population = 3; expected at least 4"),
        ({"draw": 0}, "draw = 0; expected at least 1"),
        ({"draw": 5}, "draw = 5; expected at most the 4 batches"),
        ({"sigma": 0.0}, "sigma = 0.0; expected a positive number"),
        ({"seconds": float("inf")}, "seconds = inf; expected a positive number"),
        ({"resume": True}, "need checkpoint="),
        ({"checkpoint_every": 2}, "need checkpoint="),
        ({"batches": []}, "batches is empty"),
        ({"batches": iter(data())}, "is an iterator"),
        ({"loss_fn": None}, "expected a dict for model"),
    ],
)
def test_bad_arguments(how, told):
    with pytest.raises(ValueError, match=".") as error:
        search(tuned(), **how)
    assert told in str(error.value)


def test_bad_models(toys):  # noqa: F811
    with pytest.raises(ValueError, match="several phases"):
        search(tuned(Toy(prime=0.5), targets=("first",)))
    with pytest.raises(ValueError, match="toy follows a schedule of training steps"):
        search(tuned(Toy(), targets=("first",)))
    model = nn.Linear(200, 100)
    with pytest.raises(ValueError, match=r"20,100 numbers are trainable; a search takes 1 to 10,000"):
        search(pk.attach(model, pk.FullTuning()), [(torch.zeros(1, 200), torch.zeros(1).long())])
    model = tuned()
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing is trainable"):
        search(model)
    model = tuned()
    before = values(model)
    with pytest.raises(RuntimeError, match="nan before the first generation"):
        search(model, loss_fn=lambda y, t: torch.tensor(float("nan")))
    with pytest.raises(RuntimeError, match="lower sigma"):
        search(
            model, sigma=1e30, loss_fn=lambda y, t: y.abs().max() if y.abs().max() < 1e20 else y.sum() * float("inf")
        )
    assert_equal(values(model), before)
    with pytest.raises(RuntimeError, match="before a search"):
        search(pk.merge(model) and model)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "cma", None)
    with pytest.raises(ImportError, match=r'cma is not installed; pip install "peft-kernels\[search\]"'):
        search(tuned())
