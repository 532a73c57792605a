"""LoRA of several linears of one input: facts beyond the laws of test_ops.py."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import backends

import peft_kernels as pk

BACKENDS = backends("lora_linear_slices", "reference", "cpu", "triton")
SLICES = ((40, 3), (17, 0), (51, 8), (24, 70))  # (out, rank)
RNG = torch.tensor([5, 6])
slices, linear = pk.ops.lora_linear_slices, pk.ops.lora_linear


def problem(rows=(30,), k=50, sizes=SLICES, dtype=torch.float32, low=None):
    """(x, ws, biases, as_, bs, scales), differentiable where the op is; the second linear has no bias."""
    x = torch.randn(*rows, k).to(dtype).requires_grad_()
    ws = [torch.randn(n, k).mul(k**-0.5).to(dtype) for n, _ in sizes]
    biases = [None if i == 1 else torch.randn(n).to(dtype) for i, (n, _) in enumerate(sizes)]
    as_ = [torch.randn(r, k).mul(k**-0.5).to(low or dtype).requires_grad_() for _, r in sizes]
    bs = [torch.randn(s).to(low or dtype).requires_grad_() for s in sizes]
    return x, ws, biases, as_, bs, [0.5 * i - 0.7 for i in range(len(sizes))]


def apart(x, *lists, p=0.0, rng=None):
    return [linear(x, *members, p=p, rng=rng) for members in zip(*lists, strict=True)]


def gradients(ys, x, as_, bs):
    made = torch.Generator().manual_seed(3)
    loss = sum((y * torch.randn(y.shape, generator=made).to(y.dtype)).sum() for y in ys)
    return torch.autograd.grad(loss, (x, *as_, *bs))


@pytest.mark.parametrize("p", (0.0, 0.3))
@pytest.mark.parametrize(
    ("dtype", "low"), [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32)]
)
@pytest.mark.parametrize("rows", ((3,), (2, 45)))
def test_on_the_cpu_it_has_the_bits_of_separate_calls(rows, dtype, low, p):
    """All but dx, whose terms are added in another order."""
    args = problem(rows, 800, dtype=dtype, low=low)
    with pk.backend("cpu"):
        one, many = slices(*args, p=p, rng=RNG), apart(*args, p=p, rng=RNG)
        own, expected = (gradients(ys, args[0], *args[3:5]) for ys in (one, many))
    assert isinstance(one, list)
    for y, other in zip(one, many, strict=True):
        assert torch.equal(y, other)
    for g, other in zip(own[1:], expected[1:], strict=True):
        assert torch.equal(g, other)
    tight = dtype == torch.float32
    torch.testing.assert_close(own[0], expected[0], atol=1e-4 if tight else 0.1, rtol=1e-4 if tight else 0.02)


@pytest.mark.parametrize("p", (0.0, 0.3))
@pytest.mark.parametrize("name", BACKENDS)
def test_equals_separate_calls(name, p):
    """On every backend, and so does each mask, which the results of a large x would tell apart."""
    args = problem()
    rng = RNG.to(args[0].device)
    with pk.backend(name):
        own, many = slices(*args, p=p, rng=rng), apart(*args, p=p, rng=rng)
        grads = [gradients(ys, args[0], *args[3:5]) for ys in (own, many)]
    for a, b in zip((*own, *grads[0]), (*many, *grads[1]), strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("name", BACKENDS)
def test_results_are_their_own_contiguous_tensors(name):
    args = problem()
    with pk.backend(name):
        ys = slices(*args)
    assert all(y.is_contiguous() and not y._is_view() for y in ys)
    assert len({y.untyped_storage().data_ptr() for y in ys}) == len(ys)
    for y in ys:
        y.mul_(2)  # may be written into, as by a rotary embedding
    gradients(ys, args[0], *args[3:5])


def test_nothing_is_kept_but_x_once_t_and_the_seed():
    args = problem((64,))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        slices(*args, p=0.1, rng=RNG)
    known = {t.data_ptr() for t in (*args[1], *args[3], *args[4], RNG) if t.numel()}
    extra = [tuple(t.shape) for t in saved if t.numel() and t.data_ptr() not in known]
    assert extra == [(64, 50), (64, sum(r for _, r in SLICES))]


@pytest.mark.parametrize("name", BACKENDS)
def test_rank_zero_is_the_frozen_linear(name):
    x, ws, biases, as_, bs, scales = problem()
    with pk.backend(name):
        ys = slices(x, ws, biases, as_, bs, scales, p=0.5, rng=RNG.to(x.device))
    assert torch.equal(ys[1], F.linear(x, ws[1]))


@pytest.mark.parametrize("name", BACKENDS)
def test_a_result_without_a_gradient(name):
    """Its A and B get zeros, the others what they get without it."""
    args = problem()
    used = [0, 1, 3]
    with pk.backend(name):
        ys = slices(*args)
        own = gradients([ys[i] for i in used], args[0], *args[3:5])
        less = [[members[i] for i in used] for members in args[1:]]
        expected = gradients(slices(args[0], *less), args[0], *less[2:4])
    n = len(SLICES)
    assert not own[1 + 2].any()
    assert not own[1 + n + 2].any()
    kept = [own[0], *(own[1 + i] for i in used), *(own[1 + n + i] for i in used)]
    for a, b in zip(kept, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_a_frozen_factor_gets_no_gradient():
    x, ws, biases, as_, bs, scales = problem()
    as_[0].requires_grad_(False)
    bs[2].requires_grad_(False)
    sum(y.sum() for y in slices(x.detach(), ws, biases, as_, bs, scales)).backward()
    assert [t.grad is None for t in as_] == [True, False, False, False]
    assert [t.grad is None for t in bs] == [False, False, True, False]


@pytest.mark.parametrize("frozen", ("ws", "biases"))
def test_a_trainable_base_is_trained_too(frozen):
    args = problem()
    base = {"ws": args[1], "biases": args[2]}[frozen][2].requires_grad_()
    (own,) = torch.autograd.grad(sum(y.square().sum() for y in slices(*args)), base)
    (expected,) = torch.autograd.grad(sum(y.square().sum() for y in apart(*args)), base)
    torch.testing.assert_close(own, expected)


def test_tensor_scales_are_differentiated():
    x, ws, biases, as_, bs, scales = problem()
    scales = [torch.tensor(s, requires_grad=True) for s in scales]
    ys = slices(x, ws, biases, as_, bs, scales)
    for y, other in zip(ys, apart(x, ws, biases, as_, bs, scales), strict=True):
        torch.testing.assert_close(y, other)
    grads = torch.autograd.grad(sum(y.sum() for y in ys), scales)
    for g, a, b in zip(grads, as_, bs, strict=True):
        torch.testing.assert_close(g, ((x @ a.T) @ b.T).sum(), atol=1e-3, rtol=1e-4)


def test_autocast_casts_x_and_the_base_and_leaves_the_factors():
    x, ws, biases, as_, bs, scales = problem()
    with torch.autocast("cpu", torch.bfloat16):
        ys = slices(x, ws, biases, as_, bs, scales)
    cast = [None if t is None else t.bfloat16() for t in (*ws, *biases)]
    expected = slices(x.bfloat16(), cast[: len(ws)], cast[len(ws) :], as_, bs, scales)
    for y, other in zip(ys, expected, strict=True):
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, other)
    for own, other in zip(gradients(ys, x, as_, bs), gradients(expected, x, as_, bs), strict=True):
        assert own.dtype == torch.float32
        assert torch.equal(own, other)


def test_compiled_in_one_graph():
    """Without a break, also where all linears have a bias: torch then hands the op a list of tensors."""
    torch._dynamo.reset()
    compiled = torch.compile(slices, fullgraph=True, backend="aot_eager")
    for whole in (False, True):
        x, ws, biases, as_, bs, scales = problem()
        biases = [torch.ones(len(w)) for w in ws] if whole else biases
        args = (x, ws, biases, as_, bs, scales)
        ys, expected = compiled(*args, p=0.2, rng=RNG), slices(*args, p=0.2, rng=RNG)
        for a, b in zip((*ys, *gradients(ys, x, as_, bs)), (*expected, *gradients(expected, x, as_, bs)), strict=True):
            torch.testing.assert_close(a, b)


def test_thread_count_does_not_change_a_bit():
    x, _, _, as_, bs, scales = problem((300,), 768, ((700, 24), (400, 16)))
    gs = [torch.randn(300, len(b)) for b in bs]
    a, before, outs = torch.cat(as_).detach(), torch.get_num_threads(), []
    launch = torch.ops._peft_kernels
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            ys, dx = [torch.ones_like(g) for g in gs], torch.ones_like(x)
            with torch.no_grad():
                t = launch.lora_slices_add_(ys, x, a, bs, scales, 0.1, RNG)
                da, dbs = launch.lora_slices_backward_(dx, gs, x, a, bs, scales, t, 0.1, RNG, True, True)
            outs.append((*ys, t, dx, da, *dbs))
    finally:
        torch.set_num_threads(before)
    for other in outs[1:]:
        assert all(torch.equal(p, q) for p, q in zip(outs[0], other, strict=True))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    m=st.integers(0, 90),
    k=st.integers(1, 400),
    sizes=st.lists(st.tuples(st.integers(1, 90), st.integers(0, 40)), min_size=1, max_size=4),
    p=st.sampled_from((0.0, 0.3)),
    dtypes=st.sampled_from(((torch.float32, None), (torch.bfloat16, torch.float32), (torch.float16, None))),
)
def test_any_shape_has_the_bits_of_separate_calls(m, k, sizes, p, dtypes):
    torch.manual_seed(m)
    args = problem((m,), k, sizes, *dtypes)
    with pk.backend("cpu"):
        one, many = slices(*args, p=p, rng=RNG), apart(*args, p=p, rng=RNG)
        own, expected = (gradients(ys, args[0], *args[3:5]) for ys in (one, many))
    for a, b in zip((*one, *own[1:]), (*many, *expected[1:]), strict=True):
        assert torch.equal(a, b)
    scale = max(1.0, expected[0].abs().max().item()) if m else 1.0
    assert (own[0] - expected[0]).abs().max().item() <= 8 * torch.finfo(dtypes[0]).eps * scale if m else True


BAD = {
    "counts": (lambda a: (a[0], a[1][:2], *a[2:]), r"2 ws, 4 biases, 4 as_, 4 bs, 4 scales; expected one of each"),
    "none": (lambda a: (a[0], [], [], [], [], []), "one linear at least"),
    "a": (lambda a: (*a[:3], [*a[3][:3], a[3][0]], *a[4:]), r"linear 3: a \(3, 50\) and b \(24, 70\) do not fit"),
    "w": (lambda a: (a[0], a[1][::-1], *a[2:]), r"linear 0: w is \(24, 50\); expected \[40, 50\]"),
    "dtypes": (
        lambda a: (*a[:3], [a[3][0].double(), *a[3][1:]], [a[4][0].double(), *a[4][1:]], a[5]),
        "linear 1: a is torch.float32 and that of linear 0 torch.float64",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    change, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        slices(*change(problem()))


def test_dropout_needs_a_seed():
    with pytest.raises(ValueError, match="lora_linear_slices.*needs rng"):
        slices(*problem(), p=0.5)
