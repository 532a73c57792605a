"""NF4's CUDA kernels where no sample of a contract leads: bits of the format, parts of sums, panels, ranks, NaN."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import OPS, as_good, equal, marks, native, same_nf4_bits

import peft_kernels as pk
from peft_kernels.check import DTYPES
from peft_kernels.ops import nf4

pytestmark = marks("nf4_linear", "cuda")
f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16


def _packed(n, k, blocksize=64, blocksize2=256):
    """(packed, absmax, blocksize, nested); blocksize2 0: absmax is not quantised."""
    made = torch.Generator().manual_seed(n + k)
    packed, absmax = OPS["quantize_nf4"].reference(torch.randn(n, k, generator=made) * k**-0.5, blocksize)
    if not blocksize2:
        return packed, absmax, blocksize, (None, None, None, 256)
    code = pk.ops.dynamic_map()
    q, absmax, offset = OPS["quantize_absmax"].reference(absmax, code, blocksize2)
    return packed, absmax, blocksize, (q, code, offset, blocksize2)


def _drawn(dtype, *shapes):
    made = torch.Generator().manual_seed(len(shapes))
    return [torch.randn(*shape, generator=made).to(dtype) for shape in shapes]


def _both_ways(m, n, k, dtype=bf16, blocksize=64, blocksize2=256):
    packed, absmax, blocksize, nested = _packed(n, k, blocksize, blocksize2)
    x, g, bias = _drawn(dtype, (m, k), (m, n), (n,))
    as_good("nf4_linear", x, packed, absmax, n, blocksize, bias, *nested)
    as_good("nf4_linear_dgrad", g, packed, absmax, k, blocksize, *nested)


# -- the format -------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    n=st.integers(0, 40),
    k=st.integers(1, 200),
    blocksize=st.sampled_from(nf4.BLOCKSIZES),
    dtype=st.sampled_from(DTYPES),
    magnitude=st.sampled_from((1e-42, 1e-3, 1.0, 1e4)),
    bad=st.sampled_from((None, torch.nan, -torch.inf)),
    blocksize2=st.sampled_from((1, 7, 256)),
)
def test_the_bits_of_the_reference(n, k, blocksize, dtype, magnitude, bad, blocksize2):
    same_nf4_bits("cuda", n, k, blocksize, dtype, magnitude, bad, blocksize2)


def test_levels_ties_and_extremes():
    """A midpoint goes down, the next number after it up; the smallest and largest scales keep their blocks finite."""
    levels, midpoints = torch.tensor(nf4.LEVELS), torch.tensor(nf4.MIDPOINTS)
    ties = torch.cat((levels, midpoints, torch.nextafter(midpoints, torch.tensor(2.0)), torch.ones(18)))
    tiny, huge, zeros = torch.full((64,), 1e-45), torch.full((64,), -3.4e38), torch.zeros(64)
    w = torch.cat((ties, tiny, huge, zeros))
    with pk.backend("cuda"):
        packed, absmax = pk.ops.quantize_nf4(w)
    plain, scales = OPS["quantize_nf4"].reference(w, 64)
    assert torch.equal(packed, plain)
    assert torch.equal(absmax, scales)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k", "row", "column", "rows", "columns"), [
    (40, 96, 8, 0, 24, 96), (40, 96, 0, 32, 40, 64), (9, 65, 3, 0, 5, 65), (9, 65, 0, 7, 9, 31), (40, 96, 3, 5, 2, 8),
])  # fmt: skip
def test_panels_are_cut_out_of_the_weights(n, k, row, column, rows, columns, dtype):
    for blocksize2 in (0, 7):
        packed, absmax, blocksize, nested = _packed(n, k, 32, blocksize2)
        out = torch.empty(rows, columns, dtype=dtype)
        native("nf4")._ops.nf4_panel_(out, packed, absmax, n, k, row, column, blocksize, *nested)
        whole = OPS["dequantize_nf4"].reference(packed, absmax, (n, k), blocksize, dtype, *nested)
        assert torch.equal(out, whole[row : row + rows, column : column + columns])


# -- products ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(1, 140, 2080), (8, 64, 1024), (16, 300, 96), (17, 96, 160), (33, 136, 64), (64, 520, 128)],
    ids=lambda n: str(n),
)
def test_shapes_with_vectors(m, n, k, dtype):
    """Parts of K and of N, warps without a share, rows and columns that fill no block."""
    _both_ways(m, n, k, dtype, 128)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 33, 1100), (9, 530, 72), (30, 65, 131), (50, 12, 40), (3, 5, 1)])
def test_shapes_without(m, n, k, dtype):
    _both_ways(m, n, k, dtype, 32, 7)
    if k < 200:
        _both_ways(m, n, k, dtype, 4096, 0)


@pytest.mark.parametrize("offset", (1, 4, 8))
def test_misaligned_views(offset):
    """Slices of one buffer, so that no row starts where a vector may: the bits of aligned ones."""

    def moved(t):
        held = torch.empty(t.numel() + 16, dtype=t.dtype)
        return held[offset : offset + t.numel()].view(t.shape).copy_(t)

    packed, absmax, blocksize, nested = _packed(72, 96)
    x, g = _drawn(bf16, (5, 96), (5, 72))
    with pk.backend("cuda"):
        for op, u, width in (("nf4_linear", x, 72), ("nf4_linear_dgrad", g, 96)):
            bias = (None,) if op == "nf4_linear" else ()
            outs = [
                OPS[op].run(f(u), f(packed), absmax, width, blocksize, *bias, *nested) for f in (torch.clone, moved)
            ]
            assert torch.equal(*outs), op
        w = moved(torch.randn(9, 40))
        assert all(map(equal, OPS["quantize_nf4"].run(w, 32), OPS["quantize_nf4"].run(w.clone(), 32)))
        args = packed, absmax, [72, 96], blocksize, f32, *nested
        assert torch.equal(OPS["dequantize_nf4"].run(moved(packed), *args[1:]), OPS["dequantize_nf4"].run(*args))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_rows_go_by_panels(dtype, monkeypatch):
    """The workspace is bounded, and numbers of y and dx are rounded once however W is cut."""
    m, n, k = 70, 200, 264
    packed, absmax, blocksize, nested = _packed(n, k)
    x, g, bias = _drawn(dtype, (m, k), (m, n), (n,))
    as_good("nf4_linear", x, packed, absmax, n, blocksize, bias.float(), *nested)
    as_good("nf4_linear_dgrad", g, packed, absmax, k, blocksize, *nested)
    room = 64 * k * dtype.itemsize
    monkeypatch.setattr(native("nf4"), "_PANEL_BYTES", room)
    for u, along, across in ((x, n, k), (g, k, n)):
        where, held = native("nf4")._panels(u, along, across)
        assert len(where) >= 3
        assert [i for i, _ in where] == [0, *torch.tensor([size for _, size in where]).cumsum(0).tolist()][:-1]
        assert sum(size for _, size in where) == along
        assert held.nbytes <= room + 64 * across * dtype.itemsize
    as_good("nf4_linear", x, packed, absmax, n, blocksize, bias.float(), *nested)
    as_good("nf4_linear_dgrad", g, packed, absmax, k, blocksize, *nested)


@pytest.mark.parametrize(("m", "dtype"), [(3, f32), (9, bf16), (40, f16), (70, bf16)])
def test_what_is_not_finite_stays_apart(m, dtype):
    """A NaN of x is in its row of y, a block of NaN in the columns of y and of dx whose weights it holds."""
    n, k = 50, 96
    w, x, g = torch.randn(n, k), torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
    x[m // 2, 3] = torch.nan
    w[1, 40] = torch.nan
    with pk.backend("cuda"):
        packed, absmax = pk.ops.quantize_nf4(w)
        y = pk.ops.nf4_linear(x, packed, absmax, n, 64)
        dx = OPS["nf4_linear_dgrad"](g, packed, absmax, k, 64, None, None, None, 256)
    expected = torch.zeros(m, n, dtype=torch.bool)
    expected[m // 2] = True
    expected[:, 1] = True  # the block of elements 128 to 191, which are columns 32 to 95 of row 1
    assert torch.equal(y.isnan(), expected)
    assert dx.isnan().all(0).tolist() == dx.isnan().any(0).tolist() == [False] * 32 + [True] * 64


def test_views_and_expanded_scales_have_the_same_bits():
    """Bytes under any dtype and orientation; scales in 8 bits, and the numbers they stand for."""
    n, k = 24, 80
    packed, absmax, blocksize, nested = _packed(n, k)
    (x,) = _drawn(f32, (5, k))
    with pk.backend("cuda"):
        expanded = pk.ops.dequantize_absmax(nested[0], absmax, *nested[1:])
        first = OPS["nf4_linear"].run(x, packed, absmax, n, blocksize, None, *nested)
        plain = expanded, n, blocksize, None, None, None, None, 256
        assert torch.equal(OPS["nf4_linear"].run(x, packed, *plain), first)
        for storage in (torch.int8, f16, bf16, f32, torch.float64):
            assert torch.equal(OPS["nf4_linear"].run(x, packed.view(-1).view(storage), *plain), first)
        assert torch.equal(OPS["nf4_linear"].run(x, packed.T, *plain), first)


# -- with LoRA --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("m", "n", "k", "r", "dtype", "low"),
    [
        (1, 140, 1280, 16, bf16, bf16),
        (5, 96, 1056, 8, bf16, f32),
        (12, 72, 65, 20, f16, f16),
        (33, 520, 96, 40, f16, f32),
        (20, 40, 544, 1, f32, f32),
        (64, 33, 40, 3, bf16, f16),
        (66, 48, 64, 8, bf16, bf16),
    ],
)
@pytest.mark.parametrize("p", (0.0, 0.25))
def test_updates(m, n, k, r, dtype, low, p):
    """Of few rows in the same sums; the parts of t are dealt out to those of K."""
    packed, absmax, blocksize, nested = _packed(n, k)
    x, g, bias = _drawn(dtype, (m, k), (m, n), (n,))
    a, b = _drawn(low, (r, k), (n, r))
    a, rng = a * k**-0.5, torch.tensor([-5, 2**33 + 1]) if p else None
    rest = a, b, 0.75, bias, p, rng, *nested
    _, t = as_good("nf4_lora_linear", x, packed, absmax, n, blocksize, *rest)
    for needs in ((True, True, True), (True, False, False), (False, True, True)):
        back = (g, x, packed, absmax, blocksize, a, b, t, 0.75, p, rng, *nested, needs)
        as_good("nf4_lora_linear_backward", *back)


def test_an_update_without_ranks_is_none():
    packed, absmax, blocksize, nested = _packed(24, 64)
    (x,) = _drawn(bf16, (3, 64))
    a, b = torch.zeros(0, 64, dtype=bf16), torch.zeros(24, 0, dtype=bf16)
    with pk.backend("cuda"):
        y = OPS["nf4_linear"].run(x, packed, absmax, 24, blocksize, None, *nested)
        out, t = OPS["nf4_lora_linear"].run(x, packed, absmax, 24, blocksize, a, b, 1.0, None, 0.0, None, *nested)
    assert torch.equal(out, y)
    assert t.shape == (3, 0)
