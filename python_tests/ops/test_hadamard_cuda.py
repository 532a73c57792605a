"""CUDA kernels of the Hadamard ops where no sample of a contract leads: all tiles, several passes, many bins."""

import pytest
import torch
from laws import OPS, as_good, marks

import peft_kernels as pk
from peft_kernels.check import DTYPES
from peft_kernels.ops.fastfood_state import UNIT, fastfood_state

pytestmark = marks("fwht", "cuda")
f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
SMALL = str(99 << 10)  # bytes of shared memory on sm_86: tiles of 2^15 have no room


def _sign_of(i, j):
    """(-1)^popcount(i & j), the entry of H."""
    common = i & j
    for shift in (16, 8, 4, 2, 1):
        common = common ^ common >> shift
    return 1.0 - 2.0 * (common & 1)


# -- fwht -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 8, 16, 31, 64, 100, 256])
def test_the_matrix(n):
    """Rows of several tiles; whole numbers, so exact."""
    i = torch.arange(n)
    expected = _sign_of(i[:, None], i[None, :])
    for dtype in DTYPES:
        with pk.backend("cuda"):
            assert torch.equal(pk.ops.fwht(torch.eye(n, dtype=dtype)).float(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 2048), (2, 4000), (1, 8192), (2, 5000), (16384,), (9001,), (32768,), (20001,)])
def test_tiles(shape, dtype):
    as_good("fwht", torch.randn(shape).to(dtype), 0.5)


@pytest.mark.parametrize(
    ("shape", "dtype", "small"),
    [((65536,), f32, False), ((2, 33000), f32, False), ((40000,), bf16, False), ((32768,), f16, True)],
    ids=str,
)
def test_two_passes(shape, dtype, small, monkeypatch):
    if small:
        monkeypatch.setenv("PEFT_KERNELS_EMULATED_SHARED", SMALL)
    as_good("fwht", torch.randn(shape).to(dtype), 0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("levels", "dtype", "small"),
    [(20, f32, False), (21, bf16, False), (24, f32, False), (25, f16, False), (26, f32, True)],
    ids=str,
)
def test_columns_of_long_rows(levels, dtype, small, monkeypatch):
    """Two passes with tiles of each size, and three where shared memory is small: unit vectors to columns of H."""
    if small:
        monkeypatch.setenv("PEFT_KERNELS_EMULATED_SHARED", SMALL)
    n = (1 << levels) - 17
    first, second = n // 3, n - 1
    x = torch.zeros(n, dtype=dtype)
    x[first], x[second] = 1, 2
    with pk.backend("cuda"):
        y = pk.ops.fwht(x)
    i = torch.arange(n, dtype=torch.int32)
    assert torch.equal(y, (_sign_of(i, first) + 2 * _sign_of(i, second)).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_are_not_aligned(dtype):
    """A slice of a buffer, whose numbers are read one by one: the bits of an aligned tensor."""
    x = torch.randn(3, 512).to(dtype)
    moved = torch.empty(x.numel() + 9, dtype=dtype)[1:-8].view(x.shape).copy_(x)
    with pk.backend("cuda"):
        assert torch.equal(pk.ops.fwht(x), pk.ops.fwht(moved))


@pytest.mark.parametrize("n", [5, 16, 5000])
def test_a_nan_stays_in_its_row(n):
    x = torch.randn(5, n)
    x[2, 3] = torch.nan
    with pk.backend("cuda"):
        y = pk.ops.fwht(x)
    assert torch.equal(y.isnan(), (torch.arange(5) == 2)[:, None].expand(5, n))


# -- fastfood ---------------------------------------------------------------------------------------------------------


def _both_ways(d, numel, theta=f32, dtype=f32, base=True, floats=False):
    """Forward and backward, each as good as plain torch."""
    made = torch.Generator().manual_seed(d + numel)
    sign, pi_mod, g = fastfood_state(3, numel, d)
    if floats:
        pi_mod, g = pi_mod.int(), g * UNIT
    t, b, dy = (torch.randn(n, generator=made) for n in (d, numel, numel))
    given = b.to(dtype) if base else None
    as_good("fastfood", t.to(theta), sign, pi_mod, g, given, numel, 0.01)
    return as_good("fastfood_backward", dy.to(dtype), sign, pi_mod, g, 0.01)


@pytest.mark.parametrize(
    ("d", "numel", "theta", "dtype", "base", "floats"),
    [
        (1000, 3001, f32, bf16, True, False),  # one pass
        (2, 2, bf16, bf16, False, True),
        (4096, 4096, f16, f16, False, False),
        (700, 20001, f32, f32, True, False),  # two, of which the last is cropped
        (100, 8192, bf16, f16, True, True),
        (5000, 8000, f32, bf16, True, False),  # a table larger than a tile
        (9000, 33000, f32, f32, False, False),  # larger tiles
    ],
    ids=str,
)
def test_fastfood(d, numel, theta, dtype, base, floats):
    _both_ways(d, numel, theta, dtype, base, floats)


@pytest.mark.slow
@pytest.mark.parametrize("small", [False, True])
def test_large_fastfood(small, monkeypatch):
    """As many bins as the kernels have; many parts of sums."""
    if small:
        monkeypatch.setenv("PEFT_KERNELS_EMULATED_SHARED", SMALL)
    _both_ways(32768, 40000)
    _both_ways(1000, 768 * 768, dtype=bf16)
    _both_ways(20000, 1 << 21)


@pytest.mark.parametrize("magnitude", [1e-37, 1e-30, 1e30])
def test_sums_of_small_and_large_numbers(magnitude):
    """Sums are of whole numbers, relative to the largest of a tile."""
    sign, pi_mod, g = fastfood_state(1, 5000, 60)
    dy = torch.randn(5000)
    with pk.backend("cuda"):
        one, other = (OPS["fastfood_backward"].run(dy * m, sign, pi_mod, g, 1.0) for m in (1.0, magnitude))
    torch.testing.assert_close(other / magnitude, one, rtol=1e-4, atol=1e-4 * one.abs().max().item())


def test_no_gradient_and_one_that_is_not_finite():
    sign, pi_mod, g = fastfood_state(1, 5000, 60)
    dy = torch.zeros(5000)
    with pk.backend("cuda"):
        assert (OPS["fastfood_backward"].run(dy, sign, pi_mod, g, 1.0) == 0).all()
        for bad in (torch.nan, torch.inf):
            dy[17] = bad
            assert OPS["fastfood_backward"].run(dy, sign, pi_mod, g, 1.0).isnan().all()


@pytest.mark.parametrize("index", (torch.int16, torch.int32))
def test_places_out_of_range_lead_nowhere(index):
    """They count modulo k, as in the reference: no access outside of the tensors, which AddressSanitizer would see."""
    sign, pi_mod, g = fastfood_state(1, 5000, 60)
    limits = torch.iinfo(index)
    pi_mod = torch.randint(limits.min, limits.max, pi_mod.shape).to(index)
    as_good("fastfood", torch.randn(60), sign, pi_mod, g, None, 5000, 1.0)
    as_good("fastfood_backward", torch.randn(5000), sign, pi_mod, g, 1.0)


def test_too_many_bins_are_refused():
    d = (1 << 15) + 1
    state = torch.ones(d, dtype=torch.int8), torch.zeros(1 << 16, dtype=torch.int32), torch.ones(1 << 16)
    with pk.backend("cuda"), pytest.raises(pk.BackendError, match=f"d is {d}"):
        pk.ops.fastfood(torch.zeros(d), *state, 5, 1.0)
