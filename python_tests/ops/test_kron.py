"""Kronecker products beyond the laws of test_ops: sizes, orders, threads, instruction sets, merging, bad arguments."""

import pytest
import torch
from laws import LEVELS, at_level

import peft_kernels as pk
from peft_kernels.check import DTYPES, compare
from peft_kernels.kernels.kron import kron_native
from peft_kernels.ops import kron, kron_add_, kron_linear, kron_linear_, kron_sum_weight

OPS = pk.ops.all_ops()
# p, q, r, s: both orders forward and backward, whole and broken vectors, more columns than a panel of tiles
SHAPES = [(64, 64, 64, 64), (24, 32, 32, 24), (130, 20, 140, 150), (3, 200, 4, 300), (5, 4, 17, 33), (64, 1, 1, 64)]


assert not kron_native.unavailable("cpu")  # which loads the kernels


def problem(shape, m, dtype=torch.float32, seed=0):
    """(x, a, b, acc, bias, g)"""
    p, q, r, s = shape
    made = torch.Generator().manual_seed(seed)
    sizes = ((m, p * r), (p, q), (r, s), (m, q * s), (q * s,), (m, q * s))
    x, a, b, acc, bias, g = (torch.randn(n, generator=made, dtype=torch.float64) for n in sizes)
    return tuple(t.to(dtype) for t in (x, a * p**-0.5, b * r**-0.5, acc, bias, g))


def as_good(out, plain, truth):
    _, wrong = compare(out, plain, truth)
    assert not wrong, wrong


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("m", [1, 3, 70])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_on_larger_sizes(shape, m, dtype):
    x, a, b, acc, bias, g = problem(shape, m, dtype)
    if m == 3:  # as a linear weight kron(w1, w2) gives them
        a, b = a.T.contiguous().T, b.T.contiguous().T
    if m == 70:  # adjoining in neither direction
        a, b = (torch.stack([t, t], -1)[..., 1] for t in (a, b))
    calls = (
        (OPS["kron_linear_add"], (acc, x, a, b, bias, -0.5)),
        (OPS["kron_linear_backward"], (g, x, a, b, -0.5, (True, True, True))),
    )
    for op, args in calls:
        ours, plain = getattr(kron_native, op.name)(*args), op.reference(*args)  # whatever the dispatcher would take
        truth = op.reference(*(t.double() if isinstance(t, torch.Tensor) else t for t in args))
        for out, p, t in zip(*((o,) if isinstance(o, torch.Tensor) else o for o in (ours, plain, truth)), strict=True):
            as_good(out, p, t)


