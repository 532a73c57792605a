"""CUDA kernels of Kronecker products where no sample of the contract leads: many tiles, steps and parts, alignment."""

import pytest
import torch
from laws import OPS, as_good, marks

import peft_kernels as pk

pytestmark = marks("kron_linear", "cuda")
f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
MIXED = [(bf16, bf16), (bf16, f32), (f16, f16), (f16, f32)]
every_mix = pytest.mark.parametrize(("dtype", "low"), MIXED, ids=lambda d: str(d)[6:])


def _inputs(m, p, q, r, s, dtype, low):
    """(acc, x, a, b, bias), the factors transposed"""
    made = torch.Generator().manual_seed(m)
    acc, x, bias = (torch.randn(shape, generator=made) for shape in ((m, q * s), (m, p * r), (q * s,)))
    a, b = (torch.randn(n, k, generator=made).mul(k**-0.5).to(low).T for k, n in ((p, q), (r, s)))
    return acc.to(dtype), x.to(dtype), a, b, bias.to(low)


# Sides of one tile and of several, of which the last is cut off; one, and more than one, step along p and r.
SHAPES = {
    "whole": (5, 64, 64, 64, 64),
    "cut": (3, 50, 70, 72, 104),
    "largest": (2, 128, 16, 128, 40),
    "narrow": (9, 16, 32, 96, 32),
    "odd": (7, 33, 35, 67, 19),
}


@every_mix
@pytest.mark.parametrize("shape", SHAPES)
def test_tiles(shape, dtype, low):
    acc, x, a, b, bias = _inputs(*SHAPES[shape], dtype, low)
    as_good("kron_linear_add", acc, x, a, b, bias, 0.5)


@every_mix
@pytest.mark.parametrize("shape", [(5, 64, 64, 64, 64), (3, 50, 64, 40, 24), (21, 20, 17, 33, 9), (70, 4, 8, 16, 8)])
def test_gradients(shape, dtype, low):
    """Teams of four, two warps and one; rows that are not a multiple of what the blocks take."""
    g, x, a, b, _ = _inputs(*shape, dtype, low)
    together = as_good("kron_linear_backward", g, x, a, b, 0.5, (True, True, True))
    with pk.backend("cuda"):
        for i in range(3):
            alone = OPS["kron_linear_backward"].run(g, x, a, b, 0.5, tuple(i == j for j in range(3)))
            assert torch.equal(alone[i], together[i])


@pytest.mark.slow
def test_more_rows_than_warps():
    """A warp goes on with further rows, at the same tile."""
    as_good("kron_linear_add", *_inputs(75, 3, 260, 8, 136, bf16, bf16), 0.5)


@pytest.mark.parametrize("m", (1, 15, 16, 17, 33, pytest.param(4400, marks=pytest.mark.slow)))
def test_parts(m):
    """Of 16 rows each, at first, and then of more for each of the blocks."""
    g, x, a, b, _ = _inputs(m, 1, 2, 3, 1, bf16, f32)
    as_good("kron_linear_backward", g, x, a, b, 1.0, (False, True, True))


@every_mix
def test_the_bits_of_aligned_tensors(dtype, low):
    """Slices of one buffer, factors in either layout."""
    acc, x, a, b, bias = _inputs(6, 40, 24, 48, 56, dtype, low)

    def moved(t):
        return torch.empty(t.numel() + 9, dtype=t.dtype)[1:-8].view(t.shape).copy_(t)

    with pk.backend("cuda"):
        first = OPS["kron_linear_add"].run(acc, x, a, b, bias, 2.0)
        assert torch.equal(first, OPS["kron_linear_add"].run(moved(acc), moved(x), a, b, bias, 2.0))
        assert torch.equal(first, OPS["kron_linear_add"].run(acc, x, a.contiguous(), b.contiguous(), bias, 2.0))
        wanted = (True, True, True)
        grads = OPS["kron_linear_backward"].run(acc, x, a, b, 2.0, wanted)
        assert all(map(torch.equal, grads, OPS["kron_linear_backward"].run(moved(acc), moved(x), a, b, 2.0, wanted)))


@every_mix
def test_what_is_not_finite_stays_in_its_row(dtype, low):
    _, x, a, b, _ = _inputs(11, 17, 20, 24, 16, dtype, low)
    x[3, 5], x[9, 400] = torch.nan, torch.inf
    with pk.backend("cuda"):
        y = pk.ops.kron_linear(x, a, b)
    assert (~y.isfinite()).any(1).nonzero().flatten().tolist() == [3, 9]


def test_what_the_tensor_cores_do_not_multiply():
    """fp32, and an accumulator of another dtype, are products of torch."""
    as_good("kron_linear_add", *_inputs(4, 20, 6, 7, 30, f32, f32), 0.5)
    acc, *rest = _inputs(4, 20, 6, 7, 30, bf16, f32)
    with pk.backend("cuda"):
        assert OPS["kron_linear_add"].run(acc.float(), *rest, 0.5).dtype == f32


def test_factors_that_are_too_large_are_refused():
    _, x, a, b, _ = _inputs(2, 130, 3, 2, 3, bf16, bf16)
    with pk.backend("cuda"), pytest.raises(pk.BackendError, match="up to 130 rows; the kernel takes 128"):
        pk.ops.kron_linear(x, a, b)
    g, x, a, b, _ = _inputs(2, 3, 70, 2, 3, bf16, bf16)
    with pk.backend("cuda"), pytest.raises(pk.BackendError, match="up to 70; the kernel takes 64"):
        OPS["kron_linear_backward"].run(g, x, a, b, 1.0, (True, True, True))
