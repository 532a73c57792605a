"""Bottlenecks beyond the laws of test_ops: activations, sizes, LayerNorm at its limits, threads, instruction sets."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from laws import LEVELS, as_good, at_level
from torch import nn

import peft_kernels as pk
from peft_kernels.check import DTYPES, compare
from peft_kernels.kernels.bottleneck import bottleneck_native
from peft_kernels.ops import _philox, bottleneck, bottleneck_
from peft_kernels.ops.bottleneck import ACTIVATIONS

OPS = pk.ops.all_ops()
NAMES = list(ACTIVATIONS)
ALL = (True,) * 8

assert not bottleneck_native.unavailable("cpu")  # which loads the kernels


@pytest.fixture
def any_size(monkeypatch):
    """The kernels take what else goes to torch because it is faster there."""
    monkeypatch.setattr(bottleneck_native, "_FEW", 0)
    monkeypatch.setattr(bottleneck_native, "_WORK", 1 << 40)


def problem(m, k, size, n, dtype=torch.float32, act="gelu", norm=True, p=0.0, mean=0.0, gate=True, low=None):
    """(residual, x, ln_w, ln_b, wd, bd, wu, bu, gate, act, scale, eps, p, rng) and g"""
    made = torch.Generator().manual_seed(m + size)
    shapes = (m, n), (m, k), (k,), (k,), (size, k), (size,), (n, size), (n,), (m,), (m, n)
    residual, x, ln_w, ln_b, wd, bd, wu, bu, gates, g = (
        torch.randn(s, generator=made, dtype=torch.float64) for s in shapes
    )
    weights = ((ln_w + 1) if norm else None, ln_b if norm else None, wd * k**-0.5, bd, wu * size**-0.5, bu)
    weights = [None if w is None else w.to(low or dtype) for w in weights]
    rng = torch.tensor([5, 2**33]) if p else None
    eps = 1e-5 if norm else None
    tensors = (residual.to(dtype), (x + mean).to(dtype), *weights, gates.float() if gate else None)
    return (*tensors, NAMES.index(act), 0.7, eps, p, rng), g.to(dtype)


def holds(args, g, own=False, needs=None):
    """Forward and backward of the kernels are as good as plain torch."""
    residual, x, *rest = args
    out = as_good("bottleneck_add", *args, backend="cpu")
    if residual.shape == x.shape:
        as_good("bottleneck", x, *rest, backend="cpu")
    exists = tuple(t is not None for t in (x, *rest[:7]))
    needs = exists if needs is None else tuple(a and b for a, b in zip(exists, needs, strict=True))
    # z as the reference has it: what is compared is the backward alone
    _, z, stats = OPS["bottleneck_add"].reference(*args)
    stats = stats if rest[9] is not None else None
    as_good("bottleneck_backward", g, x, *rest[:7], z, stats, *rest[7:], own, needs, backend="cpu")
    return out


@pytest.mark.parametrize("act", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations(act, dtype):
    for norm, p in ((False, 0.0), (True, 0.25)):
        holds(*problem(50, 65, 33, 65, dtype, act, norm, p), own=True)


def test_activations_far_out():
    """Slopes and values where exponentials over- and underflow, and NaN."""
    z = torch.tensor([-1e30, -200.0, -90.0, -20.0, -9.0, -1e-3, -0.0, 1e-30, 0.6, 1.0, 9.0, 100.0, 1e30, torch.nan])
    one, zero = torch.ones(1, 1), torch.zeros(len(z), 1)
    for number in range(len(NAMES)):
        args = (z[:, None], None, None, one, None, one, None, None)
        with pk.backend("cpu"):
            y, kept, _ = OPS["bottleneck_add"].run(zero, *args, number, 1.0, None, 0.0, None)
            grads = OPS["bottleneck_backward"].run(
                zero + 1, *args, kept, None, number, 1.0, None, 0.0, None, False, (True, *(False,) * 7)
            )
        value, slope = list(ACTIVATIONS.values())[number]
        torch.testing.assert_close(y[:, 0], value(z), equal_nan=True, atol=2e-7, rtol=2e-6)
        inside = z.abs() < 1e30  # torch's own slopes of gelu are inf * 0 beyond
        expected = slope(torch.ones_like(z), z)[inside]
        torch.testing.assert_close(grads[0][inside, 0], expected, equal_nan=True, atol=3e-7, rtol=2e-6)


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("size", [1, 3, 64, 512])
@pytest.mark.parametrize("m", [2, 130])
def test_sizes(m, size):
    for dtype, (k, n) in zip(itertools.cycle(DTYPES), ((40, 40), (70, 30)), strict=False):
        holds(*problem(m, k, size, n, dtype))
        holds(*problem(m, k, size, n, dtype, norm=False, gate=False, low=torch.float32))


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("size", [1, 3, 64, 512])
def test_one_row(size):
    """A gradient of one number may be exact in plain torch by chance, so the tolerance is fixed."""
    (residual, x, *rest), g = problem(1, 60, size, 60)
    results = []
    for name in ("cpu", "reference"):
        with pk.backend(name):
            out = OPS["bottleneck_add"].run(residual, x, *rest)
            results.append((*out, *OPS["bottleneck_backward"].run(g, x, *rest[:7], *out[1:], *rest[7:], True, ALL)))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=2e-5, atol=2e-5)


def test_many_rows_and_columns():
    """Several tiles of rows, slabs and column tasks."""
    holds(*problem(333, 530, 40, 530), own=True)
    holds(*problem(333, 530, 40, 530, p=0.1, norm=False, act="relu"), own=True)


def test_results_larger_than_the_caches():
    """They are written past them."""
    (_, x, *rest), g = problem(1 << 12, 1 << 11, 4, 1 << 11)
    results = []
    for name in ("cpu", "reference"):
        with pk.backend(name):
            y, z, stats = OPS["bottleneck"].run(x, *rest)
            back = OPS["bottleneck_backward"].run(g, x, *rest[:7], z, stats, *rest[7:], True, (True, *(False,) * 7))
            results.append((y, back[0]))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def test_no_rows():
    args, g = problem(0, 12, 4, 12)
    holds(args, g)
    x = torch.zeros(2, 0, 12, requires_grad=True)
    wd = torch.ones(4, 12, requires_grad=True)
    y = bottleneck(x, wd, None, torch.ones(12, 4), None, ln=(None, None, 1e-5))
    assert y.shape == x.shape
    assert all(not t.abs().sum() for t in torch.autograd.grad(y.sum(), (x, wd)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_a_layer_norm_divides_by_nearly_nothing(dtype):
    (residual, x, *rest), g = problem(9, 48, 8, 48, dtype, gate=False)
    x[3] = 0.0
    x[5] = 2.5  # constant: its deviation is eps alone
    y, _, stats = holds((residual, x, *rest), g)
    assert y.isfinite().all()
    torch.testing.assert_close(stats[1, [3, 5]], torch.full((2,), 1e-5**-0.5), rtol=1e-3, atol=0)


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("mean", [30.0, 1e3, 1e4])
def test_a_mean_much_larger_than_the_deviation(mean):
    """No worse than plain torch, which takes the mean off first, and than F.layer_norm."""
    args, g = problem(20, 768, 16, 768, mean=mean)
    y, *_ = holds(args, g, own=True)
    residual, x, ln_w, ln_b, wd, bd, wu, bu, gate, *_ = args

    def plain(dtype):
        tensors = (t.to(dtype) for t in (residual, x, ln_w, ln_b, wd, bd, wu, bu, gate[:, None]))
        r, x_, w, b, wd_, bd_, wu_, bu_, c = tensors
        return r + 0.7 * c * F.linear(F.gelu(F.linear(F.layer_norm(x_, (768,), w, b), wd_, bd_)), wu_, bu_)

    _, wrong = compare(y, plain(torch.float32), plain(torch.float64))
    assert not wrong, wrong


def test_each_need_alone_gives_the_same_bits():
    args, g = problem(70, 50, 20, 50, p=0.25)
    _, x, *rest = args
    with pk.backend("cpu"):
        _, z, stats = OPS["bottleneck"].run(x, *rest)
        run = OPS["bottleneck_backward"].run
        together = run(g, x, *rest[:7], z, stats, *rest[7:], True, ALL)
        for i in range(8):
            alone = run(g, x, *rest[:7], z, stats, *rest[7:], True, tuple(j == i for j in range(8)))
            assert [t.numel() > 0 for t in alone] == [j == i for j in range(8)]
            assert torch.equal(alone[i], together[i])


def test_dropout_is_that_of_the_reference():
    m, size, p = 40, 70, 0.4
    rng = torch.tensor([-9, 2**40 + 3])
    x, eye = torch.rand(m, size) + 1, torch.eye(size)
    keep = _philox.keep_mask(rng, m, size, p)
    y = bottleneck(x, eye, None, eye, None, residual=torch.zeros(m, size), p=p, rng=rng)
    torch.testing.assert_close(y, torch.where(keep, x * _philox.keep_scale(p), 0.0))
    leaf = x.clone().requires_grad_()
    y = bottleneck(leaf, eye, None, eye, None, residual=torch.zeros(m, size), p=p, rng=rng)
    (dx,) = torch.autograd.grad(y.sum(), leaf)
    torch.testing.assert_close(dx, keep * _philox.keep_scale(p))


def by_hand(x, wd, bd, wu, bu, residual=None, ln=None, scale=1.0, gate=1.0):
    h = x if ln is None else F.layer_norm(x, x.shape[-1:], *ln)
    return (x if residual is None else residual) + scale * gate * F.linear(F.gelu(F.linear(h, wd, bd)), wu, bu)


@pytest.fixture
def tensors():
    made = torch.Generator().manual_seed(1)
    shapes = (2, 3, 8), (2, 3, 8), (3, 4, 8), (3, 4), (8, 4), (3, 8), (8,), (2, 1, 1), ()
    return [torch.randn(s, generator=made).requires_grad_() for s in shapes]


def test_learned_scale_gate_mask_and_expert(tensors):
    residual, x, wd, bd, wu, bu, ln_w, gate, scale = tensors
    keep, expert = torch.rand(4, 8) < 0.5, torch.tensor(2)
    ours = bottleneck(
        *(x, wd, bd, wu, bu),
        **{"act": "gelu", "scale": scale, "residual": residual, "ln": (ln_w, None, 1e-5), "gate": gate},
        **{"mask": (keep, None), "expert": expert},
    )
    hand = by_hand(x, wd[2] * keep, bd[2], wu, bu[2], residual, (ln_w, None, 1e-5), scale, gate)
    torch.testing.assert_close(ours, hand)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), tensors) for y in (ours, hand)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_in_place_equals_functional(tensors):
    residual, x, wd, bd, wu, bu, *_ = (t.detach() for t in tensors)
    weights = wd[0].requires_grad_(), bd[0], wu, bu[0]
    results = []
    for call in (lambda r: bottleneck(x, *weights, residual=r), lambda r: bottleneck_(r, x, *weights)):
        y = call(residual + 1)
        results.append((y, torch.autograd.grad(y.square().sum(), weights[0])[0]))
    assert all(map(torch.equal, *results))
    owned = residual.clone()
    with torch.no_grad():
        assert bottleneck_(owned, x, *weights) is owned


def test_second_derivatives_in_fp64(tensors):
    residual, x, wd, bd, wu, bu, ln_w, gate, scale = (t.detach().double().requires_grad_() for t in tensors)
    for act in ("gelu", "gelu_tanh", "silu", "tanh", "identity"):

        def call(x, wd, bd, wu, ln_w, gate, scale, act=act):
            return bottleneck(x, wd[0], bd[0], wu, bu[0], act=act, scale=scale, ln=(ln_w, None, 1e-5), gate=gate)

        leaves = (x, wd, bd, wu, ln_w, gate, scale)
        assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
        assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


def test_only_x_and_the_bottleneck_are_kept():
    x, lin = torch.randn(6, 32, requires_grad=True), nn.Linear(32, 4)
    up, ln = nn.Linear(4, 32), nn.LayerNorm(32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        bottleneck(x, lin.weight, lin.bias, up.weight, up.bias, ln=(ln.weight, ln.bias, ln.eps))
    known = {t.data_ptr() for t in (x, *lin.parameters(), *up.parameters(), *ln.parameters())}
    assert [tuple(t.shape) for t in saved if t.data_ptr() not in known] == [(6, 4), (2, 6)]


def test_a_nan_stays_in_its_row():
    (residual, x, *rest), _ = problem(60, 40, 8, 40)
    clean = OPS["bottleneck_add"].run(residual, x, *rest)[0]
    x[7, 3] = torch.nan
    bad = OPS["bottleneck_add"].run(residual, x, *rest)[0]
    others = torch.arange(60) != 7
    assert torch.equal(bad[others], clean[others])
    assert bad[7].isnan().all()


def test_thread_count_does_not_change_a_bit():
    """Large enough that every loop is dealt out to threads."""
    args, g = problem(700, 800, 64, 800, p=0.1)
    _, x, *rest = args
    before, outs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with pk.backend("cpu"):
                y, z, stats = OPS["bottleneck"].run(x, *rest)
                back = OPS["bottleneck_backward"].run(g, x, *rest[:7], z, stats, *rest[7:], True, ALL)
            outs.append((y, z, stats, *back))
    finally:
        torch.set_num_threads(before)
    for other in outs[1:]:
        assert all(map(torch.equal, outs[0], other))


@pytest.mark.parametrize("level", LEVELS)
def test_levels(level):
    code = """