def test_the_orders_agree():
    """The reference takes the cheaper one: each is the cheaper one of some shape."""
    assert kron.b_first(8, 8, 4, 4) and not kron.b_first(8, 2, 4, 4)
    for shape in ((8, 2, 4, 4), (2, 8, 4, 4), (4, 4, 2, 8), (4, 4, 8, 2)):
        x, a, b, *_ = problem(shape, 5, torch.float64)
        for leaf in (x, a, b):
            leaf.requires_grad_()
        y, dense = kron_linear(x, a, b), x @ torch.kron(a, b)
        torch.testing.assert_close(y, dense)
        both = (torch.autograd.grad(out.square().sum(), (x, a, b)) for out in (y, dense))
        for ours, theirs in zip(*both, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_threads_and_tokens_do_not_change_a_bit(shape):
    """A token's result depends on nothing beside it, and no number on how the tokens are dealt out."""
    x, a, b, acc, bias, g = problem(shape, 150)
    before, outs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with pk.backend("cpu"):
                y = kron_linear(x, a, b, acc=acc, bias=bias, scale=0.3)
                outs.append((y, *OPS["kron_linear_backward"].run(g, x, a, b, 0.3, (True, True, True))))
                some = kron_linear(x[7:9], a, b, acc=acc[7:9], bias=bias, scale=0.3)
            assert torch.equal(y[7:9], some)
    finally:
        torch.set_num_threads(before)
    for other in outs[1:]:
        assert all(torch.equal(p, q) for p, q in zip(outs[0], other, strict=True))


@pytest.mark.parametrize("level", LEVELS)
def test_every_instruction_set(level):
    at_level(
        level,
        "import test_kron as own\n"
        "for shape in own.SHAPES[1:5]:\n"
        "    for dtype in own.DTYPES:\n"
        "        own.test_kernels_on_larger_sizes(shape, 3, dtype)\n"
        "own.test_weights()",
    )


def test_weights():
    """Sizes of a PHM layer, and a term more than a tile of the kernel has."""
    for n, p, q, r, s in ((4, 4, 4, 192, 6), (5, 5, 6, 33, 48)):
        made = torch.Generator().manual_seed(n)
        a, b = (torch.randn(size, generator=made) for size in ((n, p, q), (n, r, s)))
        g = torch.randn(p * r, q * s, generator=made)
        with pk.backend("cpu"):
            h = kron_sum_weight(a, b, 0.5)
            da, db = OPS["kron_sum_weight_backward"].run(g, a, b, 0.5, (True, True))
        cut = g.view(p, r, q, s).double()
        torch.testing.assert_close(h, 0.5 * sum(torch.kron(u, v) for u, v in zip(a, b, strict=True)))
        expected = torch.einsum("ikjl,nkl->nij", cut, b.double()), torch.einsum("ikjl,nij->nkl", cut, a.double())
        for ours, theirs in zip((da, db), expected, strict=True):
            torch.testing.assert_close(ours, 0.5 * theirs.float(), atol=1e-4, rtol=1e-4)
        w = torch.randn(p * r, q * s, generator=made)
        torch.testing.assert_close(kron_add_(w.clone(), a[0], b[0], -2.0), w - 2 * torch.kron(a[0], b[0]))


def test_the_numbers_of_a_small_example():
    a, b = torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([[0.0, 5], [6, 7]])
    x = torch.tensor([1.0, 2, 3, 4])
    assert kron_linear(x, a, b).tolist() == [84, 148, 120, 210]
    assert kron_linear(x, a.T, b.T).tolist() == [50, 112, 110, 244]
    assert kron_sum_weight(a[None], b[None])[0].tolist() == [0, 5, 0, 10]
    assert kron_add_(torch.zeros(4, 4), a, b)[3].tolist() == [18, 21, 24, 28]


@pytest.mark.parametrize("shape", [(7,), (0, 7), (2, 3, 7)])
def test_leading_dims_and_no_tokens(shape):
    a, b = torch.randn(1, 3, requires_grad=True), torch.randn(7, 2, requires_grad=True)
    x, bias = torch.randn(shape, requires_grad=True), torch.randn(6, requires_grad=True)
    y, expected = kron_linear(x, a, b, bias=bias), x @ torch.kron(a, b) + bias
    assert y.shape == (*shape[:-1], 6)
    torch.testing.assert_close(y, expected)
    both = (torch.autograd.grad(out.square().sum(), (x, a, b, bias)) for out in (y, expected))
    for ours, theirs in zip(*both, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_only_x_and_the_factors_are_kept():
    x, a, b, acc, bias, _ = (t.requires_grad_() for t in problem((4, 6, 8, 16), 30))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        kron_linear(x, a, b, acc=acc, bias=bias)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in (x, a, b)}


def test_in_place():
    x, a, b, acc, bias, _ = problem((4, 6, 8, 16), 30)
    expected = kron_linear(x, a, b, acc=acc, bias=bias, scale=0.5)
    own = acc.clone()
    assert kron_linear_(own, x, a, b, bias=bias, scale=0.5) is own
    torch.testing.assert_close(own, expected)
    apart = acc.T.contiguous().T
    before = apart.clone()
    torch.testing.assert_close(kron_linear_(apart, x, a, b, bias=bias, scale=0.5), expected)
    assert torch.equal(apart, before)
    for leaf in (x, a, b, acc):
        leaf.requires_grad_()
    leaves = (x, a, b, acc)
    ours = torch.autograd.grad(kron_linear_(acc * 1, x, a, b, bias=bias).square().sum(), leaves)
    theirs = torch.autograd.grad(kron_linear(x, a, b, acc=acc, bias=bias).square().sum(), leaves)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_a_tensor_scale_is_differentiated():
    x, a, b, *_ = problem((4, 6, 8, 16), 3)
    scale = torch.tensor(0.7, requires_grad=True)
    y = kron_linear(x, a, b, scale=scale)
    torch.testing.assert_close(y, kron_linear(x, a, b, scale=0.7))
    torch.testing.assert_close(torch.autograd.grad(y.sum(), scale)[0], kron_linear(x, a, b).sum())
    h = kron_sum_weight(a[None], b[None], scale)
    torch.testing.assert_close(torch.autograd.grad(h.sum(), scale)[0], torch.kron(a, b).sum())


def test_merged_equals_forward():
    w1, w2, w, x = torch.randn(6, 4), torch.randn(16, 8), torch.randn(96, 32), torch.randn(9, 32)
    y = kron_linear(x, w1.T, w2.T, acc=x @ w.T, scale=0.3)
    merged = w.clone()
    assert kron_add_(merged, w1, w2, 0.3) is merged
    torch.testing.assert_close(x @ merged.T, y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adding_to_a_weight_of_any_strides(dtype):
    w1, w2 = torch.randn(3, 5), torch.randn(18, 17)
    exact = torch.kron(w1.double(), w2.double())
    for view in (lambda t: t, lambda t: t.T.contiguous().T, lambda t: t.repeat(1, 2)[:, :85], lambda t: t.repeat(1, 2)):
        w = view(torch.randn(54, 85).to(dtype))
        w = w[:, ::2] if w.shape[1] == 170 else w
        before = w.double()
        kron_add_(w, w1, w2, -0.5)
        rounded = (before - 0.5 * exact).to(dtype)
        torch.testing.assert_close(w, rounded, atol=1e-6, rtol=torch.finfo(dtype).eps)  # at most one place off: once
    assert w._version == 1


def test_products_of_bfloat16_are_left_to_torch_where_it_has_the_instructions():
    x, a, b, *_ = problem((64, 64, 64, 64), 64, torch.bfloat16)
    row = OPS["kron_linear"].explain(x, a, b, None, 1.0)
    assert (row["backend"] == "cpu") != torch.cpu._is_avx512_bf16_supported()
    assert OPS["kron_linear"].explain(x[:2], a, b, None, 1.0)["backend"] == "cpu"
    assert OPS["kron_linear"].explain(x, a.float(), b.float(), None, 1.0)["backend"] == "cpu"


BAD = {
    "x": (lambda x, a, b: kron_linear(x[:, 1:], a, b), r"expected a \[p, q\], b \[r, s\] and x \[..., p r\]"),
    "acc": (lambda x, a, b: kron_linear_(x, x, a, b), r"acc is \(5, 12\); expected \(5, 6\)"),
    "bias": (lambda x, a, b: kron_linear(x, a, b, bias=x[0]), r"bias is \(12,\); expected \[6\]"),
    "dtypes": (lambda x, a, b: kron_linear(x, a, b.double()), "give both the same dtype"),
    "device": (lambda x, a, b: kron_linear(x, a.to("meta"), b.to("meta")), "move them to one device"),
    "terms": (lambda x, a, b: kron_sum_weight(a[None], b), r"expected \[n, p, q\] and \[n, r, s\]"),
    "alike": (lambda x, a, b: kron_sum_weight(a[None], b[None].double()), "give both alike"),
    "w": (lambda x, a, b: kron_add_(x, a, b), r"expected \[o1 o2, i1 i2\]"),
    "factors": (lambda x, a, b: kron_add_(torch.zeros(12, 6), a, b.double()), "give both factors one dtype"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call(torch.randn(5, 12), torch.randn(3, 2), torch.randn(4, 3))
