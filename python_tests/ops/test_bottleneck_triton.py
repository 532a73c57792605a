"""Triton kernels of bottlenecks where no sample of the contract leads: tiles, parts of sums, hard LayerNorms."""

import pytest
import torch
from laws import OPS, as_good, marks

import peft_kernels as pk
from peft_kernels.check import compare, double, gradients
from peft_kernels.ops._op import Sample

pytestmark = marks("bottleneck", "triton")
f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16


def _args(rows, k, m, n, dtype, low, ln="wb", p=0.25, act=1, x=None):
    """(residual, x, ln_w, ln_b, wd, bd, wu, bu, gate, act, scale, eps, p, rng), the weights transposed"""
    made = torch.Generator().manual_seed(rows + k)
    shapes = ((rows, n), (rows, k), (k,), (k,), (m,), (n,), (rows,))
    residual, drawn, ln_w, ln_b, bd, bu, gate = (torch.randn(s, generator=made) for s in shapes)
    wd, wu = (torch.randn(i, o, generator=made).mul(i**-0.5).to(low).T for i, o in ((k, m), (m, n)))
    norm = [(t if letter in (ln or "") else None) for t, letter in ((ln_w + 1, "w"), (ln_b, "b"))]
    norm, bd, bu = [None if t is None else t.to(low) for t in norm], bd.to(low), bu.to(low)
    x, eps, rng = drawn if x is None else x, None if ln is None else 1e-5, torch.tensor([5, -7]) if p else None
    return residual.to(dtype), x.to(dtype), *norm, wd, bd, wu, bu, gate, act, 0.5, eps, p, rng


# Several tiles along each side, the last one cut off, and sums in several parts.
@pytest.mark.parametrize(
    ("shape", "dtype", "low", "ln"),
    [
        pytest.param((20, 260, 5, 260), f32, f32, "wb", id="parts"),
        pytest.param((5, 300, 5, 70), bf16, f32, None, id="mixed"),
        pytest.param((70, 150, 67, 131), f32, f32, "wb", id="fp32", marks=pytest.mark.slow),
        pytest.param((130, 600, 9, 600), bf16, bf16, "wb", id="bf16", marks=pytest.mark.slow),
        pytest.param((33, 520, 70, 90), f16, f32, "b", id="mixed_norm", marks=pytest.mark.slow),
        pytest.param((300, 70, 40, 70), f16, f16, None, id="rows", marks=pytest.mark.slow),
    ],
)
def test_tiles_and_parts(shape, dtype, low, ln):
    """Forward and backward; the residual is another tensor, or x itself."""
    args = _args(*shape, dtype, low, ln)
    y, z, stats = as_good("bottleneck_add", *args, backend="triton")
    tensors, state = args[1:9], (z, None if ln is None else stats)
    needs = [t is not None for t in tensors]
    last = *args[9:], shape[1] == shape[3], needs
    as_good("bottleneck_backward", torch.randn_like(y), *tensors, *state, *last, backend="triton")


@pytest.mark.parametrize("dtype", (f32, bf16))
def test_a_large_mean_does_not_cancel(dtype):
    """Means of 1000 deviations, and a row whose first columns lie far from all others; the gradients, too."""
    made = torch.Generator().manual_seed(1)
    x = torch.randn(4, 300, generator=made) + 1000 * torch.arange(4)[:, None]
    x[0, :32] += 300
    _, *args = _args(4, 300, 6, 300, dtype, f32, p=0.0, x=x)
    op, sample = OPS["bottleneck"], Sample("far", tuple(args), tuple(range(8)))
    with pk.backend("triton"):
        ours = (*op.run(*args), *gradients(op, sample))
    plain = (*op.reference(*args), *gradients(op.reference, sample))
    truth = (*op.reference(*double(args)), *gradients(op.reference, sample, torch.float64))
    assert not [wrong for three in zip(ours, plain, truth, strict=True) if (wrong := compare(*three)[1])]


@pytest.mark.parametrize("dtype", (f32, bf16))
def test_rows_of_one_number(dtype):
    x = torch.tensor([0.0, 1.0, 1e-20, -3e4])[:, None].expand(4, 300)
    residual, *args = _args(4, 300, 6, 300, dtype, dtype, p=0.0, x=x)
    with pk.backend("triton"):
        _, z, stats = OPS["bottleneck_add"].run(residual, *args)
    x, ln_b, wd, bd = (args[i].double() for i in (0, 2, 3, 4))
    torch.testing.assert_close(stats.double(), torch.stack((x[:, 0], torch.full((4,), 1e-5**-0.5).double())))
    tolerance = {"atol": 2e-3, "rtol": 2e-3} if dtype == f32 else {"atol": 5e-2, "rtol": 2e-2}
    torch.testing.assert_close(z.double(), (wd @ ln_b + bd).expand(4, 6), **tolerance)


def test_what_is_not_finite_stays_in_its_row():
    residual, x, *args = _args(20, 40, 5, 40, f32, f32, p=0.0)
    x[3, 5], x[9, 14] = torch.nan, torch.inf
    with pk.backend("triton"):
        y, *_ = OPS["bottleneck_add"].run(residual, x, *args)
    assert (~y.isfinite()).any(1).nonzero().flatten().tolist() == [3, 9]


@pytest.mark.parametrize("strided", (False, True))
def test_in_place(strided):
    residual, *args = _args(20, 40, 5, 24, bf16, f32)
    op, own = OPS["bottleneck_add"], torch.empty(24, 20, dtype=bf16).T if strided else residual.clone()
    with pk.backend("triton"):
        expected = op.run(residual, *args)
        got = op.run(own.copy_(residual), *args, inplace=True)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert strided or got[0] is own


def test_what_gemms_do_faster_is_refused():
    x, wd, wu = torch.zeros(2, 8, dtype=bf16), torch.zeros(256, 8, dtype=bf16), torch.zeros(8, 256, dtype=bf16)
    with pk.backend("triton"):
        with pytest.raises(pk.BackendError, match="two GEMMs"):
            pk.ops.bottleneck(x, wd, None, wu, None)
        assert torch.equal(pk.ops.bottleneck(x, wd.float(), None, wu.float(), None), x)
