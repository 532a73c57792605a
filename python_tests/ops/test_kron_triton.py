"""Triton kernels of Kronecker products where no sample of the contract leads: many tiles, steps and parts."""

import pytest
import torch
from laws import as_good, marks

import peft_kernels as pk

pytestmark = marks("kron_linear", "triton")
f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16


def _inputs(m, p, q, r, s, dtype, low):
    """(acc, x, a, b, bias), the factors transposed"""
    made = torch.Generator().manual_seed(m)
    acc, x, bias = (torch.randn(shape, generator=made) for shape in ((m, q * s), (m, p * r), (q * s,)))
    a, b = (torch.randn(n, k, generator=made).mul(k**-0.5).to(low).T for k, n in ((p, q), (r, s)))
    return acc.to(dtype), x.to(dtype), a, b, bias.to(low)


def _good(op, *args):
    return as_good(op, *args, backend="triton")


# Several tiles along each side of each factor, the last one cut off, in both orders of the two products.
@pytest.mark.parametrize(
    ("shape", "dtype", "low"),
    [
        pytest.param((1, 70, 9, 35, 40), bf16, f32, id="b_first"),
        pytest.param((1, 35, 40, 70, 9), f16, f16, id="a_first"),
        pytest.param((1, 33, 20, 34, 35), f32, f32, id="fp32"),
        pytest.param((3, 20, 130, 67, 66), bf16, bf16, id="wide", marks=pytest.mark.slow),
    ],
)
def test_tiles(shape, dtype, low):
    acc, x, a, b, bias = _inputs(*shape, dtype, low)
    _good("kron_linear_add", acc, x, a, b, bias, 0.5)
    _good("kron_linear_backward", acc, x, a, b, 0.5, (True, True, True))


@pytest.mark.parametrize("m", (1, 5, 23))
def test_steps_and_parts(m, monkeypatch):
    """Programs that take several steps, of several rows each, and sums in several parts."""
    from peft_kernels.kernels.kron import kron_triton

    monkeypatch.setattr(kron_triton, "_PROGRAMS", 2)
    acc, x, a, b, bias = _inputs(m, 5, 9, 17, 3, bf16, f32)
    _good("kron_linear_add", acc, x, a, b, bias, 2.0)
    _good("kron_linear_backward", acc, x, a, b, 2.0, (True, True, True))


def test_what_is_not_finite_stays_in_its_row():
    _, x, a, b, _ = _inputs(11, 3, 4, 5, 6, bf16, f32)
    x[3, 5], x[9, 14] = torch.nan, torch.inf
    with pk.backend("triton"):
        y = pk.ops.kron_linear(x, a, b)
    assert (~y.isfinite()).any(1).nonzero().flatten().tolist() == [3, 9]


def test_large_factors_are_left_to_gemms():
    _, x, a, b, _ = _inputs(1, 2, 3, 300, 2, bf16, bf16)
    with pk.backend("triton"), pytest.raises(pk.BackendError, match="sides of up to 300"):
        pk.ops.kron_linear(x, a, b)


def test_an_accumulator_of_another_dtype():
    acc, x, a, b, bias = _inputs(3, 4, 5, 6, 7, bf16, f32)
    with pk.backend("triton"):
        y = pk.ops.kron_linear(x, a, b, acc=acc.float(), bias=bias)
    assert y.dtype == f32
    torch.testing.assert_close(y, acc.float() + bias + x.float() @ torch.kron(a, b), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("dtype", "sizes"), [(bf16, (3, 4, 33, 20, 9)), (f32, (20, 2, 3, 40, 30))])
def test_tiles_of_a_sum(dtype, sizes):
    """More than one tile of the weight, of terms and of elements that a gradient sums over."""
    n, p, q, r, s = sizes
    a, b, g = torch.randn(n, p, q).to(dtype), torch.randn(n, r, s).to(dtype), torch.randn(p * r, q * s).to(dtype)
    _good("kron_sum_weight", a, b, 0.5)
    _good("kron_sum_weight_backward", g, a, b, 0.5, (True, True))


def test_a_transposed_weight_is_written_in_place():
    w, a, b = torch.randn(30, 40), torch.randn(8, 5), torch.randn(5, 6)
    expected = w.T + 0.5 * torch.kron(a, b)
    with pk.backend("triton"):
        pk.ops.kron_add_(w.T, a, b, 0.5)
    torch.testing.assert_close(w.T, expected)
