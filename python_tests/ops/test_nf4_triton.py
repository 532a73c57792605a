"""NF4's Triton kernels where the samples of the ops are too small: bits of any shape, sums in parts, many ranks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import OPS, marks, same_nf4_bits
from test_nf4 import packed_weight

import peft_kernels as pk
from peft_kernels.check import DTYPES, compare, double, outputs
from peft_kernels.ops import nf4

pytestmark = marks("nf4_linear", "triton")


@pytest.mark.parametrize(
    ("n", "k", "blocksize", "dtype", "magnitude", "bad", "blocksize2"),
    [
        (7, 131, 32, torch.float32, 1e-3, torch.nan, 7),
        (3, 2501, 64, torch.bfloat16, 1.0, -torch.inf, 1),  # more than one program
        (2, 4100, 4096, torch.float16, 1e4, None, 256),
        (5, 33, 32, torch.float32, 1e-42, None, 256),
        (0, 64, 64, torch.float32, 1.0, None, 256),
        (90, 128, 32, torch.bfloat16, 1.0, torch.inf, 64),
    ],
    ids=str,
)
def test_bits(n, k, blocksize, dtype, magnitude, bad, blocksize2):
    same_nf4_bits("triton", n, k, blocksize, dtype, magnitude, bad, blocksize2)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    n=st.integers(0, 20),
    k=st.integers(1, 200),
    blocksize=st.sampled_from(nf4.BLOCKSIZES),
    dtype=st.sampled_from(DTYPES),
    magnitude=st.sampled_from((1e-42, 1e-3, 1.0, 1e4)),
    bad=st.sampled_from((None, torch.nan, torch.inf)),
    blocksize2=st.sampled_from((1, 7, 256)),
)
def test_bits_of_any_shape(n, k, blocksize, dtype, magnitude, bad, blocksize2):
    same_nf4_bits("triton", n, k, blocksize, dtype, magnitude, bad, blocksize2)


def as_good(m, n, k, r, blocksize, dtype, low, nested, p, seed=0):
    """nf4_lora_linear, forward and backward, by the law of all ops."""
    made = torch.Generator().manual_seed(seed)
    packed, absmax, nested = packed_weight(n, k, blocksize, nested, seed)
    shapes = ((m, k), (m, n), (n,), (r, k), (n, r))
    x, g, bias, a, b = (torch.randn(s, generator=made) for s in shapes)
    x, g, bias, a, b = x.to(dtype), g.to(dtype), bias.to(dtype), (a * k**-0.5).to(low), b.to(low)
    rng, second = torch.tensor([seed, 3]) if p else None, (*(nested.values() or (None,) * 3), 256)
    forward, backward = OPS["nf4_lora_linear"], OPS["nf4_lora_linear_backward"]
    args = (x, packed, absmax, n, blocksize, a, b, 0.5, bias, p, rng, *second)
    t = forward.reference(*double(args))[1].float()
    back = (g, x, packed, absmax, blocksize, a, b, t, 0.5, p, rng, *second, (True, True, True))
    for op, given_ in ((forward, args), (backward, back)):
        with pk.backend("triton"):
            ours = outputs(op.run(*given_))
        theirs, truth = outputs(op.reference(*given_)), outputs(op.reference(*double(given_)))
        for i, tensors in enumerate(zip(ours, theirs, truth, strict=True)):
            assert not (wrong := compare(*tensors)[1]), f"{op.name} {i}: {wrong}"


@pytest.mark.parametrize(
    ("m", "n", "k", "r", "blocksize", "dtype", "low", "nested", "p"),
    [
        (3, 40, 400, 40, 64, torch.float32, torch.float32, False, 0.0),  # sums of W and of LoRA in parts
        (2, 600, 61, 3, 32, torch.bfloat16, torch.float32, True, 0.3),
        (130, 33, 96, 16, 128, torch.float16, torch.float16, False, 0.0),  # a second tile of rows
        (5, 20, 48, 0, 64, torch.bfloat16, torch.bfloat16, True, 0.0),
    ],
    ids=str,
)
def test_lora_linear(m, n, k, r, blocksize, dtype, low, nested, p):
    as_good(m, n, k, r, blocksize, dtype, low, nested, p)


@pytest.mark.slow
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    m=st.integers(0, 70),
    n=st.integers(1, 80),
    k=st.integers(1, 600),
    r=st.integers(0, 20),
    blocksize=st.sampled_from((32, 64, 256, 4096)),
    dtypes=st.sampled_from([(d, low) for d in DTYPES for low in {d: 0, torch.float32: 0}]),
    nested=st.booleans(),
    p=st.sampled_from((0.0, 0.3)),
)
def test_lora_linear_on_any_shape(m, n, k, r, blocksize, dtypes, nested, p):
    as_good(m, n, k, r, blocksize, *dtypes, nested, p, seed=m)


def test_rows_and_blocks_that_are_not_finite_stay_apart():
    """A NaN of x is in its row of y, a block of NaN in the columns of y and of dx whose weights it holds."""
    w, x, g = torch.randn(20, 96), torch.randn(3, 96), torch.randn(3, 20)
    x[1, 3], w[1, 40] = torch.nan, torch.nan
    packed, absmax = pk.ops.quantize_nf4(w)
    with pk.backend("triton"):
        y = pk.ops.nf4_linear(x, packed, absmax, 20, 64)
        dx = OPS["nf4_linear_dgrad"].run(g, packed, absmax, 96, 64, None, None, None, 256)
    expected = torch.zeros(3, 20, dtype=torch.bool)
    expected[1] = True
    expected[:, 1] = True  # the block of elements 128 to 191, which are columns 32 to 95 of row 1
    assert torch.equal(y.isnan(), expected)
    assert dx.isnan().all(0).tolist() == dx.isnan().any(0).tolist() == [False] * 32 + [True] * 64


def test_a_layer_without_outputs():
    packed, absmax, _ = packed_weight(0, 64)
    x, a, b = torch.randn(3, 64), torch.randn(4, 64), torch.randn(0, 4)
    rest = (None, None, None, 256)
    with pk.backend("triton"):
        y, t = OPS["nf4_lora_linear"].run(x, packed, absmax, 0, 64, a, b, 1.0, None, 0.0, None, *rest)
        args = (y, x, packed, absmax, 64, a, b, t, 1.0, 0.0, None, *rest, (True, True, True))
        dx, da, db = OPS["nf4_lora_linear_backward"].run(*args)
    torch.testing.assert_close(t, x @ a.T)
    assert y.shape == (3, 0) and db.shape == b.shape
    assert torch.equal(dx, torch.zeros_like(x)) and torch.equal(da, torch.zeros_like(a))


def test_what_has_no_kernel():
    absmax = torch.rand(3)
    with pk.backend("triton"), pytest.raises(pk.BackendError, match="blocksize2 over 16384"):
        pk.ops.quantize_absmax(absmax, None, 16385)
    packed, absmax, _ = packed_weight(4, 64)
    with pk.backend("triton"), pytest.raises(pk.BackendError, match="no kernel for torch.float64"):
        pk.ops.dequantize_nf4(packed, absmax, (4, 64), 64, torch.float64)
