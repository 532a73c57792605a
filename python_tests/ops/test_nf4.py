"""NF4: the bytes and scales of the format, bit for bit on every backend, and linear layers that read them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import LEVELS, OPS, at_level, backends, same_nf4_bits

import peft_kernels as pk
from peft_kernels.bench.measure import peak_bytes
from peft_kernels.check import DTYPES, compare, double, outputs
from peft_kernels.ops import nf4

every_backend = pytest.mark.parametrize("backend", backends("nf4_linear", "reference", "cpu", "triton"))


def packed_weight(n, k, blocksize=64, nested=False, seed=0):
    """(packed, absmax, keyword arguments of a quantised absmax)"""
    made = torch.Generator().manual_seed(seed)
    packed, absmax = pk.ops.quantize_nf4(torch.randn(n, k, generator=made) * k**-0.5, blocksize)
    if not nested:
        return packed, absmax, {}
    q, absmax, offset = pk.ops.quantize_absmax(absmax)
    return packed, absmax, {"absmax_q": q, "code2": pk.ops.dynamic_map(), "offset": offset}


# -- the format -------------------------------------------------------------------------------------------------------


@every_backend
def test_known_bytes(backend):
    """Two indices to a byte, the even one high; the block of zeros and the odd end are those of bitsandbytes."""
    w = torch.zeros(64 + 33)
    w[64:68] = torch.tensor([-2.0, 2.0, 0.161, 0.3])
    with pk.backend(backend):
        packed, absmax = pk.ops.quantize_nf4(w)
        assert packed.shape == (49, 1)
        assert packed.dtype == torch.uint8
        assert absmax.tolist() == [0.0, 2.0]
        assert packed[:, 0].tolist() == [0x77] * 32 + [0x0F, 0x89] + [0x77] * 15
        back = pk.ops.dequantize_nf4(packed, absmax, (97,), 64, torch.float32)
    assert back[:66].tolist() == [0.0] * 64 + [-2.0, 2.0]


@every_backend
def test_every_level_and_every_tie(backend):
    """A level is its own index; a midpoint goes down, the next number after it up."""
    levels, midpoints = torch.tensor(nf4.LEVELS), torch.tensor(nf4.MIDPOINTS)
    above = torch.nextafter(midpoints, torch.tensor(2.0))
    w = torch.cat((levels, midpoints, above, torch.ones(18)))
    with pk.backend(backend):
        packed, _ = pk.ops.quantize_nf4(w)
    index = torch.stack((packed >> 4, packed & 15), -1).flatten()[:46]
    assert index.tolist() == [*range(16), *range(15), *range(1, 16)]


def test_the_dynamic_map():
    code = pk.ops.dynamic_map()
    assert code.shape == (256,)
    assert (code.diff() > 0).all()
    assert code[[0, 127, 128, 255]].tolist() == pytest.approx([-0.9929688, 0.0, 5.5e-7, 1.0], rel=1e-6)


@every_backend
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_block_that_is_not_finite_is_nan(backend, bad):
    w = torch.randn(3, 64)
    w[1, 5] = bad
    with pk.backend(backend):
        packed, absmax = pk.ops.quantize_nf4(w)
        back = pk.ops.dequantize_nf4(packed, absmax, w.shape, 64, torch.bfloat16)
    assert absmax.isnan().tolist() == [False, True, False]
    assert back.isnan().all(1).tolist() == [False, True, False]
    assert back[[0, 2]].isfinite().all()


@every_backend
def test_extremes_of_fp32(backend):
    """The smallest and largest scales keep their blocks finite."""
    tiny, huge = torch.full((64,), 1e-45), torch.full((64,), 3.4e38)
    outlier = torch.full((64,), 1e-3)
    outlier[7] = 1e4
    with pk.backend(backend):
        packed, absmax = pk.ops.quantize_nf4(torch.stack((tiny, -huge, outlier)))
        back = pk.ops.dequantize_nf4(packed, absmax, (3, 64), 64, torch.float32)
    assert back[0].abs().max() <= 1e-45
    assert torch.equal(back[1], -huge)
    assert back[2].nonzero().tolist() == [[7]]


@every_backend
def test_double_quantisation(backend):
    """Scales come back within the 0.8 % that one 8-bit step costs, the offset exactly, and NaN stays in its block."""
    absmax = torch.randn(4096, 64).abs().amax(1)
    with pk.backend(backend):
        q, absmax2, offset = pk.ops.quantize_absmax(absmax)
        back = pk.ops.dequantize_absmax(q, absmax2, pk.ops.dynamic_map(), offset)
        absmax[300] = torch.nan
        q, absmax2, shifted = pk.ops.quantize_absmax(absmax)
        poisoned = pk.ops.dequantize_absmax(q, absmax2, pk.ops.dynamic_map(), shifted)
    assert q.dtype == torch.uint8
    assert absmax2.shape == (16,)
    assert offset.item() == pytest.approx(absmax.nanmean().item(), rel=1e-3)
    assert ((back - absmax).abs() / absmax).nan_to_num().max() < 0.01
    assert poisoned.view(16, 256).isnan().all(1).tolist() == [i == 1 for i in range(16)]
    assert poisoned.isnan().sum() == 256


@every_backend
def test_a_quantised_absmax_gives_the_bits_of_the_expanded_one(backend):
    packed, absmax2, nested = packed_weight(24, 80, nested=True)
    x, g = torch.randn(5, 80), torch.randn(5, 24)
    with pk.backend(backend):
        absmax = pk.ops.dequantize_absmax(nested["absmax_q"], absmax2, nested["code2"], nested["offset"])
        ours, plain = (
            (
                pk.ops.dequantize_nf4(packed, scales, (24, 80), 64, torch.float32, **kwargs),
                pk.ops.nf4_linear(x, packed, scales, 24, 64, **kwargs),
                OPS["nf4_linear_dgrad"](g, packed, scales, 80, 64, *(kwargs.values() or (None,) * 3), 256),
            )
            for scales, kwargs in ((absmax2, nested), (absmax, {}))
        )
    assert all(map(torch.equal, ours, plain))


@every_backend
@pytest.mark.parametrize("storage", [torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_quant_storage_is_a_view_of_the_bytes(backend, storage):
    packed, absmax, _ = packed_weight(6, 64)
    x, stored = torch.randn(3, 64), packed.view(-1).view(storage)
    with pk.backend(backend):
        ours, plain = (
            (pk.ops.dequantize_nf4(p, absmax, (6, 64), 64, torch.float32), pk.ops.nf4_linear(x, p, absmax, 6, 64))
            for p in (stored, packed)
        )
        transposed = pk.ops.nf4_linear(x, packed.T, absmax, 6, 64)
    assert all(map(torch.equal, ours, plain))
    assert torch.equal(transposed, plain[1])


# -- errors -----------------------------------------------------------------------------------------------------------

P, S, KW = packed_weight(8, 64, nested=True)
F_ABSMAX = pk.ops.dequantize_absmax(KW["absmax_q"], S, KW["code2"], KW["offset"])
X, A, B = torch.ones(2, 64), torch.ones(4, 64), torch.ones(8, 4)
BAD = {
    "blocksize": (lambda: pk.ops.quantize_nf4(X, 48), "blocksize is 48; expected one of 32, 64"),
    "integers": (lambda: pk.ops.quantize_nf4(P), "uint8; expected a floating dtype"),
    "bytes": (
        lambda: pk.ops.dequantize_nf4(P, F_ABSMAX, (8, 65), 64, torch.float32),
        "520 weights take 260",
    ),
    "absmax": (lambda: pk.ops.nf4_linear(X, P, F_ABSMAX[:7], 8, 64), r"absmax is torch.float32 \(7,\).*expected 8"),
    "absmax dtype": (lambda: pk.ops.nf4_linear(X, P, F_ABSMAX.half(), 8, 64), "expected 8 of torch.float32"),
    "half nested": (lambda: pk.ops.nf4_linear(X, P, S, 8, 64, absmax_q=KW["absmax_q"]), "all three or none"),
    "code": (lambda: pk.ops.quantize_absmax(F_ABSMAX, KW["code2"][:16]), "expected 256 of torch.float32"),
    "blocksize2": (lambda: pk.ops.quantize_absmax(F_ABSMAX, None, 0), "blocksize2 is 0; expected at least 1"),
    "bias": (lambda: pk.ops.nf4_linear(X, P, F_ABSMAX, 8, 64, bias=X[0]), r"bias is \(64,\); expected \[8\]"),
    "x": (lambda: pk.ops.nf4_linear(P, P, F_ABSMAX, 8, 64), "x is torch.uint8"),
    "out": (lambda: pk.ops.nf4_lora_linear(X, P, F_ABSMAX, 8, 64, A, B[1:], 1.0), r"b is \(7, 4\); expected \[8, r\]"),
    "device": (lambda: pk.ops.nf4_linear(X.to("meta"), P, F_ABSMAX, 8, 64), "move them to one device"),
    "p": (lambda: pk.ops.nf4_lora_linear(X, P, F_ABSMAX, 8, 64, A, B, 1.0, p=0.5), "needs rng"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)


# -- the linear layers ------------------------------------------------------------------------------------------------


def test_lora_is_the_sum_of_its_parts():
    packed, absmax, nested = packed_weight(24, 80, nested=True)
    x, a, b = (torch.randn(s, requires_grad=True) for s in ((3, 7, 80), (4, 80), (24, 4)))
    bias, rng = torch.randn(24), torch.tensor([1, 2])
    fused = pk.ops.nf4_lora_linear(x, packed, absmax, 24, 64, a, b, 0.5, bias=bias, p=0.1, rng=rng, **nested)
    y = pk.ops.nf4_linear(x, packed, absmax, 24, 64, bias=bias, **nested)
    apart = pk.ops.lora_add(y, x, a, b, 0.5, p=0.1, rng=rng)
    torch.testing.assert_close(fused, apart)
    g = torch.randn_like(fused)
    for ours, theirs in zip(*(torch.autograd.grad(out, (x, a, b), g) for out in (fused, apart)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_what_requires_grad_beside_the_weights_is_trained():
    packed, absmax, _ = packed_weight(8, 64)
    x, a, b = torch.randn(2, 64), torch.randn(4, 64), torch.randn(8, 4)
    bias, scale = torch.randn(8, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    y = pk.ops.nf4_linear(x, packed, absmax, 8, 64, bias=bias)
    assert torch.equal(torch.autograd.grad(y.sum(), bias)[0], torch.full((8,), 2.0))
    y = pk.ops.nf4_lora_linear(x, packed, absmax, 8, 64, a, b, scale, bias=bias)
    by_bias, by_scale = torch.autograd.grad(y.sum(), (bias, scale))
    assert torch.equal(by_bias, torch.full((8,), 2.0))
    torch.testing.assert_close(by_scale, ((x @ a.T) @ b.T).sum(), atol=1e-3, rtol=1e-5)  # of 16 terms of about 16


def test_a_linear_layer_keeps_the_packed_weights_alone():
    packed, absmax, _ = packed_weight(48, 64)
    x, saved = torch.randn(100, 64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        pk.ops.nf4_linear(x, packed, absmax, 48, 64)
    assert {t.data_ptr() for t in saved} == {packed.data_ptr(), absmax.data_ptr()}


def test_autocast_casts_x_and_the_bias_alone():
    packed, absmax, nested = packed_weight(8, 64, nested=True)
    x, bias = torch.randn(3, 64, requires_grad=True), torch.randn(8)
    with torch.autocast("cpu", torch.bfloat16):
        y = pk.ops.nf4_linear(x, packed, absmax, 8, 64, bias=bias, **nested)
        lora = pk.ops.nf4_lora_linear(x, packed, absmax, 8, 64, A, B, 1.0, bias=bias, **nested)
    assert y.dtype == lora.dtype == torch.bfloat16
    low = pk.ops.nf4_linear(x.bfloat16(), packed, absmax, 8, 64, bias=bias.bfloat16(), **nested)
    assert torch.equal(y, low)


# -- the CPU kernels --------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    n=st.integers(0, 40),
    k=st.integers(1, 200),
    blocksize=st.sampled_from(nf4.BLOCKSIZES),
    dtype=st.sampled_from(DTYPES),
    magnitude=st.sampled_from((1e-42, 1e-3, 1.0, 1e4)),
    bad=st.sampled_from((None, torch.nan)),
    blocksize2=st.sampled_from((1, 7, 256)),
)
def test_the_kernels_have_the_bits_of_the_reference(n, k, blocksize, dtype, magnitude, bad, blocksize2):
    """Bytes, scales, scales of scales and every number read back, whatever the shape."""
    same_nf4_bits("cpu", n, k, blocksize, dtype, magnitude, bad, blocksize2)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    m=st.integers(0, 70),
    n=st.integers(1, 120),
    k=st.integers(1, 600),
    blocksize=st.sampled_from((32, 64, 256, 4096)),
    dtype=st.sampled_from(DTYPES),
    nested=st.booleans(),
    r=st.sampled_from((0, 1, 8, 19, 200)),
    p=st.sampled_from((0.0, 0.3)),
)
def test_linear_layers_on_any_shape(m, n, k, blocksize, dtype, nested, r, p):
    """Every result against fp64, by the law of all ops."""
    packed, absmax, nested = packed_weight(n, k, blocksize, nested, seed=m)
    made = torch.Generator().manual_seed(m)
    x, g, bias = (torch.randn(s, generator=made).to(dtype) for s in ((m, k), (m, n), (n,)))
    a, b = (torch.randn(s, generator=made) for s in ((r, k), (n, r)))
    rest, lora = (*(nested.values() or (None,) * 3), 256), (a * k**-0.5, b, 0.5)
    drop = (p, torch.tensor([m, n]) if p else None)
    forward = (x, packed, absmax, n, blocksize, *lora, bias, *drop, *rest)
    t = OPS["nf4_lora_linear"].reference(*forward)[1]
    for name, args in (
        ("nf4_linear", (x, packed, absmax, n, blocksize, bias, *rest)),
        ("nf4_linear_dgrad", (g, packed, absmax, k, blocksize, *rest)),
        ("nf4_lora_linear", forward),
        ("nf4_lora_linear_backward", (g, x, packed, absmax, blocksize, *lora[:2], t, 0.5, *drop, *rest, (True,) * 3)),
    ):
        op = OPS[name]
        with pk.backend("cpu"):
            ours = op.run(*args)
        results = (ours, op.reference(*args), op.reference(*double(args)))
        for own, plain, truth in zip(*map(outputs, results), strict=True):
            _, wrong = compare(own, plain, truth)
            assert not wrong, f"{name} {m=} {n=} {k=} {blocksize=} {dtype=} {r=} {p=}: {wrong}"


@pytest.mark.parametrize("m", [1, 4, 30])
def test_long_sums_are_as_good_as_torch(m):
    """Weights of a usual size beside a LoRA term a thousand times larger, in fp32 and by the law of all ops."""
    n, k, r, own = 24, 11008, 8, (None, None, None, 256)
    packed, absmax, _ = packed_weight(n, k)
    packed_t, absmax_t, _ = packed_weight(k, n)
    x, a, b = torch.randn(m, k), torch.randn(r, k), torch.randn(n, r)
    for name, args in (
        ("nf4_linear", (x, packed, absmax, n, 64, None, *own)),
        ("nf4_linear_dgrad", (x, packed_t, absmax_t, n, 64, *own)),
        ("nf4_lora_linear", (x, packed, absmax, n, 64, a, b, 1.0, None, 0.0, None, *own)),
    ):
        op = OPS[name]
        with pk.backend("cpu"):
            ours = outputs(op.run(*args))[0]
        plain, truth = (outputs(op.reference(*own_args))[0] for own_args in (args, double(args)))
        _, wrong = compare(ours, plain, truth)
        assert not wrong, f"{name}: {wrong}"


@pytest.mark.parametrize("blocksize2", [2**40, 2**62, 2**63 - 1])
def test_any_second_blocksize(blocksize2):
    absmax = torch.rand(130) + 0.5
    with pk.backend("cpu"):
        ours, plain = (pk.ops.quantize_absmax(absmax, None, size) for size in (blocksize2, 130))
        assert all(map(torch.equal, ours, plain))
        back, same = (
            pk.ops.dequantize_absmax(plain[0], plain[1], pk.ops.dynamic_map(), plain[2], size)
            for size in (blocksize2, 130)
        )
    assert torch.equal(back, same)


@pytest.mark.parametrize("m", [1, 4, 9, 300])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_lora_is_accumulated_before_the_only_rounding(m, p):
    """Sums of fp16 operands are those of the same numbers in fp32, so a result has their bits, rounded."""
    packed, absmax, _ = packed_weight(50, 224)
    x, g, a, b = (torch.randn(s).half() for s in ((m, 224), (m, 50), (7, 224), (50, 7)))
    drop, own = (p, torch.tensor([1, 2]) if p else None), (None, None, None, 256)
    results = []
    for cast in (torch.half, torch.float):
        xc, gc, ac, bc = (t.to(cast) for t in (x, g, a, b))
        with pk.backend("cpu"):
            y, t = OPS["nf4_lora_linear"].run(xc, packed, absmax, 50, 64, ac, bc, 0.5, None, *drop, *own)
            back = (gc, xc, packed, absmax, 64, ac, bc, t, 0.5, *drop, *own, (True, False, False))
            results.append((y, OPS["nf4_lora_linear_backward"].run(*back)[0]))
    assert all(torch.equal(low, wide.half()) for low, wide in zip(*results, strict=True))


@pytest.mark.parametrize("m", [1, 3, 8, 70, 600])
def test_rows_and_blocks_that_are_not_finite_stay_apart(m):
    """A NaN of x is in its row of y, a block of NaN in the columns of y and of dx whose weights it holds."""
    n, k = 50, 96
    w, x, g = torch.randn(n, k), torch.randn(m, k), torch.randn(m, n)
    x[m // 2, 3] = torch.nan
    w[1, 40] = torch.nan
    packed, absmax = pk.ops.quantize_nf4(w)
    with pk.backend("cpu"):
        y = pk.ops.nf4_linear(x, packed, absmax, n, 64)
        dx = OPS["nf4_linear_dgrad"](g, packed, absmax, k, 64, None, None, None, 256)
    expected = torch.zeros(m, n, dtype=torch.bool)
    expected[m // 2] = True
    expected[:, 1] = True  # the block of elements 128 to 191, which are columns 32 to 95 of row 1
    assert torch.equal(y.isnan(), expected)
    assert dx.isnan().all(0).tolist() == dx.isnan().any(0).tolist() == [False] * 32 + [True] * 64


@pytest.mark.parametrize("m", [1, 2, 16, 700])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_thread_count_does_not_change_a_bit(m, dtype):
    packed, absmax, nested = packed_weight(700, 1000, nested=True)
    x, g, before = torch.randn(m, 1000).to(dtype), torch.randn(m, 700).to(dtype), torch.get_num_threads()
    rest = (*nested.values(), 256)
    try:
        outs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with pk.backend("cpu"):
                y = pk.ops.nf4_linear(x, packed, absmax, 700, 64, **nested)
                outs.append((y, OPS["nf4_linear_dgrad"](g, packed, absmax, 1000, 64, *rest)))
        assert all(torch.equal(a, b) for other in outs[1:] for a, b in zip(outs[0], other, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("m", [1, 16, 128])
def test_weights_are_never_materialised(m):
    """Torch's allocator sees y or dx, and nothing of the size of W."""
    n, k = 1024, 2048
    packed, absmax, nested = packed_weight(n, k, nested=True)
    x, g = torch.randn(m, k).bfloat16(), torch.randn(m, n).bfloat16()
    with pk.backend("cpu"):
        forward = peak_bytes(lambda: pk.ops.nf4_linear(x, packed, absmax, n, 64, **nested), "cpu")
        back = peak_bytes(lambda: OPS["nf4_linear_dgrad"](g, packed, absmax, k, 64, *nested.values(), 256), "cpu")
    assert forward == 2 * m * n
    assert back == 2 * m * k


@pytest.mark.parametrize("level", LEVELS)
def test_every_other_level(level):
    """Each build of the kernels that this machine can run: the bits of the format, and the law on linear layers."""
    code = """
import test_nf4 as own
own.test_the_kernels_have_the_bits_of_the_reference()
own.test_linear_layers_on_any_shape()
for m in (1, 9):
    own.test_lora_is_accumulated_before_the_only_rounding(m, 0.3)
for m in (1, 8, 70):
    own.test_rows_and_blocks_that_are_not_finite_stay_apart(m)
"""
    at_level(level, code)
