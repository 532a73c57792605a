"""The sparse ops beyond the laws of test_ops: large shapes, both ways of a product, exact bits, peak memory."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import peft_kernels as pk
from peft_kernels.check import DTYPES, compare, double
from peft_kernels.kernels.sparse import sparse_native

OPS = pk.ops.all_ops()
SHAPES = [("uniform", 0.0), ("uniform", 0.01), ("uniform", 0.4), ("uniform", 0.9), ("rows", 0.2), ("columns", 0.2)]


def csr(mask, dtype=torch.int32):
    row, col = mask.nonzero().T
    crow = F.pad(torch.bincount(row, minlength=len(mask)).cumsum(0), (1, 0))
    return crow.to(dtype), col.to(dtype)


def masked(m, n, share, kind="uniform", seed=0):
    """bool [m, n]: each place, each row or each column with probability `share`"""
    made = torch.Generator().manual_seed(seed)
    size = {"uniform": (m, n), "rows": (m, 1), "columns": (1, n)}[kind]
    return (torch.rand(size, generator=made) < share).expand(m, n)


def layer(tokens, m, n, share, dtype=torch.float32):
    """x, w, vals, crow, col, g"""
    made = torch.Generator().manual_seed(tokens)
    x, w, g = (torch.randn(s, generator=made).to(dtype) for s in ((tokens, n), (m, n), (tokens, m)))
    crow, col = csr(masked(m, n, share))
    return x, w / n**0.5, torch.randn(len(col), generator=made) / n**0.5, crow, col, g


@pytest.fixture
def ways(monkeypatch):
    """Chooses between W and D apart, and panels of W + D, several of them."""
    monkeypatch.setattr(sparse_native, "_PANEL_BYTES", 1)

    def choose(apart):
        monkeypatch.setattr(sparse_native, "_add_apart", lambda *args: apart)

    return choose


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    tokens=st.integers(0, 700),
    m=st.integers(1, 90),
    n=st.integers(1, 90),
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from(DTYPES),
    index=st.sampled_from((torch.int32, torch.int64)),
)
def test_sddmm_on_any_shape(tokens, m, n, shape, dtype, index):
    """Several blocks of tokens, sparse and dense tiles, unused rows and columns, against fp64."""
    kind, share = shape
    crow, col = csr(masked(m, n, share, kind, seed=tokens), index)
    made = torch.Generator().manual_seed(m * 91 + n)
    g, x = (torch.randn(tokens, width, generator=made).to(dtype) for width in (m, n))
    op = OPS["sddmm"]
    with pk.backend("cpu"):
        out = op.run(g, x, crow, col)
    _, wrong = compare(out, op.reference(g, x, crow, col), op.reference(*double((g, x, crow, col))))
    assert not wrong


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    tokens=st.integers(0, 600),
    m=st.integers(1, 90),
    n=st.integers(1, 90),
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from(DTYPES),
)
def test_products_with_the_delta_on_any_shape(tokens, m, n, shape, dtype):
    kind, share = shape
    crow, col = csr(masked(m, n, share, kind, seed=tokens))
    made = torch.Generator().manual_seed(m * 91 + n)
    y, x, vals = (torch.randn(s, generator=made) for s in ((tokens, m), (tokens, n), (len(col),)))
    for name, args in (
        ("sparse_add", (y.to(dtype), x.to(dtype), vals, crow, col)),
        ("sparse_linear_dx", (y.to(dtype), None, vals, crow, col, n)),
    ):
        with pk.backend("cpu"):
            out = OPS[name].run(*args)
        reference = OPS[name].reference
        _, wrong = compare(out, reference(*args), reference(*double(args)))
        assert not wrong, name


def test_sddmm_of_a_large_layer():
    """As wide as real ones: tiles of several columns and several blocks of rows."""
    for share in (0.003, 0.05, 0.7):
        crow, col = csr(masked(700, 1500, share))
        for dtype in (torch.float32, torch.bfloat16):
            g, x = torch.randn(300, 700).to(dtype), torch.randn(300, 1500).to(dtype)
            with pk.backend("cpu"):
                out = pk.ops.sddmm(g, x, crow, col)
            truth = OPS["sddmm"].reference(g.double(), x.double(), crow, col)
            torch.testing.assert_close(out.double(), truth, atol=2e-4, rtol=1e-5)


def test_gradients_are_the_dense_ones_at_the_mask():
    x, w, vals, crow, col, g = layer(40, 30, 50, 0.1)
    mask, bias = masked(30, 50, 0.1), torch.randn(30, requires_grad=True)
    x.requires_grad_(), vals.requires_grad_()
    whole = w.clone().masked_scatter(mask, w[mask] + vals.detach()).requires_grad_()
    y = pk.ops.sparse_linear(x, w, vals, crow, col, bias=bias)
    dense = F.linear(x, whole, bias)
    torch.testing.assert_close(y, dense)
    ours, theirs = (torch.autograd.grad(out, (x, d, bias), g) for out, d in ((y, vals), (dense, whole)))
    for a, b in zip(ours, (theirs[0], theirs[1][mask], theirs[2]), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_both_ways_of_a_product_agree(ways, dtype, transposed):
    x, w, vals, crow, col, g = layer(33, 150, 200, 0.05, dtype)
    w = w.T.contiguous().T if transposed else w
    before, bias = w.clone(), torch.randn(150).to(dtype)
    results = []
    for apart in (True, False):
        ways(apart)
        with pk.backend("cpu"):
            y = OPS["sparse_linear"].run(x, w, vals, crow, col, bias)
            results.append((y, OPS["sparse_linear_dx"].run(g, w, vals, crow, col, 200)))
    for one, other in zip(*results, strict=True):
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)
    assert torch.equal(w, before)


def test_nothing_is_kept_but_the_arguments():
    x, w, vals, crow, col, _ = layer(20, 30, 40, 0.1)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        pk.ops.sparse_linear(x.requires_grad_(), w, vals.requires_grad_(), crow, col)
    assert sorted(saved) == sorted(t.data_ptr() for t in (x, w, vals, crow, col))


PEAK = """
import mmap, resource, sys, warnings, torch
import peft_kernels as pk
size, tokens = 4096, 64
torch.randn(size, size).numpy().tofile(sys.argv[1])
warnings.simplefilter("ignore")  # of memory that cannot be written to
with open(sys.argv[1], "rb") as file:
    w = torch.frombuffer(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ), dtype=torch.float32).view(size, size)
