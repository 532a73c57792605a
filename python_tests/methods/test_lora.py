"""Routed LoRA and DoRA: all adapters of a batch in one op."""

import copy

import pytest
import torch
from torch import nn

import peft_kernels as pk
from peft_kernels.ops._op import recording

pytestmark = pytest.mark.parametrize("method", [pk.LoRA, pk.DoRA])


def served(method, dropouts=(0.0, 0.0, 0.0), below=None):
    """A linear with adapters of three ranks and scales, in eval mode; below: a method attached to it before."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 12))
    if below is not None:
        pk.attach(model, below, ("0",), name="below")
    for i, (rank, p) in enumerate(zip((2, 3, 8), dropouts, strict=True)):
        pk.attach(model, method(rank=rank, alpha=4.0 - i, rslora=i == 1, dropout=p), ("0",), name="abc"[i], seed=i)
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
def test_one_op_for_all_adapters(method, grad):
    model, x = served(method)
    expected = alone(model, x, NAMES)
    with torch.set_grad_enabled(grad):
        y, ran = routed(model, x, NAMES)
    assert ran == ["multi_lora_linear"]
    torch.testing.assert_close(y, expected)
    assert torch.equal(y[1], nn.functional.linear(x, model[0].weight, model[0].bias)[1])


def test_gradients_are_those_of_each_adapter_alone(method):
    model, x = served(method, dropouts=(0.5, 0.5, 0.5))
    numbers = [p for name in "ab" for p in model[0].peft.tuners[name].parameters()]
    names = ["b", None, "b", "a"]
    expected = torch.autograd.grad(alone(model, x, names).square().sum(), numbers)
    y, ran = routed(model, x, names)
    y.square().sum().backward()
    assert ran == ["multi_lora_linear"]
    for p, grad in zip(numbers, expected, strict=True):
        torch.testing.assert_close(p.grad, grad)
    assert all(p.grad is None for p in model[0].peft.tuners["c"].parameters())  # no row of the batch is c's


def test_dropout_in_training(method):
    model, x = served(method, dropouts=(0.5, 0.5, 0.5))
    plain, _ = routed(model, x, NAMES)
    model.train()
    first, ran = routed(model, x, NAMES)
    second, _ = routed(model, x, NAMES)
    assert ran == ["multi_lora_linear"]
    for row, name in enumerate(NAMES):
        assert torch.equal(first[row], second[row]) == torch.equal(first[row], plain[row]) == (name is None)


@pytest.mark.parametrize("autocast", (False, True))
def test_a_row_in_training_is_as_in_a_batch_of_its_adapter(method, autocast):
    """With its dropout, whose mask is by row, and in autocast: values and gradients."""
    model, x = served(method, dropouts=(0.5, 0.5, 0.5))
    model.train()
    leaves = [x.requires_grad_(), *(p for name in "abc" for p in model[0].peft.tuners[name].parameters())]
    grads = [torch.zeros_like(leaf) for leaf in leaves]
    close = {"atol": 0.05, "rtol": 0.05} if autocast else {}

    def called():
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(x)

    with pk.route(model, NAMES):
        y = called()
    weight = torch.randn_like(y)
    for i, name in enumerate(NAMES):
        pk.set_active(model, [] if name is None else [name])
        own = called()
        torch.testing.assert_close(y[i], own[i], **close)
        found = torch.autograd.grad(own[i], leaves, weight[i], allow_unused=True)
        grads = [total if grad is None else total + grad for total, grad in zip(grads, found, strict=True)]
    for got, expected in zip(torch.autograd.grad(y, leaves, weight), grads, strict=True):
        torch.testing.assert_close(got, expected, **close)


def test_adapters_with_different_dropout_run_one_by_one(method):
    model, x = served(method, dropouts=(0.5, 0.0, 0.0))
    assert routed(model, x, NAMES)[1] == ["multi_lora_linear"]  # in eval there is none
    model.train()
    assert "multi_lora_linear" not in routed(model, x, NAMES)[1]


def test_rows_of_other_methods_are_left_to_them(method):
    model, x = served(method, below=pk.IA3())
    model[0].peft.tuners["below"].l.data[0] = 0
    names = ["b", "below", None, "c"]
    expected = alone(model, x, names)
    y, ran = routed(model, x, names)
    assert ran.count("multi_lora_add") == 1
    torch.testing.assert_close(y, expected)
    assert torch.equal(y[1].signbit(), expected[1].signbit())  # of zeros too
    assert torch.equal(y[2], nn.functional.linear(x, model[0].weight, model[0].bias)[2])


def test_dora_beside_lora(method):
    """Each has an op of its own for its rows."""
    model, x = served(method, below=pk.DoRA(rank=2) if method is pk.LoRA else pk.LoRA(rank=2))
    names = ["below", "b", None, "c"]
    expected = alone(model, x, names)
    y, ran = routed(model, x, names)
    assert ran == ["multi_lora_linear", "multi_lora_add"]
    torch.testing.assert_close(y, expected)
    assert torch.equal(y[2], nn.functional.linear(x, model[0].weight, model[0].bias)[2])


def test_an_unrouted_batch_is_the_base(method):
    model, x = served(method)
    y, ran = routed(model, x, [None] * 4)
    assert ran == []
    assert torch.equal(y, nn.functional.linear(x, model[0].weight, model[0].bias))


def test_a_batch_of_one_adapter_has_the_bits_of_an_unrouted_call(method):
    model, x = served(method, below=pk.IA3())
    y, ran = routed(model, x, ["b"] * 4)
    assert "lora_linear" in ran
    pk.set_active(model, ["b"])
    assert torch.equal(y, model(x))


@torch.no_grad()
def test_the_bank_is_kept_and_never_stale(method):
    model, x = served(method)
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
    assert not {"bank", "affine"} & set(tuners["a"]._kept)  # in training the numbers change at every step
    model.eval()
    pk.detach(model, "b")
    torch.testing.assert_close(routed(model, x, ["a", None, "c", "a"])[0], alone(model, x, ["a", None, "c", "a"]))
