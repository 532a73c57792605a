"""Rescaling where no sample of the contract leads: long sums in each of its orders, and the form in place."""

import pytest
import torch
from laws import as_good, backends
from torch import nn

import peft_kernels as pk
from peft_kernels.ops import rescale, rescale_

f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16


def _tensors(m, n, dtype, low):
    made = torch.Generator().manual_seed(m + n)
    g, x, l = (torch.randn(shape, generator=made) for shape in ((m, n), (m, n), (n,)))
    return g.to(dtype), x.to(dtype), l.to(low)


# One row at a time and four, the last ones alone; strips of columns and whole rows; several blocks.
@pytest.mark.parametrize(
    ("shape", "dtype", "low"),
    [((2100, 70), bf16, f32), ((131, 1030), f32, f32), ((67, 2100), f16, f16), ((2050, 1100), f32, f32)],
)
def test_long_sums(shape, dtype, low):
    g, x, l = _tensors(*shape, dtype, low)
    as_good("rescale", x, l, backend="cpu")
    both = as_good("rescale_backward", g, x, l, (True, True), backend="cpu")
    assert torch.equal(both[1], as_good("rescale_backward", g, x, l, (False, True), backend="cpu")[1])


@pytest.mark.parametrize("name", backends("rescale", "triton"))
@pytest.mark.parametrize(
    ("shape", "dtype", "low"), [((150, 300), bf16, f32), ((9, 1100), f32, f32), ((0, 5), f16, f16)]
)
def test_tiles_and_parts(shape, dtype, low, name):
    g, x, l = _tensors(*shape, dtype, low)
    as_good("rescale", x, l, backend=name)
    as_good("rescale_backward", g, x, l, (True, True), backend=name)
    with pk.backend(name):
        own = x.clone()
        assert pk.ops.rescale_(own, l) is own and torch.equal(own, rescale(x, l))


@pytest.mark.parametrize("dtype", [f32, bf16])
def test_in_place(dtype):
    _, x, l = _tensors(5, 33, dtype, f32)
    own = x.clone()
    assert rescale_(own, l) is own and torch.equal(own, rescale(x, l))
    apart = x.T.contiguous().T
    assert rescale_(apart, l) is apart and torch.equal(apart, own)


def test_in_place_leaves_what_a_gradient_needs():
    """dl is a sum over x, dx is not: with l frozen x is neither kept nor spared."""
    _, x, l = _tensors(4, 7, f32, f32)
    x.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        y = x * 1
        assert rescale_(y, l) is y
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], l.expand(4, 7)) and (4, 7) not in kept
    y = x * 1
    l.requires_grad_()
    scaled = rescale_(y, l)
    assert scaled is not y and torch.equal(y, x)
    assert torch.equal(torch.autograd.grad(scaled.sum(), l)[0], x.detach().sum(0))
    with pytest.raises(ValueError, match=r"rescale_: l is \(7,\); expected \[4\]"):
        rescale_(x.T, l)


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("dtype", [f32, bf16])
def test_without_gradients_the_smaller_of_weight_and_activation_is_rescaled(on_input, dtype, monkeypatch):
    model = nn.Sequential(nn.Linear(12, 8).to(dtype))
    linear = model[0]
    pk.attach(model, pk.IA3(feedforward=("0",) if on_input else ()), "0")
    with torch.no_grad():
        linear.peft.tuners["default"].l.copy_(torch.rand(8 if not on_input else 12) + 0.5)
    x = torch.randn(20, 12).to(dtype)
    shapes = []
    for name in ("rescale", "rescale_"):
        real = getattr(pk.ops, name)
        monkeypatch.setattr(pk.ops, name, lambda x, l, real=real: shapes.append(tuple(x.shape)) or real(x, l))
    with torch.no_grad():
        outs = torch.cat([linear(x), linear(x[:3])])
    torch.testing.assert_close(outs, linear(torch.cat([x, x[:3]])).detach(), atol=1e-2, rtol=0)
    few, many = ((3, 12), (8, 12)) if on_input else ((3, 8), (20, 8))
    folded = not on_input and dtype == f32  # in plain torch
    assert shapes[:-1] == ([] if folded else [many]) + [few]
