"""Top-k of a list, Fisher statistics and the sparse optimizer, beyond the laws of test_ops.py."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import backends

import peft_kernels as pk
from peft_kernels.check import DTYPES


def chosen(scores, k, use_abs=False):
    threshold, _ = pk.ops.topk_threshold(scores, k, use_abs=use_abs)
    return pk.ops.topk_compact(scores, threshold, k, use_abs=use_abs)


def first_of_sorted(scores, k, use_abs=False):
    """The definition: a stable sort of everything."""
    flat = torch.cat([s.flatten().double() for s in scores])
    order = torch.sort(flat.abs() if use_abs else flat, descending=True, stable=True).indices[:k].sort().values
    split, start = [], 0
    for s in scores:
        split.append(order[(order >= start) & (order < start + s.numel())] - start)
        start += s.numel()
    return split


def same(a, b):
    return len(a) == len(b) and all(x.dtype == torch.int64 and torch.equal(x, y) for x, y in zip(a, b, strict=True))


# -- top-k ------------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_topk_is_the_head_of_a_stable_sort(data):
    """Few values, so that ties are many; -0, infinities and mixed dtypes among them."""
    value = st.sampled_from((0.0, -0.0, 1.0, -1.0, 0.5, -2.0, 3.0, math.inf, -math.inf, 2.0**-20))
    scores = [
        torch.tensor(values, dtype=dtype)
        for values, dtype in data.draw(
            st.lists(st.tuples(st.lists(value, max_size=40), st.sampled_from(DTYPES)), min_size=1, max_size=5)
        )
    ]
    k = data.draw(st.integers(0, sum(s.numel() for s in scores)))
    use_abs = data.draw(st.booleans())
    for name in ("reference", "cpu"):
        with pk.backend(name):
            threshold, n_above = pk.ops.topk_threshold(scores, k, use_abs=use_abs)
            assert threshold.dtype == torch.float32
            assert n_above <= k
            assert not k or not math.copysign(1, threshold) < 0 <= threshold  # no -0
            assert same(pk.ops.topk_compact(scores, threshold, k, use_abs=use_abs), first_of_sorted(scores, k, use_abs))


@pytest.mark.parametrize("use_abs", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_topk_of_a_sampled_list(dtype, use_abs):
    """Long enough that a sample brackets the threshold, and ends of the list where it cannot."""
    scores = [torch.randn(n).to(dtype) for n in (300_001, 7, 0, 123_456)]
    total = sum(s.numel() for s in scores)
    for k in (1, 2, 17, total // 200, total // 2, total - 3, total):
        assert same(chosen(scores, k, use_abs), first_of_sorted(scores, k, use_abs)), k


def _misleading(n):
    """A few values at the top that a sample may miss, over one that is everywhere."""
    scores = torch.full((n,), 0.25)
    scores[:: n // 50] = torch.linspace(1, 2, len(scores[:: n // 50]))
    return scores


@pytest.mark.parametrize(
    "make",
    [
        torch.zeros,
        lambda n: -torch.zeros(n),
        _misleading,
        lambda n: torch.arange(n).float(),
        lambda n: (torch.arange(n) % 3).float() - 1,
        lambda n: torch.cat([torch.randn(n // 2) * 1e-30, torch.randn(n - n // 2) * 1e30]),
    ],
    ids=["zeros", "minus_zeros", "misleading", "rising", "three_values", "two_scales"],
)
def test_topk_of_unusual_scores(make):
    scores = [make(400_000), make(1000)]
    for k in (1, 49, 60, 4000, 200_001, 400_999):
        assert same(chosen(scores, k), first_of_sorted(scores, k)), k


def test_topk_does_not_depend_on_threads():
    scores, before = [torch.randn(n).round(decimals=2) for n in (700_000, 33)], torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(chosen(scores, 5000, True))
        assert same(found[0], found[1])
        assert same(found[0], found[2])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("n", [50, 300_000])
@pytest.mark.parametrize("name", backends("topk_threshold"))
def test_nan_raises(name, n):
    if name != "cpu" and n > 50:
        n = 500
    scores = [torch.randn(n), torch.randn(7)]
    scores[0][-1] = scores[1][2] = math.nan
    for use_abs in (False, True):
        with pk.backend(name), pytest.raises(ValueError, match="2 scores are NaN"):
            pk.ops.topk_threshold(scores, 3, use_abs=use_abs)


def test_topk_of_parameters_keeps_no_graph():
    scores = [torch.randn(20, requires_grad=True), torch.randn(4, 5, requires_grad=True)]
    threshold, _ = pk.ops.topk_threshold(scores, 6, use_abs=True)
    assert not threshold.requires_grad
    assert same(pk.ops.topk_compact(scores, threshold, 6, use_abs=True), first_of_sorted(scores, 6, True))


# -- Fisher -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(1, 1, 1), (0, 5, 1, 0, 12), (300, 2, 129)], ids=str)
@pytest.mark.parametrize("name", backends("fisher_linear"))
def test_fisher_is_that_of_single_backward_passes(name, lengths):
    if name != "cpu" and sum(lengths) > 100:
        lengths = tuple(min(n, 20) for n in lengths)
    layer = torch.nn.Linear(34, 23)
    xs = [torch.randn(n, 34) for n in lengths]
    weight = torch.rand(len(xs))
    expected = torch.zeros_like(layer.weight)
    for w, x in zip(weight, xs, strict=True):
        layer.zero_grad()
        layer(x).square().sum().backward()
        expected += w * layer.weight.grad.square()

    x = torch.cat(xs)
    y = layer(x).detach()
    f = torch.zeros_like(layer.weight)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    with pk.backend(name):
        pk.ops.fisher_linear_(f, 2 * y, x, ends, weight=weight)
    torch.testing.assert_close(f, expected, rtol=1e-4, atol=1e-4 * expected.max().item())
    tokens = (4 * y.square()).T @ x.square()  # not this, unless each sample has one row
    if max(lengths) > 1:
        assert not torch.allclose(f, tokens, rtol=0.05)


def test_fisher_of_a_logit_at_one_half():
    """Of logits [w, 0] at w = 0 the Fisher information is 1/4: the expectation over both labels."""
    w, f = torch.zeros(1, requires_grad=True), torch.zeros(1)
    for label in (0, 1):
        logp = torch.log_softmax(torch.stack((w[0], torch.zeros(()))), 0)[label]
        (g,) = torch.autograd.grad(logp, w)
        pk.ops.fisher_accum_(f, g, weight=logp.exp().item())
    torch.testing.assert_close(f, torch.tensor([0.25]))


def test_fisher_keeps_a_nan_where_it_is():
    f, dy, x = torch.zeros(9, 40), torch.randn(6, 9), torch.randn(6, 40)
    x[1, 3] = math.nan
    pk.ops.fisher_linear_(f, dy, x, torch.tensor([0, 3, 6]))
    bad = torch.zeros(9, 40, dtype=torch.bool)
    bad[:, 3] = True
    assert torch.equal(f.isnan(), bad)


def test_fisher_writes_into_what_is_not_contiguous():
    f, g = torch.zeros(6, 4).T, torch.randn(4, 6)
    pk.ops.fisher_accum_(f, g, weight=2.0, absolute=True)
    torch.testing.assert_close(f, 2 * g.abs())
    dy, x = torch.randn(5, 4), torch.randn(5, 6)
    pk.ops.fisher_linear_(f, dy, x, torch.tensor([0, 5]))
    torch.testing.assert_close(f, 2 * g.abs() + (dy.T @ x).square())


# -- AdamW ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", backends("sparse_adamw"))
def test_fifty_steps_equal_dense_masked_adamw(name, decay):
    """With decay the values alone are not enough: the dense optimizer pulls the tuned weight to zero."""
    base = torch.randn(13, 17)
    idx = torch.randperm(base.numel())[:40].sort().values
    mask = torch.zeros(base.numel())
    mask[idx] = 1
    dense = torch.nn.Parameter(base.clone())
    optimizer = torch.optim.AdamW([dense], lr=0.02, betas=(0.8, 0.95), eps=1e-6, weight_decay=decay)
    vals, m, v, step = torch.zeros(40), torch.zeros(40), torch.zeros(40), torch.zeros(())
    target = torch.randn(base.shape)
    for _ in range(50):
        dense.grad = (dense.detach() - target) * mask.view(base.shape)
        grad = (base.flatten()[idx] + vals - target.flatten()[idx]).clone()
        optimizer.step()
        with torch.no_grad():  # what lies outside of the mask does not decay
            dense.copy_(torch.where(mask.view(base.shape) > 0, dense, base))
        step += 1
        with pk.backend(name):
            pk.ops.sparse_adamw_(
                vals, m, v, grad, step, lr=0.02, betas=(0.8, 0.95), eps=1e-6, weight_decay=decay, w=base, idx=idx.int()
            )
    torch.testing.assert_close(base.flatten()[idx] + vals, dense.detach().flatten()[idx], atol=1e-5, rtol=1e-5)
    state = optimizer.state[dense]
    torch.testing.assert_close(m, state["exp_avg"].flatten()[idx], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(v, state["exp_avg_sq"].flatten()[idx], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", backends("sparse_adamw"))
def test_values_alone_equal_adamw_of_the_values(name):
    plain = torch.nn.Parameter(torch.randn(33))
    vals, m, v, step = plain.detach().clone(), torch.zeros(33), torch.zeros(33), torch.zeros(())
    optimizer = torch.optim.AdamW([plain], lr=0.01, weight_decay=0.1)
    for _ in range(10):
        plain.grad = torch.randn(33)
        optimizer.step()
        step += 1
        with pk.backend(name):
            pk.ops.sparse_adamw_(vals, m, v, plain.grad, step, lr=0.01, weight_decay=0.1)
    torch.testing.assert_close(vals, plain.detach(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("bad", [-1, 12, 2**31 - 1])
def test_an_index_outside_of_w_changes_nothing(bad):
    state = [torch.randn(3) for _ in range(3)]
    before = [t.clone() for t in state]
    idx = torch.tensor([0, 5, bad], dtype=torch.int32)
    with pk.backend("cpu"), pytest.raises(RuntimeError, match="nothing was done"):
        pk.ops.sparse_adamw_(
            *state, torch.ones(3), torch.ones(()), lr=0.1, weight_decay=0.1, w=torch.randn(3, 4), idx=idx
        )
    assert all(torch.equal(a, b) for a, b in zip(before, state, strict=True))


def test_a_step_is_seen_by_autograd():
    """A backward that had kept the values fails loudly, as after any in-place step."""
    vals = torch.randn(4, requires_grad=True)
    out = vals.square().sum()
    pk.ops.sparse_adamw_(vals, torch.zeros(4), torch.zeros(4), torch.ones(4), torch.ones(()), lr=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


# -- errors -----------------------------------------------------------------------------------------------------------

ZERO, ONE, ROWS = torch.zeros(4), torch.ones(()), torch.zeros(3, 4)
BAD = {
    "k": (lambda: pk.ops.topk_threshold([ZERO, ONE], 6), "k is 6 of 2 tensors with 5 scores"),
    "no scores": (lambda: pk.ops.topk_threshold([], 0), "0 tensors"),
    "integers": (lambda: pk.ops.topk_threshold([ZERO.long()], 1), r"scores\[0\] is torch.int64"),
    "threshold": (lambda: pk.ops.topk_compact([ZERO], ZERO, 1), "expected 0-d"),
    "threshold of others": (lambda: pk.ops.topk_compact([ZERO], ONE, 2), "chooses 0 scores, not k = 2"),
    "low threshold": (lambda: pk.ops.topk_compact([ZERO], -ONE, 2), "chooses 4 scores, not k = 2"),
    "g": (lambda: pk.ops.fisher_accum_(ROWS, ZERO), "expected one shape"),
    "f": (lambda: pk.ops.fisher_linear_(ROWS, ROWS, ROWS, torch.tensor([0, 3])), r"expected \[out, in\]"),
    "dtypes": (
        lambda: pk.ops.fisher_linear_(torch.zeros(4, 4), ROWS, ROWS.bfloat16(), torch.tensor([0, 3])),
        "of one dtype",
    ),
    "cu_samples": (
        lambda: pk.ops.fisher_linear_(torch.zeros(4, 4), ROWS, ROWS, torch.tensor([0, 2, 1])),
        "expected ascending",
    ),
    "beyond the rows": (
        lambda: pk.ops.fisher_linear_(torch.zeros(4, 4), ROWS, ROWS, torch.tensor([0, 4])),
        "0 to 3 rows",
    ),
    "weight": (
        lambda: pk.ops.fisher_linear_(torch.zeros(4, 4), ROWS, ROWS, torch.tensor([0, 3]), weight=ZERO),
        r"expected \[1\]",
    ),
    "moments": (lambda: pk.ops.sparse_adamw_(ZERO, ZERO, ROWS, ZERO, ONE, lr=0.1), r"expected \[nnz\] each"),
    "half state": (
        lambda: pk.ops.sparse_adamw_(ZERO.half(), ZERO.half(), ZERO.half(), ZERO, ONE, lr=0.1),
        "expected float32",
    ),
    "w alone": (lambda: pk.ops.sparse_adamw_(ZERO, ZERO, ZERO, ZERO, ONE, lr=0.1, w=ROWS), "expected both"),
    "step": (lambda: pk.ops.sparse_adamw_(ZERO, ZERO, ZERO, ZERO, ZERO, lr=0.1), "expected a 0-d float tensor"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()