flat = torch.arange(0, size * size, 211)
crow = torch.zeros(size + 1, dtype=torch.int64)
crow[1:] = torch.bincount(flat // size, minlength=size).cumsum(0)
crow, col = crow.int(), (flat % size).int()
vals, x = torch.zeros(len(col), requires_grad=True), torch.randn(tokens, size, requires_grad=True)
def step(rows):
    pk.ops.sparse_linear(rows, w, vals, crow, col).sum().backward()
step(x[:1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(x)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_the_weight_is_only_read_and_its_dense_gradient_never_there(tmp_path):
    """W takes 64 MB, mapped from a file without the right to write; a whole training step takes a third of that."""
    command = [sys.executable, "-c", PEAK, tmp_path / "w"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 64 / 3, done.stdout


@pytest.mark.parametrize("share", [0.003, 0.05, 0.8])
def test_thread_count_does_not_change_a_bit_of_a_large_call(share):
    """Large enough that every loop is really dealt out to threads."""
    x, _, vals, crow, col, g = layer(300, 700, 1100, share)
    before, outs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with pk.backend("cpu"):
                args = vals, crow, col
                low = pk.ops.sddmm(g.bfloat16(), x.bfloat16(), crow, col)
                added, dx = OPS["sparse_add"].run(g, x, *args), OPS["sparse_linear_dx"].run(g, None, *args, 1100)
                outs.append((pk.ops.sddmm(g, x, crow, col), low, added, dx))
    finally:
        torch.set_num_threads(before)
    for other in outs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outs[0], other, strict=True))


def test_gradients_accumulate():
    x, w, vals, crow, col, g = layer(24, 30, 40, 0.1)
    vals.requires_grad_()
    for part in range(2):
        rows = slice(12 * part, 12 * part + 12)
        pk.ops.sparse_linear(x[rows], w, vals, crow, col).backward(g[rows])
    whole = pk.ops.sddmm(g, x, crow, col)
    torch.testing.assert_close(vals.grad, whole)
    ours = torch.zeros_like(whole)
    pk.ops.sddmm_add_(ours, g[:12], x[:12], crow, col)
    pk.ops.sddmm_add_(ours, g[12:], x[12:], crow, col)
    torch.testing.assert_close(ours, whole)


def test_autocast_casts_x_and_w_and_leaves_the_values_in_fp32():
    x, w, vals, crow, col, g = layer(6, 30, 40, 0.1)
    vals.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = pk.ops.sparse_linear(x, w, vals, crow, col)
    expected = pk.ops.sparse_linear(x.bfloat16(), w.bfloat16(), vals, crow, col)
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)
    (grad,) = torch.autograd.grad(y, vals, g.bfloat16())
    assert grad.dtype == torch.float32


@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int16])
@pytest.mark.parametrize("transposed", [False, True])
def test_swap_keeps_every_bit(name, dtype, transposed):
    """All bit patterns of 16 bits, NaN among them."""
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    w = (bits if dtype.itemsize == 2 else bits.repeat_interleave(2)).view(dtype).view(256, 256).clone()
    w = w.T if transposed else w
    idx, width = torch.arange(3, 256**2, 7), torch.int16 if dtype.itemsize == 2 else torch.int32
    stash = w.flatten().flip(0)[: len(idx)].clone()
    before, held = w.contiguous().view(width).clone(), stash.view(width).clone()
    with pk.backend(name):
        pk.ops.sparse_swap_(w, idx, stash)
        assert torch.equal(w.contiguous().view(width).flatten()[idx], held)
        assert torch.equal(stash.view(width), before.flatten()[idx])
        pk.ops.sparse_swap_(w, idx, stash)
    assert torch.equal(w.contiguous().view(width), before) and torch.equal(stash.view(width), held)


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_scatter_writes_where_it_is_told(name):
    for w in (torch.randn(5, 6, 7), torch.randn(6, 5).T, torch.randn(6, 5, 4).transpose(0, 2)):
        idx, vals = torch.tensor([0, 7, w.numel() - 1], dtype=torch.int32), torch.tensor([1.0, 2.0, 3.0])
        expected = w.contiguous().flatten().clone()
        expected[idx.long()] += 0.5 * vals
        with pk.backend(name if w.is_contiguous() or w.dim() == 2 else "reference"):
            pk.ops.sparse_scatter_(w, idx, vals, alpha=0.5)
            assert torch.equal(w.flatten(), expected)
            pk.ops.sparse_scatter_(w, idx, vals, add=False)
        assert torch.equal(w.flatten()[idx.long()], vals)


