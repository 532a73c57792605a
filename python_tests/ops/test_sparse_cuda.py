"""CUDA kernels of sparse training where no sample of a contract leads: many tiles, parts of sums, ties, long lists."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import OPS, as_good, equal, marks, native

import peft_kernels as pk
from peft_kernels.check import DTYPES

pytestmark = marks("sddmm", "cuda")
f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16


# -- sddmm ------------------------------------------------------------------------------------------------------------


def _csr(mask, index=torch.int32):
    row, col = mask.nonzero().T
    crow = torch.nn.functional.pad(torch.bincount(row, minlength=len(mask)).cumsum(0), (1, 0))
    return crow.to(index), col.to(index).contiguous()


def _sampled(t, mask, dtype, index=torch.int32):
    made = torch.Generator().manual_seed(t)
    dy, x = (torch.randn(t, width, generator=made).to(dtype) for width in mask.shape)
    return as_good("sddmm", dy, x, *_csr(mask, index))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("t", "m", "n", "share", "index"),
    [
        (17, 520, 136, 0.02, torch.int32),
        (33, 258, 259, 0.01, torch.int64),
        (140, 256, 128, 1.0, torch.int32),
        (100, 8, 400, 0.3, torch.int64),
        (1, 257, 129, 0.5, torch.int32),
    ],
)
def test_tiles(t, m, n, share, index, dtype):
    """Several tiles, whole and cut off, rows of vectors and odd ones; few entries in a row, and all."""
    _sampled(t, torch.rand(m, n) < share, dtype, index)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_without_entries(dtype):
    """Empty tiles, rows and columns of tiles, and one entry in the last corner."""
    mask = torch.zeros(600, 392, dtype=torch.bool)
    mask[5:9, 130:260] = True
    mask[-1, -1] = True
    mask[:300:7, 3] = True
    _sampled(9, mask, dtype)
    corner = torch.zeros_like(mask)
    corner[-1, 0] = True
    _sampled(9, corner, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("t", "m"), [(600, 40), (1030, 37)])
def test_tokens_in_parts(t, m, dtype):
    """Of few tiles the tokens are cut; the last part is shorter than the others."""
    _sampled(t, torch.rand(m, 48) < 0.2, dtype)


@pytest.mark.parametrize("t", (511, 512, 513, 2561))
def test_parts(t):
    """One, two, and ten parts of 288 tokens, of which the last has none."""
    _sampled(t, torch.rand(16, 24) < 0.5, bf16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_are_not_aligned(dtype):
    """Slices of one buffer: the bits of aligned tensors."""
    mask = _csr(torch.rand(136, 24) < 0.2)
    dy, x = torch.randn(21, 136).to(dtype), torch.randn(21, 24).to(dtype)

    def moved(t):
        return torch.empty(t.numel() + 9, dtype=dtype)[1:-8].view(t.shape).copy_(t)

    with pk.backend("cuda"):
        first = pk.ops.sddmm(dy, x, *mask)
        assert torch.equal(first, pk.ops.sddmm(moved(dy), moved(x), *mask))


@pytest.mark.parametrize("index", (torch.int32, torch.int64))
def test_what_is_no_mask_leads_nowhere(index):
    """Numbers out of range or out of order: no access outside of the tensors, which AddressSanitizer would see."""
    made = torch.Generator().manual_seed(1)
    crow, col = (torch.randint(-(2**31), 2**31, (n,), generator=made).to(index) for n in (301, 400))
    dy, x = torch.randn(5, 300), torch.randn(5, 200)
    with pk.backend("cuda"):
        for starts in (crow, crow % 400, crow.sort().values % 400):
            for columns in (col, col % 200, col % 1000 - 300):
                assert native("sparse")._ops.sddmm(dy, x, starts, columns).shape == (400,)


def test_what_is_not_finite_stays_in_its_row_and_column():
    dy, x = torch.randn(40, 130).to(bf16), torch.randn(40, 140).to(bf16)
    dy[3, 129], x[39, 7] = torch.nan, torch.inf
    with pk.backend("cuda"):
        out = pk.ops.sddmm(dy, x, *_csr(torch.ones(130, 140, dtype=torch.bool))).view(130, 140)
    expected = torch.zeros(130, 140, dtype=torch.bool)
    expected[129] = expected[:, 7] = True
    assert torch.equal(~out.isfinite(), expected)


# -- the largest of many tensors --------------------------------------------------------------------------------------


def _same(op, *args):
    """The outputs, which must be those of the reference to the bit."""
    with pk.backend("cuda"):
        outs = OPS[op].run(*args)
    assert all(map(equal, outs, OPS[op].reference(*args))), op
    return outs


def _chosen(k, use_abs, *scores):
    threshold, n_above, n_nan = _same("topk_threshold", k, use_abs, *scores)
    assert n_nan == 0
    positions, count = _same("topk_compact", threshold, k, use_abs, *scores)
    assert count == k
    return threshold, n_above, positions


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(0, 700), min_size=1, max_size=6),
    share=st.floats(0, 1),
    use_abs=st.booleans(),
    spread=st.sampled_from((1e-42, 1e-3, 1.0, 1e30)),
    step=st.sampled_from((0.0, 0.5)),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=1, max_size=3),
)
def test_the_choice_of_the_reference(sizes, share, use_abs, spread, step, dtypes):
    """step: between the scores, so that there are ties, with 0 and -0 among them."""
    made = torch.Generator().manual_seed(sum(sizes))
    scores = [torch.randn(n, generator=made) for n in sizes]
    scores = [s / step if step else s for s in scores]
    scores = [(s.round() * spread if step else s * spread).to(dtypes[i % len(dtypes)]) for i, s in enumerate(scores)]
    _chosen(round(share * sum(sizes)), use_abs, *scores)


@pytest.mark.parametrize("use_abs", (False, True))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks(dtype, use_abs):
    """Tensors that end in, at and behind a block's part; ties all over them."""
    scores = [torch.randn(n).mul(3).round().to(dtype) for n in (8191, 8192, 1, 16385, 20000)]
    for k in (1, 9000, 30000, 52768, 52769):
        _chosen(k, use_abs, *scores)