import torch
from test_bottleneck import DTYPES, holds, problem
for dtype in DTYPES:
    holds(*problem(50, 65, 33, 65, dtype, p=0.25), own=True)
    holds(*problem(70, 130, 16, 40, dtype, norm=False, act="relu"))
print("equal")
"""
    assert at_level(level, code) == "equal\n"


def test_torch_serves_where_it_is_faster():
    def chosen(m, k, **kwargs):
        args, _ = problem(m, k, 64, k, **kwargs)
        return OPS["bottleneck_add"].explain(*args)

    row = chosen(16, 768)
    assert row["backend"] == "reference"
    assert "fewer than 64 rows" in row["reasons"]["cpu"]
    assert chosen(512, 768)["backend"] == "cpu"
    if torch.cpu._is_avx512_bf16_supported():
        assert chosen(512, 768, dtype=torch.bfloat16)["backend"] == "reference"


BAD = {
    "act": (lambda x, w: bottleneck(x, w, None, w.T, None, act="sigmoid"), "act is 'sigmoid'; expected one of relu"),
    "wd": (lambda x, w: bottleneck(x, w[:, 1:], None, w.T, None), r"expected wd \[m, 8\]"),
    "wu": (lambda x, w: bottleneck(x, w, None, w, None), "do not fit"),
    "bias": (lambda x, w: bottleneck(x, w, w[0], w.T, None), r"bd is \(8,\); expected \[4\]"),
    "ln": (lambda x, w: bottleneck(x, w, None, w.T, None, ln=(w[:, 0], None, 1e-5)), "the weight of ln"),
    "residual": (lambda x, w: bottleneck(x, w, None, w.T[:5], None), r"the residual is \(6, 8\); expected \(6, 5\)"),
    "gate": (lambda x, w: bottleneck(x, w, None, w.T, None, gate=x), "a last dimension of 1"),
    "dtype": (lambda x, w: bottleneck(x, w, None, w.T.double(), None), "same dtype"),
    "p": (lambda x, w: bottleneck(x, w, None, w.T, None, p=0.5), "needs rng"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call(torch.randn(6, 8), torch.randn(4, 8))
