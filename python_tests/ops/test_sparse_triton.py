"""The Triton kernels of the sparse ops where their samples are too small: many tiles, panels, blocks and programs."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import OPS, as_good, marks

import peft_kernels as pk
from peft_kernels.check import DTYPES, outputs
from peft_kernels.ops import _philox

kernels = pytest.importorskip("peft_kernels.kernels.sparse.sparse_triton", reason="Triton is not installed")
pytestmark = marks("sparse_linear", "triton")


def _good(op, *args):
    return as_good(op, *args, backend="triton")


def csr(mask, dtype=torch.int32):
    row, col = mask.nonzero().T
    return F.pad(torch.bincount(row, minlength=len(mask)).cumsum(0), (1, 0)).to(dtype), col.to(dtype)


def clustered(m, n):
    """Entries in some tiles only, whole rows of them, and a row with one entry at its end."""
    mask = torch.zeros(m, n, dtype=torch.bool)
    mask[m // 3, :] = True
    mask[m // 2 :, n - n // 8 :] = torch.rand(m - m // 2, n // 8) < 0.5
    mask[0, -1] = True
    return mask


MASKS = {
    "uniform": lambda m, n: torch.rand(m, n) < 0.1,
    "clustered": clustered,
    "all": lambda m, n: torch.ones(m, n, dtype=torch.bool),
    "few": lambda m, n: torch.rand(m, n) < 0.001,
}


@pytest.mark.parametrize(
    ("mask", "t", "m", "n", "dtype", "whole"),
    [
        ("uniform", 70, 150, 290, torch.float32, torch.int32),
        ("clustered", 33, 280, 400, torch.bfloat16, torch.int64),
        ("all", 40, 130, 131, torch.float16, torch.int32),
        ("uniform", 700, 20, 30, torch.bfloat16, torch.int32),  # the sum over tokens in parts
        ("few", 300, 140, 150, torch.float32, torch.int64),  # entries on their own
        ("few", 17, 260, 90, torch.bfloat16, torch.int32),
        ("few", 0, 140, 150, torch.float32, torch.int32),
    ],
    ids=str,
)
def test_sddmm(mask, t, m, n, dtype, whole):
    _good("sddmm", torch.randn(t, m).to(dtype), torch.randn(t, n).to(dtype), *csr(MASKS[mask](m, n), whole))


def test_a_nan_stays_in_its_row_and_its_column():
    m, n = 150, 170
    crow, col = csr(MASKS["uniform"](m, n))
    dy, x = torch.randn(9, m), torch.randn(9, n)
    dy[3, 140], x[5, 7] = torch.nan, torch.nan
    with pk.backend("triton"):
        got = pk.ops.sddmm(dy, x, crow, col)
    row = torch.repeat_interleave(torch.arange(m), crow.diff())
    assert torch.equal(got.isnan(), (row == 140) | (col == 7))


@pytest.mark.parametrize(
    ("mask", "t", "dtype", "low", "panel"),
    [
        ("uniform", 90, torch.bfloat16, torch.float32, 80),
        ("clustered", 70, torch.float32, torch.float32, 80),
        ("uniform", 1, torch.float16, torch.float16, 1024),
        ("few", 90, torch.bfloat16, torch.float32, 1024),
    ],
    ids=str,
)
def test_products(mask, t, dtype, low, panel, monkeypatch):
    """Of few tokens and of many, with W + D in one panel and in several."""
    monkeypatch.setattr(kernels, "_PANEL_LEAST", panel)
    monkeypatch.setattr(kernels, "_PANEL_BYTES", 0)
    m, n = 120, 170
    crow, col = csr(MASKS[mask](m, n))
    delta = (torch.randn(len(col)) * n**-0.5).to(low), crow, col
    x, y, w = torch.randn(t, n).to(dtype), torch.randn(t, m).to(dtype), (torch.randn(m, n) * n**-0.5).to(dtype)
    _good("sparse_linear", x, w, *delta, torch.randn(m).to(dtype))
    _good("sparse_linear", x, w, *delta, None)
    _good("sparse_linear_dx", y, w, *delta, n)
    _good("sparse_linear_dx", y, None, *delta, n)
    _good("sparse_add", y, x, *delta)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    t=st.integers(0, 140),
    m=st.integers(1, 200),
    n=st.integers(1, 200),
    density=st.sampled_from((0.0, 0.001, 0.01, 0.1, 0.5, 1.0)),
    dtypes=st.sampled_from([(d, low) for d in DTYPES for low in {d: 0, torch.float32: 0}]),
    whole=st.sampled_from((torch.int32, torch.int64)),
    seed=st.integers(0, 2**31),
)
def test_any_shape(t, m, n, density, dtypes, whole, seed):
    """Products and the gradient of the values."""
    dtype, low = dtypes
    torch.manual_seed(seed)
    crow, col = csr(torch.rand(m, n) < density, whole)
    delta = (torch.randn(len(col)) * n**-0.5).to(low), crow, col
    x, y, w = torch.randn(t, n).to(dtype), torch.randn(t, m).to(dtype), (torch.randn(m, n) * n**-0.5).to(dtype)
    _good("sddmm", y, x, crow, col)
    _good("sparse_linear", x, w, *delta, torch.randn(m).to(dtype))
    _good("sparse_linear_dx", y, w if seed % 2 else None, *delta, n)
    _good("sparse_add", y, x, *delta)


def test_a_panel_has_the_bits_of_the_weight_and_the_delta_rounded_once():
    w, vals = torch.randn(90, 70).bfloat16().T, torch.randn(6300)
    crow, col = csr(torch.ones(70, 90, dtype=torch.bool))
    eye = torch.eye(90, dtype=torch.bfloat16)
    with pk.backend("triton"):
        y = pk.ops.sparse_linear(eye, w, vals, crow, col)
    assert torch.equal(y.T, (w.float() + vals.view(70, 90)).bfloat16())


@pytest.mark.parametrize("use_abs", [False, True])
@pytest.mark.parametrize("kind", ["random", "ties", "equal", "mixed"])
def test_topk_of_several_blocks(kind, use_abs):
    """The indices are those of a stable sort, and so many as are asked for, whatever is tied."""
    scores = [torch.randn(170, 200), torch.randn(3), torch.randn(20_000)]
    if kind == "ties":
        scores = [(s * 2).round() / 2 for s in scores]
    if kind == "equal":
        scores = [torch.full_like(s, -0.0) for s in scores]
    if kind == "mixed":
        scores = [scores[0].bfloat16(), scores[1].half() * 1e-7, scores[2] * 1e-41]
    flat = torch.cat([s.flatten().float() for s in scores])
    flat = flat.abs() if use_abs else flat + 0.0
    total = len(flat)
    order = torch.argsort(flat, descending=True, stable=True)
    for k in (0, 20_001, total):
        with pk.backend("triton"):
            threshold, n_above = pk.ops.topk_threshold(scores, k, use_abs=use_abs)
            chosen = pk.ops.topk_compact(scores, threshold, k, use_abs=use_abs)
        assert threshold == flat[order[max(k, 1) - 1]]
        assert n_above == (flat > threshold).sum()
        starts = [0, 34_000, 34_003]
        assert torch.equal(torch.cat([c + s for c, s in zip(chosen, starts, strict=True)]), order[:k].sort().values)


def test_topk_counts_every_nan():
    scores = [torch.randn(40_000), torch.randn(50)]
    scores[0][[3, 39_000]] = torch.nan
    scores[1][7] = -torch.nan
    with pk.backend("triton"), pytest.raises(ValueError, match="3 scores are NaN"):
        pk.ops.topk_threshold(scores, 5)


@pytest.mark.parametrize(
    ("m", "n", "cu", "weighted", "dtype", "low"),
    [
        (150, 300, (0, 50, 50, 51, 130), True, torch.float32, torch.float32),
        (70, 140, (3, 90), False, torch.bfloat16, torch.float32),
        (20, 30, tuple(range(0, 131, 10)), True, torch.float16, torch.float16),
    ],
    ids=str,
)
def test_fisher_of_many_tiles(m, n, cu, weighted, dtype, low):
    weight = torch.rand(len(cu) - 1) if weighted else None
    dy, x = torch.randn(130, m).to(dtype), torch.randn(130, n).to(dtype)
    _good("fisher_linear", torch.rand(m, n).to(low), dy, x, torch.tensor(cu), weight)
    f = torch.zeros(m, n)
    with pk.backend("triton"):
        pk.ops.fisher_linear_(f, dy, x, torch.tensor(cu), weight=weight)
        pk.ops.fisher_linear_(f, dy, x, torch.tensor(cu), weight=weight)
        (once,) = outputs(OPS["fisher_linear"].run(torch.zeros(m, n), dy, x, torch.tensor(cu), weight))
    torch.testing.assert_close(f, 2 * once)


def test_gates_have_the_noise_of_the_reference():
    """Where the gate is 0, 1 or between is a function of the Philox words alone, of every element of many programs."""
    alpha, zero = torch.zeros(77, 101), torch.zeros(77, 101)
    for rng in (torch.tensor([-5, 2**40 + 3]), torch.tensor([2**33 + 1, -(2**50)])):
        with pk.backend("triton"):
            z = pk.ops.hard_concrete(zero, zero + 1, alpha, rng=rng)
        words = torch.stack(_philox.words(rng, 1, (z.numel() + 3) // 4), -1).flatten()[: z.numel()].view(z.shape)
        uniform = 1e-4 + (1 - 2e-4) * (words >> 8).double() / 2**24
        expected = (uniform * 3 - 1.5).clamp(0, 1)
        torch.testing.assert_close(z.double(), expected, atol=1e-6, rtol=0)
        assert 0.3 < (z == 0).float().mean() < 0.7


def test_the_groups_gradient_of_many_programs():
    w, alpha, g = (torch.randn(130, 90) for _ in range(3))
    for rng in (torch.tensor([1, 2]), None):
        _good("hard_concrete_backward", g, w, alpha, torch.tensor(0.3), rng, (True, True, True))


def test_elements_in_place():
    """Of a view with strides that is no transpose, with int64 indices; what is out of range is left out."""
    base = torch.randn(40, 90).bfloat16()
    w, before = base[::2, 3:80], base.clone()
    idx = torch.arange(0, w.numel(), 3)
    stash = torch.randn(len(idx)).bfloat16()
    bits = stash.view(torch.int16)
    bits[:4] = torch.tensor([0x7FC1, -1, 0x7F80, -0x8000], dtype=torch.int16)  # NaN with payloads, inf, -0
    kept = bits.clone()
    with pk.backend("triton"):
        pk.ops.sparse_swap_(w, idx, stash)
        assert torch.equal(w.contiguous().view(torch.int16).flatten()[idx], kept)
        pk.ops.sparse_swap_(w, idx, stash)
    assert torch.equal(base.view(torch.int16), before.view(torch.int16))
    assert torch.equal(stash.view(torch.int16), kept)
    expected, vals = before.clone(), torch.randn(len(idx))
    flat = before[::2, 3:80].flatten().float()
    flat[idx] += 0.3 * vals
    expected[::2, 3:80] = flat.bfloat16().view(w.shape)
    out = OPS["sparse_scatter"]
    with pk.backend("triton"):
        pk.ops.sparse_scatter_(w, idx, vals, alpha=0.3)
        assert torch.equal(base, expected)
        same = out.run(w, torch.tensor([-1, w.numel()]), torch.ones(2), 1.0, True)
    assert torch.equal(same, w)


def test_adamw_is_that_of_a_dense_weight_with_a_masked_gradient():
    """50 steps, with weight decay, against torch's on w + vals."""
    w = torch.randn(33, 40)
    idx = torch.randperm(w.numel())[:600].sort().values.int()
    vals, m, v = torch.zeros(600), torch.zeros(600), torch.zeros(600)
    dense = w.flatten()[idx.long()].clone().requires_grad_()
    rule = {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    optimizer = torch.optim.AdamW([dense], **rule)
    step = torch.zeros(())
    for _ in range(50):
        dense.grad = torch.randn(600)
        step += 1
        with pk.backend("triton"):
            pk.ops.sparse_adamw_(vals, m, v, dense.grad, step, w=w, idx=idx, **rule)
        optimizer.step()
    torch.testing.assert_close(w.flatten()[idx.long()] + vals, dense.detach(), atol=2e-6, rtol=1e-5)
