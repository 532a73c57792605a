"""Routed LoRA: all adapters of a batch in one op."""

import copy

import pytest
import torch
from torch import nn

import peft_kernels as pk
from peft_kernels.ops._op import recording


def served(dropouts=(0.0, 0.0, 0.0), below=None):
    """A linear with adapters of three ranks and scales, in eval mode; below: a method attached to it before."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 12))
    if below is not None:
        pk.attach(model, below, ("0",), name="below")
    for i, (rank, p) in enumerate(zip((2, 3, 8), dropouts, strict=True)):
        pk.attach(model, pk.LoRA(rank=rank, alpha=4.0 - i, rslora=i == 1, dropout=p), ("0",), name="abc"[i], seed=i)
    with torch.no_grad():
        for tuner in model[0].peft.tuners.values():
            for parameter in tuner.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval(), torch.randn(4, 5, 20)


def routed(model, x, names):
    with pk.route(model, names), recording() as ran:
        y = model(x)
    return y, [row["op"] for row in ran]


def alone(model, x, names):
    rows = []
    for row, name in zip(x, names, strict=True):
        pk.set_active(model, [] if name is None else [name])
        rows.append(model(row))
    return torch.stack(rows)


NAMES = ["b", None, "c", "a"]


@pytest.mark.parametrize("grad", (False, True))
def test_one_op_for_all_adapters(grad):
    model, x = served()
    expected = alone(model, x, NAMES)
    with torch.set_grad_enabled(grad):
        y, ran = routed(model, x, NAMES)
    assert ran == ["multi_lora_linear"]
    torch.testing.assert_close(y, expected)
    assert torch.equal(y[1], nn.functional.linear(x, model[0].weight, model[0].bias)[1])


def test_gradients_are_those_of_each_adapter_alone():
    model, x = served(dropouts=(0.5, 0.5, 0.5))
    numbers = [p for name in "ab" for p in model[0].peft.tuners[name].parameters()]
    names = ["b", None, "b", "a"]
    expected = torch.autograd.grad(alone(model, x, names).square().sum(), numbers)
    y, ran = routed(model, x, names)
    y.square().sum().backward()
    assert ran == ["multi_lora_linear"]
    for p, grad in zip(numbers, expected, strict=True):
        torch.testing.assert_close(p.grad, grad)
    assert all(p.grad is None for p in model[0].peft.tuners["c"].parameters())  # no row of the batch is c's


def test_dropout_in_training():
    model, x = served(dropouts=(0.5, 0.5, 0.5))
    plain, _ = routed(model, x, NAMES)
    model.train()
    first, ran = routed(model, x, NAMES)
    second, _ = routed(model, x, NAMES)
    assert ran == ["multi_lora_linear"]
    for row, name in enumerate(NAMES):
        assert torch.equal(first[row], second[row]) == torch.equal(first[row], plain[row]) == (name is None)


def test_adapters_with_different_dropout_run_one_by_one():
    model, x = served(dropouts=(0.5, 0.0, 0.0))
    assert routed(model, x, NAMES)[1] == ["multi_lora_linear"]  # in eval there is none
    model.train()
    assert "multi_lora_linear" not in routed(model, x, NAMES)[1]


def test_rows_of_other_methods_are_left_to_them():
    model, x = served(below=pk.IA3())
    names = ["b", "below", None, "c"]
    expected = alone(model, x, names)
    y, ran = routed(model, x, names)
    assert ran.count("multi_lora_add") == 1
    torch.testing.assert_close(y, expected)
    assert torch.equal(y[2], nn.functional.linear(x, model[0].weight, model[0].bias)[2])


def test_dora_beside_lora_keeps_its_own_form():
    model, x = served(below=pk.DoRA(rank=2))
    names = ["below", "b", None, "c"]
    torch.testing.assert_close(routed(model, x, names)[0], alone(model, x, names))


def test_an_unrouted_batch_is_the_base():
    model, x = served()
    y, ran = routed(model, x, [None] * 4)
    assert ran == []
    assert torch.equal(y, nn.functional.linear(x, model[0].weight, model[0].bias))


@torch.no_grad()
def test_the_bank_is_kept_and_never_stale():
    model, x = served()
    tuners = model[0].peft.tuners

    def bank():
        routed(model, x, NAMES)
        return tuners["a"]._kept["bank"][1]

    kept = bank()
    assert bank() is kept
    tuners["c"].b.mul_(3)
    assert bank() is not kept
    torch.testing.assert_close(routed(model, x, NAMES)[0], alone(model, x, NAMES))
    with torch.enable_grad():  # a fused step counts no version
        alone(model, x, NAMES).sum().backward()
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True).step()
    torch.testing.assert_close(routed(model, x, NAMES)[0], alone(model, x, NAMES))
    tuners["b"].a = nn.Parameter(torch.ones(3, 20))
    torch.testing.assert_close(routed(model, x, NAMES)[0], alone(model, x, NAMES))
    assert not copy.deepcopy(model)[0].peft.tuners["a"]._kept
    model.train()
    assert not tuners["a"]._kept
    routed(model, x, NAMES)
    assert not tuners["a"]._kept  # in training the numbers change at every step
    model.eval()
    pk.detach(model, "b")
    torch.testing.assert_close(routed(model, x, ["a", None, "c", "a"])[0], alone(model, x, ["a", None, "c", "a"]))
