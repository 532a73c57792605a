"""The Triton kernels of the Hadamard ops where their samples are too small: all factors, two launches."""

import pytest
import torch
from laws import OPS, as_good, marks

import peft_kernels as pk
from peft_kernels.check import DTYPES
from peft_kernels.ops.fastfood_state import UNIT, fastfood_state

pytestmark = marks("fwht", "triton")
f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16


def _good(op, *args):
    return as_good(op, *args, backend="triton")


@pytest.mark.parametrize("levels", range(1, 15))
def test_factors(levels):
    """One to three factors; the last number is padding."""
    _good("fwht", torch.randn(2, (1 << levels) - 1).to(DTYPES[levels % 3]), 0.5)


@pytest.mark.parametrize(("shape", "dtype"), [((1, 20001), f32), ((2, 16400), bf16)], ids=str)
def test_two_launches(shape, dtype):
    _good("fwht", torch.randn(shape).to(dtype), 0.01)


@pytest.mark.slow
def test_columns_of_a_long_row():
    """Unit vectors to columns of H, exactly."""
    n = (1 << 20) - 5
    x = torch.zeros(n)
    x[3], x[n - 1] = 1, 2
    with pk.backend("triton"):
        y = pk.ops.fwht(x)
    assert torch.equal(y, OPS["fwht"].reference(x, 1.0))


def test_a_nan_stays_in_its_row():
    x = torch.randn(5, 23)
    x[2, 3] = torch.nan
    with pk.backend("triton"):
        y = pk.ops.fwht(x)
    assert torch.equal(y.isnan(), (torch.arange(5) == 2)[:, None].expand(5, 23))


@pytest.mark.parametrize(
    ("d", "numel", "theta", "dtype", "base", "floats"),
    [
        (30, 3001, f32, bf16, True, False),
        (2, 2, bf16, bf16, False, True),
        (1100, 1500, f16, f16, False, False),  # bins for more than one program
        pytest.param(700, 20001, f32, f32, True, False, marks=pytest.mark.slow),  # two launches; several parts
        pytest.param(5000, 6000, f32, f32, False, True, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_fastfood(d, numel, theta, dtype, base, floats):
    made = torch.Generator().manual_seed(d + numel)
    sign, pi_mod, g = fastfood_state(3, numel, d)
    if floats:
        pi_mod, g = pi_mod.int(), g * UNIT
    t, b, dy = (torch.randn(n, generator=made) for n in (d, numel, numel))
    _good("fastfood", t.to(theta), sign, pi_mod, g, b.to(dtype) if base else None, numel, 0.01)
    _good("fastfood_backward", dy.to(dtype), sign, pi_mod, g, 0.01)
