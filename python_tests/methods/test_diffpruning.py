"""DiffPruning: gates without noise and with it, what they cost, and the three stages."""

import copy
import math

import pytest
import torch
from models import assert_same, make, perturb, snapshot
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy
from toys import signs

import peft_kernels as pk
from peft_kernels.engine.attach import tuners
from peft_kernels.engine.fit import param_groups
from peft_kernels.engine.life import timeline

TARGETS = ("first", "second")
SIGMOID_OF_1 = 1 / (1 + math.exp(-1))


def gated(**fields):
    model = pk.attach(make("mlp").model, pk.DiffPruning(**fields), TARGETS)
    return model, {path: t for path, t in tuners(model, "default")}


@pytest.mark.parametrize(("alpha", "gate"), [(0.0, 0.0), (1.0, 0.693176), (5.0, 1.0), (-3.0, 0.0)])
def test_gates_without_noise(alpha, gate):
    _, found = gated(alpha=alpha, structured=False)
    with torch.no_grad():
        found["first"].w.fill_(2.0)
        torch.testing.assert_close(found["first"].change(), torch.full((20, 12), 2 * gate), atol=2e-6, rtol=0)


def test_gates_are_drawn_in_training_alone():
    """At alpha = 1 a gate is open with probability sigmoid(1) = .731059."""
    model = nn.Sequential(nn.Linear(400, 500, bias=False))
    nn.init.zeros_(model[0].weight)
    pk.attach(model, pk.DiffPruning(alpha=1.0, structured=False), ("0",))
    with torch.no_grad():
        model[0].peft.tuners["default"].w.fill_(1.0)
    model.train()
    weights = [model(torch.eye(400)).T for _ in range(2)]
    assert not torch.equal(*weights)
    for w in weights:
        assert (w != 0).float().mean().item() == pytest.approx(SIGMOID_OF_1, abs=5 * math.sqrt(0.2 / w.numel()))
    torch.manual_seed(3)
    first = model(torch.eye(400))
    torch.manual_seed(3)
    assert torch.equal(model(torch.eye(400)), first)
    model.eval()
    torch.testing.assert_close(model(torch.eye(400)).T, torch.full((500, 400), 0.693176), atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"structured": False}, 480 * SIGMOID_OF_1),
        ({}, 480 * SIGMOID_OF_1**2),
        ({"l0": "sum"}, 482 * SIGMOID_OF_1),
    ],
)
def test_the_penalty_is_the_expected_number_of_open_gates(fields, expected):
    model, found = gated(alpha=1.0, penalty=0.1, **fields)
    penalty = pk.penalty(model)
    assert penalty.item() == pytest.approx(0.1 * expected, rel=1e-5)
    penalty.backward()
    slope = 0.1 * SIGMOID_OF_1 * (1 - SIGMOID_OF_1) * (SIGMOID_OF_1 if fields == {} else 1)
    torch.testing.assert_close(found["first"].alpha.grad, torch.full((20, 12), slope))


def test_changes_and_gates_have_learning_rates_of_their_own():
    model, _ = gated()
    assert pk.counts(model).trainable == 2 * 480 + 2

    def groups(lr=None, entered=0):
        entries = timeline(model, ["default"], 10)[:entered]
        return {g["lr"]: sum(p.numel() for p in g["params"]) for g in param_groups(model, lr, entries)}

    assert groups() == {1e-5: 480, 0.1: 482}
    assert groups(1e-3) == {1e-3: 480, 0.1: 482}
    assert groups(1e-3, entered=2) == {5e-5: 480, 0.1: 482}
    assert [(p.name, p.steps, p.lr) for p in pk.DiffPruning(finetune=0.3).phases(10)] == [
        ("train", 7, None),
        ("finetune", 3, 5e-5),
    ]


@pytest.mark.parametrize("structured", [True, False])
def test_the_second_phase_keeps_the_largest_changes_of_all(structured):
    model, found = gated(keep_ratio=0.1, alpha=0.5, structured=structured)
    perturb(model)
    with torch.no_grad():
        found["second"].w.mul_(3)
        changes = {name: t.change().flatten() for name, t in found.items()}
        everything = torch.cat(list(changes.values()))
        least = everything.abs().sort(descending=True).values[47]
        method = pk.DiffPruning(keep_ratio=0.1)
        method.enter(list(found.values()), "train")
        method.enter(list(found.values()), "finetune")
    for name, tuner in found.items():
        positions = (changes[name].abs() >= least).nonzero().flatten()
        assert torch.equal(tuner.positions.long(), positions)
        assert torch.equal(tuner.vals, changes[name][positions])
    assert pk.counts(model).trainable == 48


def test_three_stages(tmp_path):
    model, found = gated(keep_ratio=0.1, finetune=0.4, finetune_lr=1e-2)
    before, x = snapshot(model), signs(24, 1)[0][0]
    log = pk.fit(model, signs(24, 1) * 20, lr=1e-2, loss_fn=cross_entropy, progress=False)
    assert [(r["phase"], r["step"]) for r in log if "phase" in r] == [("train", 1), ("finetune", 13)]
    assert log[-1]["loss"] < log[1]["loss"]
    assert_same(model, before)
    counts = pk.counts(model)
    assert counts.trainable == counts.changed == counts.stored == 48
    assert counts.bytes == 48 * (4 + 4)
    place = pk.save(model, tmp_path)
    assert {(key.split(".")[1], t.dtype) for key, t in load_file(place / "adapter_model.safetensors").items()} == {
        ("positions", torch.int32),
        ("vals", torch.float32),
    }
    model.eval()
    twin = pk.load(make("mlp").model, tmp_path)
    assert torch.equal(twin(x), model(x))
    positions = {name: t.positions.clone() for name, t in found.items()}
    pk.fit(model, signs(24, 1) * 10, loss_fn=cross_entropy, progress=False)  # goes on with the mask that it has
    for name, tuner in found.items():
        assert torch.equal(tuner.positions, positions[name])
    report = pk.merge(model)
    assert report.numbers == 48 + 20  # the biases of a merged module are written too
    pk.unmerge(model)
    assert_same(model, before)


def test_a_penalty_closes_gates():
    def opened(penalty):
        model, found = gated(penalty=penalty, finetune=0.0, alpha=1.0)
        phases = timeline(model, ["default"], 10)
        assert [e.phase.steps for e in phases] == [10, 0]
        twin = copy.deepcopy(model)
        for batch in signs(24, 1) * 10:
            twin.train()
            (cross_entropy(twin(batch[0]), batch[1]) + pk.penalty(twin)).backward()
        return sum(t.alpha.grad.mean().item() for _, t in tuners(twin, "default"))

    assert opened(0.1) > 10 * abs(opened(0.0))  # a positive gradient lowers alpha


def test_a_pattern():
    model, found = gated(pattern="1:4")
    pk.fit(model, signs(24, 1) * 10, loss_fn=cross_entropy, progress=False)
    for tuner in found.values():
        chosen = torch.zeros(tuner.shape).flatten().index_fill_(0, tuner.positions.long(), 1)
        assert bool((chosen.view(-1, 4).sum(1) == 1).all())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"l0": "max"}, "expected 'product' or 'sum'"),
        ({"finetune": 1.0}, "finetune = 1.0"),
        ({"penalty": -1.0}, "penalty = -1.0"),
        ({"alpha_lr": 0.0}, "alpha_lr = 0.0"),
        ({"keep_ratio": 0.0}, "keep_ratio = 0.0"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        pk.DiffPruning(**fields)
    assert "\n" not in str(error.value)