@pytest.mark.parametrize("idx", [[3, 1], [2, 2], [-1, 4], [0, 20]], ids=["descending", "twice", "negative", "beyond"])
def test_bad_places_raise_before_anything_is_written(idx):
    w, idx = torch.zeros(4, 5), torch.tensor(idx)
    with pk.backend("cpu"):
        for write in (pk.ops.sparse_scatter_, pk.ops.sparse_swap_):
            with pytest.raises(RuntimeError, match="idx must ascend strictly within the 20 elements of w"):
                write(w, idx, torch.ones(2))
    assert not w.any()


@pytest.mark.parametrize(
    ("crow", "col"),
    [([0, 2, 2], [4, 1]), ([0, 2, 2], [1, 1]), ([0, 1, 2], [0, 5]), ([0, 1, 2], [-1, 0]), ([0, 3, 2], [0, 1])]
    + [([0, 1, 1], [0, 1]), ([1, 1, 2], [0, 1])],
    ids=["descending", "twice", "beyond", "negative", "falling", "short", "late"],
)
def test_a_wrong_mask_is_named(crow, col):
    crow, col = torch.tensor(crow), torch.tensor(col)
    x, w, g, vals = torch.ones(3, 5), torch.ones(2, 5), torch.ones(3, 2), torch.ones(2)
    with pk.backend("cpu"):
        for call in (
            lambda: pk.ops.sddmm(g, x, crow, col),
            lambda: pk.ops.sparse_linear(x, w, vals, crow, col),
            lambda: pk.ops.sparse_add(g, x, vals, crow, col),
        ):
            with pytest.raises(ValueError, match=r"no mask \[2, 5\] in CSR"):
                call()


BAD = {
    "w": (lambda x, w, v, r, c: pk.ops.sparse_linear(x, w[:, 1:], v, r, c), r"expected \[out, in\]"),
    "bias": (lambda x, w, v, r, c: pk.ops.sparse_linear(x, w, v, r, c, bias=v), r"expected \[2\], the out of w"),
    "crow": (lambda x, w, v, r, c: pk.ops.sparse_linear(x, w, v, r[1:], c), r"expected \[3\], and \[nnz\]"),
    "vals": (lambda x, w, v, r, c: pk.ops.sparse_linear(x, w, v[1:], r, c), r"expected \(3,\)"),
    "index": (lambda x, w, v, r, c: pk.ops.sparse_linear(x, w, v, r.int(), c), "both int32 or both int64"),
    "device": (lambda x, w, v, r, c: pk.ops.sparse_linear(x, w, v.to("meta"), r, c), "move them to one device"),
    "y": (lambda x, w, v, r, c: pk.ops.sparse_add(w, x, v, r, c), r"expected \[..., out\] and \[..., in\]"),
    "dy": (lambda x, w, v, r, c: pk.ops.sddmm(w, x, r, c), r"expected \[..., out\] and \[..., in\]"),
    "dvals": (lambda x, w, v, r, c: pk.ops.sddmm_add_(v[1:], x[:, :2], x, r, c), "one for each entry"),
    "idx": (lambda x, w, v, r, c: pk.ops.sparse_scatter_(w, c[1:], v), r"expected \[nnz\] both"),
    "places": (lambda x, w, v, r, c: pk.ops.sparse_scatter_(w, v, v), "expected int32 or int64"),
    "stash": (lambda x, w, v, r, c: pk.ops.sparse_swap_(w, c, v.half()), "the same dtype"),
    "of w": (lambda x, w, v, r, c: pk.ops.sparse_swap_(w, c.to("meta"), v), "move them to one"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    call, message = BAD[case]
    crow, col = torch.tensor([0, 1, 3]), torch.tensor([1, 0, 4])
    with pytest.raises(ValueError, match=message):
        call(torch.randn(6, 5), torch.randn(2, 5), torch.randn(3), crow, col)