def test_more_tensors_than_a_launch_reads():
    scores = [torch.randn(i % 5).mul(4).round() for i in range(150)]
    scores[77] = torch.randn(9000).mul(4).round()
    scores[130] = torch.randn(40).bfloat16()
    for k in (0, 3, 4000, sum(len(s) for s in scores)):
        _chosen(k, True, *scores)


def test_every_bit_of_a_score_counts():
    """Neighbouring numbers of both signs, and the extremes."""
    near = torch.tensor(1.5).view(torch.int32) + torch.arange(40, dtype=torch.int32)
    values = near.view(torch.float32)
    values = torch.cat((values, -values, torch.tensor([math.inf, -math.inf, 0.0, -0.0, 1e-45, -1e-45, 3.4e38])))
    values = values[torch.randperm(len(values))]
    for k in range(1, len(values) + 1, 3):
        threshold, n_above, _ = _chosen(k, False, values)
        ordered = values.sort(descending=True).values
        assert threshold == ordered[k - 1]
        assert n_above == (values > ordered[k - 1]).sum()


def test_nan_are_counted():
    scores = [torch.randn(9000), torch.randn(70).bfloat16()]
    scores[0][[3, 8999]] = torch.nan
    scores[1][5] = -torch.nan
    with pk.backend("cuda"):
        assert OPS["topk_threshold"].run(40, True, *scores)[2] == 3
        with pytest.raises(ValueError, match="3 scores are NaN"):
            pk.ops.topk_threshold(scores, 9070)


def test_a_threshold_of_other_scores():
    """Fewer than k, or more: the positions are those of the first, -1 behind them."""
    scores = [torch.randn(5000), torch.randn(9001)]
    for threshold in (0.0, 2.5, 7.0, torch.nan):
        positions, count = _same("topk_compact", torch.tensor(threshold), 600, False, *scores)
        assert (positions >= 0).sum() == min(count, 600)


# -- optimizer --------------------------------------------------------------------------------------------------------


def _step_args(nnz, grad=f32, w=None, index=torch.int32):
    made = torch.Generator().manual_seed(nnz)
    vals, m, v, g = (torch.randn(nnz, generator=made) for _ in range(4))
    base = idx = None
    if w is not None:
        base = torch.randn(60, 70, generator=made).to(w)
        idx = torch.randperm(base.numel(), generator=made)[:nnz].sort().values.to(index)
    return vals, m, v.abs(), g.to(grad), base, idx


@pytest.mark.parametrize("nnz", (1, 3, 4, 1023, 1030, 4200))
@pytest.mark.parametrize(
    ("grad", "w", "index"), [(f32, None, None), (bf16, f16, torch.int64), (f16, bf16, torch.int32)]
)
def test_steps(nnz, grad, w, index):
    """Blocks that are full and not; aligned arrays and slices of them."""
    vals, m, v, g, base, idx = _step_args(nnz, grad, w, index)
    for first in (0, 1):
        part = [t[first:] for t in (vals, m, v, g)]
        where = None if idx is None else idx[first:]
        as_good("sparse_adamw", *part, torch.tensor(3.0), base, where, 0.01, 0.9, 0.999, 1e-8, 0.1)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.95)])
def test_a_step_of_the_device_is_that_of_the_host(betas):
    vals, m, v, g, base, idx = _step_args(100, w=bf16)
    results = []
    for number in (1.0, 7.0, 20000.0):
        for step in ((torch.tensor(number), 0.0), (None, number)):
            own = [t.clone() for t in (vals, m, v)]
            native("sparse")._ops.sparse_adamw_cuda_(*own, g, *step, base, idx, 1e-3, *betas, 1e-8, 0.1)
            results.append(own)
        assert all(map(torch.equal, *results[-2:]))


def test_a_transposed_weight_is_not_copied():
    """Its numbers are gathered first, and the step is that with the same numbers in order."""
    vals, m, v, g, base, idx = _step_args(200, w=bf16)
    rest = torch.tensor(2.0), base.T.contiguous().T, idx, 0.01, 0.9, 0.999, 1e-8, 0.1
    outs = as_good("sparse_adamw", vals, m, v, g, *rest)
    with pk.backend("cuda"):
        plain = OPS["sparse_adamw"].run(vals, m, v, g, rest[0], base, *rest[2:])
    assert all(map(torch.equal, outs, plain))
