"""The Triton kernels compile for real GPUs, on a machine that has none.

A child process, where Triton does not interpret, runs them on CPU tensors under a driver that only names a target: each
launch compiles exactly what a GPU of that target would run, down to the cubin, and stops there.
"""

import itertools
import json
import os
import re
import subprocess
import sys

import pytest

SMEM = 99 * 1024  # the most a block may have on sm_86 and sm_89, the smallest of the GPUs served
MARKS = {
    "mma": r"mma\.sync|wgmma",
    "tf32": "tf32",
    "atomic": r"\b(atom|red)\.(?!\S*\.add\.[us](32|64)\b)",  # sums of integers are the same in any order
    "pipelined": r"cp\.async",
    "fma": r"\bfma\.",
    "approximate": r"\bdiv\.(full|approx)|\brcp\.approx",
}


def _lora(dtype, adapter, m, k, n, r):
    """One adapter. Dropout is in x's kernels and not in g's, so one p compiles both."""
    import torch

    from peft_kernels.kernels.lora import lora_triton

    x, y = torch.empty(m, k, dtype=dtype), torch.empty(m, n, dtype=dtype)
    a, b = torch.empty(r, k, dtype=adapter), torch.empty(n, r, dtype=adapter)
    rng = torch.tensor([1, 2])
    t = lora_triton.add_(y, x, a, b, 2.0, 0.1, rng)
    lora_triton.backward_(torch.empty_like(x), y, x, a, b, t, 2.0, 0.1, rng, True, True)


def _lora_by_plan(dtype, adapter, m, k, n, r):
    """Four adapters, rows by a plan."""
    import torch

    from peft_kernels.kernels.lora import lora_triton
    from peft_kernels.kernels.lora.plan import plan

    x, y, rng = torch.empty(m, k, dtype=dtype), torch.empty(m, n, dtype=dtype), torch.tensor([1, 2])
    ids = torch.arange(m, dtype=torch.int32) % 4
    bank = (
        torch.empty(4 * r, k, dtype=adapter),
        torch.empty(4 * r, n, dtype=adapter),
        torch.arange(5) * r,
        torch.ones(4),
    )
    args = (x, *bank, ids, plan(ids, bank[2], 64 if r == 16 else 16), r, 0.1, rng)
    lora_triton.multi_add_(y, *args)
    lora_triton.multi_backward_(torch.empty_like(x), y, *args, True, True)
    if dtype == adapter == torch.bfloat16 and r == 16:
        lora_triton.apply_(y, x, bank[0].repeat(2, 1), *args[2:-2], [n // 2, n // 2])


def _nf4(dtype, adapter, m, k, n, r, blocksize, nested):
    """Quantised, read back, and a linear layer, forward and backward."""
    import torch

    from peft_kernels.kernels.nf4 import nf4_triton

    x, g, rng = torch.empty(m, k, dtype=dtype), torch.empty(m, n, dtype=dtype), torch.tensor([1, 2])
    a, b, bias = (torch.empty(s, dtype=adapter) for s in ((r, k), (n, r), (n,)))
    packed, absmax = nf4_triton.quantize_nf4(torch.empty(n, k, dtype=dtype), blocksize)
    second = (None, None, None, 256)
    if nested:
        code = torch.empty(256)
        q, absmax, offset = nf4_triton.quantize_absmax(absmax, code, 256)
        second = (q, code, offset, 256)
        nf4_triton.dequantize_absmax(q, absmax, code, offset, 256)
    else:
        nf4_triton.nf4_linear(x, packed, absmax, n, blocksize, bias, *second)
    nf4_triton.dequantize_nf4(packed, absmax, (n, k), blocksize, dtype, *second)
    lora = (a, b, 2.0, bias, 0.1, rng)
    _, t = nf4_triton.nf4_lora_linear(x, packed, absmax, n, blocksize, *lora, *second)
    lora = (a, b, t, 2.0, 0.1, rng)
    nf4_triton.nf4_lora_linear_backward(g, x, packed, absmax, blocksize, *lora, *second, (True, True, True))


def _sparse(dtype, low, t, n, m, nnz):
    """Products with a delta, its gradient, of many entries and of few, single elements; then what trains it."""
    import torch

    from peft_kernels.kernels.sparse import sparse_triton

    idx = torch.arange(nnz, dtype=torch.int32) * (m * n // nnz)
    crow = torch.searchsorted(idx, torch.arange(m + 1, dtype=torch.int32) * n).int()
    x, y, w = (torch.empty(s, dtype=dtype) for s in ((t, n), (t, m), (m, n)))
    delta = torch.empty(nnz, dtype=low), crow, idx % n
    sparse_triton.sparse_linear(x, w, *delta, None)
    sparse_triton.sparse_linear(x[:1], w, *delta, None)
    sparse_triton.sparse_linear_dx(y, w, *delta, n)
    sparse_triton.sparse_add_(y, x, *delta)
    sparse_triton.sddmm(y, x, *delta[1:])
    few = torch.arange(m + 1, dtype=torch.int32).clamp(max=m // 64)
    sparse_triton.sddmm(y, x, few, torch.arange(m // 64, dtype=torch.int32))
    sparse_triton.sparse_scatter_(w, idx, delta[0], 1.0, True)
    sparse_triton.sparse_scatter_(w.T, idx.long(), delta[0], 1.0, False)
    sparse_triton.sparse_swap_(w, idx, delta[0].to(dtype))
    for use_abs in (True, False):
        threshold, _, _ = sparse_triton.topk_threshold(nnz, use_abs, w, x)
        sparse_triton.topk_compact(threshold, nnz, use_abs, w, x)
    f = torch.empty(m, n, dtype=low)
    sparse_triton.fisher_accum_(f, w, 1.0, False)
    sparse_triton.fisher_linear_(f, y, x, torch.tensor([0, t // 3, t]), torch.empty(2))
    sparse_triton.fisher_linear_(f, y, x, torch.tensor([0, t], dtype=torch.int32), None)
    vals, step = torch.empty(nnz), torch.tensor(3.0)
    for base in ((w, idx), (None, None)):
        sparse_triton.sparse_adamw_(vals, vals, vals, vals.to(low), step, *base, 0.1, 0.9, 0.999, 1e-8, 0.1)
    alpha, group, rng = torch.empty(m, n, dtype=low), torch.empty((), dtype=low), torch.tensor([1, 2])
    for noise in (rng, None):
        sparse_triton.hard_concrete(w, alpha, alpha, group, noise)
        sparse_triton.hard_concrete_backward(w, alpha, alpha, group, noise, (True, True, True))


def _kron(dtype, low, m, p, q, r, s):
    """Products with a Kronecker product, their gradients, sums of four, and one in place."""
    import torch

    from peft_kernels.kernels.kron import kron_triton

    x, y, a, b = (torch.empty(shape, dtype=dtype) for shape in ((m, p * r), (m, q * s), (p, q), (r, s)))
    a, b, bias = a.to(low), b.to(low).T.contiguous().T, torch.empty(q * s, dtype=low)
    kron_triton.kron_linear(x, a, b, None, 2.0)
    kron_triton.kron_linear_add_(y, x, a, b, bias, 2.0)
    kron_triton.kron_linear_backward(y, x, a, b, 2.0, (True, True, True))
    terms = a.expand(4, p, q), b.expand(4, r, s)
    w = kron_triton.kron_sum_weight(*terms, 2.0)
    kron_triton.kron_sum_weight_backward(w, *terms, 2.0, (True, True))
    kron_triton.kron_add_(torch.empty(q * s, p * r, dtype=dtype), a.T, b.T, 1.0)


def _bottleneck(dtype, low, m, k, r):
    """With all there is, and without LayerNorm and gate."""
    import torch

    from peft_kernels.kernels.bottleneck import bottleneck_triton

    x, wd, wu = (torch.empty(shape, dtype=d) for shape, d in (((m, k), dtype), ((r, k), low), ((k, r), low)))
    ln, bd, rng = (torch.empty(k, dtype=low),) * 2, torch.empty(r, dtype=low), torch.tensor([1, 2])
    for act, parts, gate, eps, p in ((1, ln, torch.empty(m), 1e-5, 0.1), (2, (None, None), None, None, 0.0)):
        weights, constants = (*parts, wd, bd, wu, ln[0], gate), (act, 2.0, eps, p, rng if p else None)
        _, z, stats = bottleneck_triton.bottleneck(x, *weights, *constants)
        needs = [t is not None for t in (x, *weights)]
        bottleneck_triton.bottleneck_backward(x, x, *weights, z, stats, *constants, True, needs)


def _hadamard(dtype, low, rows, n, d, numel):
    """Rows of n, and Fastfood from d numbers to numel, forward and backward."""
    import torch

    from peft_kernels.kernels.hadamard import hadamard_triton

    hadamard_triton.fwht(torch.empty(rows, n, dtype=dtype), 1.0)
    padded = 1 << (max(numel, d) - 1).bit_length()
    theta, sign, base = torch.empty(d), torch.ones(d, dtype=torch.int8), torch.empty(numel, dtype=dtype)
    state = sign, torch.empty(padded, dtype=low), torch.empty(padded, dtype=torch.int16)
    hadamard_triton.fastfood(theta, *state, base, numel, 1.0)
    hadamard_triton.fastfood_backward(base, *state, 1.0)


def _rescale(dtype, low, m, n):
    """Rows of n by a vector, in place, and the gradients of both."""
    import torch

    from peft_kernels.kernels.rescale import rescale_triton

    x, l = torch.empty(m, n, dtype=dtype), torch.empty(n, dtype=low)
    rescale_triton.rescale_(x, l)
    for needs in ((True, True), (False, True)):
        rescale_triton.rescale_backward(x, x, l, needs)


# id: x's dtype, the adapter's dtype, M, K, N, r
LORA = {
    "fp32": ("float32", "float32", 512, 1024, 1024, 16),
    "bf16": ("bfloat16", "bfloat16", 512, 1024, 1024, 16),
    "mixed_fp16": ("float16", "float32", 512, 1024, 1024, 16),
    "wide_rank": ("bfloat16", "float32", 512, 1024, 1024, 200),
    "odd_decode": ("bfloat16", "bfloat16", 1, 100, 51, 3),
}
# and the block size, and whether the scales are quantised
NF4 = {
    "bf16": ("bfloat16", "bfloat16", 512, 1024, 1024, 16, 64, True),
    "fp32_odd_decode": ("float32", "float32", 1, 101, 51, 3, 4096, False),
}
# x's dtype, that of the values, tokens, in, out, entries
SPARSE = {
    "bf16": ("bfloat16", "float32", 512, 1024, 1024, 1 << 14),
    "fp32_odd_decode": ("float32", "float32", 1, 101, 51, 500),
    "fp16": ("float16", "float16", 100, 528, 272, 2000),
}
# x's dtype, that of the factors, rows, p, q, r, s
KRON = {
    "bf16": ("bfloat16", "bfloat16", 512, 64, 64, 64, 64),
    "fp32": ("float32", "float32", 512, 64, 64, 64, 64),
    "mixed": ("bfloat16", "float32", 512, 64, 64, 64, 64),
    "small_fp16": ("float16", "float16", 1000, 16, 24, 16, 32),
    "large": ("bfloat16", "float32", 512, 128, 96, 128, 128),
    "odd_decode": ("bfloat16", "float32", 1, 5, 7, 9, 3),
}
# x's dtype, that of the weights, rows, width, bottleneck
BOTTLENECK = {
    "bf16": ("bfloat16", "bfloat16", 16384, 1024, 64),
    "fp32": ("float32", "float32", 512, 1024, 64),
    "mixed": ("bfloat16", "float32", 2048, 1024, 48),
    "wide_fp16": ("float16", "float16", 512, 1024, 192),
    "odd_decode": ("bfloat16", "float32", 1, 101, 5),
}
# x's dtype, that of places, rows, their length, d, numbers that Fastfood makes
HADAMARD = {
    "bf16": ("bfloat16", "int16", 8, 16384, 1000, 1 << 20),
    "fp32": ("float32", "int32", 3, 4096, 5000, 1 << 24),
    "fp16_odd": ("float16", "int16", 3, 100, 40, 777),
}
# x's dtype, that of l, rows and their length
RESCALE = {
    "mixed": ("bfloat16", "float32", 2048, 4096),
    "fp32_odd": ("float32", "float32", 3, 77),
    "fp16": ("float16", "float16", 4096, 768),
}
LORA_KERNELS = {"lora_shrink_kernel", "lora_expand_kernel", "lora_wgrad_kernel"}
SPARSE_PRODUCTS = {"sparse_sddmm_kernel", "sparse_fisher_linear_kernel"}
SPARSE_EXACT = {"sparse_patch_kernel", "sparse_scatter_kernel", "sparse_swap_kernel"}
HADAMARD_KERNELS = {"hadamard_rows_kernel", "hadamard_bins_kernel"}
NF4_PRODUCT, NF4_EXACT = {"nf4_product_kernel"}, {"nf4_quantize_kernel", "nf4_dequantize_kernel"}
KRON_KERNELS = {"kron_linear_kernel"}
BOTTLENECK_LOOPS = {"bottleneck_down_kernel", "bottleneck_wgrad_kernel"}
# what launches, on which cases; kernels of products, those with a loop long enough to pipeline, those with exact bits
FAMILIES = {
    "lora": ((_lora, _lora_by_plan), LORA, LORA_KERNELS, LORA_KERNELS - {"lora_expand_kernel"}, set()),
    "nf4": ((_nf4,), NF4, NF4_PRODUCT, NF4_PRODUCT, NF4_EXACT),
    "kron": ((_kron,), KRON, KRON_KERNELS, KRON_KERNELS, set()),
    "bottleneck": ((_bottleneck,), BOTTLENECK, BOTTLENECK_LOOPS | {"bottleneck_up_kernel"}, BOTTLENECK_LOOPS, set()),
    "sparse": ((_sparse,), SPARSE, SPARSE_PRODUCTS, SPARSE_PRODUCTS, SPARSE_EXACT),
    "hadamard": ((_hadamard,), HADAMARD, HADAMARD_KERNELS, set(), set()),
    "rescale": ((_rescale,), RESCALE, set(), set(), {"rescale_kernel"}),
}


def compile_cases(capability: int, family: str, *names: str) -> None:
    """One JSON line per compiled kernel: case, kernel, shared memory and what its PTX holds."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    class Driver:
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", capability, 32))

    compiled = []
    launch = JITFunction.run

    def run(kernel, *args, grid, warmup, **options):
        if kernel.__name__.startswith(family):  # not those of another family
            compiled.append((kernel.__name__, launch(kernel, *args, grid=grid, warmup=True, **options)))

    triton.runtime.driver.set_active(Driver())
    JITFunction.run = run
    launches, cases, *_ = FAMILIES[family]
    for case, launch_all in itertools.product(names, launches):
        low, high, *sizes = cases[case]
        launch_all(getattr(torch, low), getattr(torch, high), *sizes)
        for name, kernel in compiled:
            ptx = kernel.asm["ptx"]
            found = [mark for mark, pattern in MARKS.items() if re.search(pattern, ptx)]
            found += ["contracts"] * kernel.metadata.enable_fp_fusion
            ok = bool(kernel.asm["cubin"]) and f".target sm_{capability}" in ptx
            print(json.dumps((case + launch_all.__name__, name, ok, kernel.metadata.shared, found)))
        compiled.clear()


# A quick test of what differs most, a slow one of every case.
@pytest.mark.parametrize(
    ("family", "capability", "cases"),
    [
        pytest.param("lora", 80, ("mixed_fp16", "odd_decode"), id="lora-80-quick"),
        pytest.param("nf4", 80, tuple(NF4), id="nf4-80"),
        pytest.param("sparse", 80, ("bf16", "fp32_odd_decode"), id="sparse-80-quick"),
        pytest.param("kron", 80, ("bf16", "odd_decode"), id="kron-80-quick"),
        pytest.param("hadamard", 80, ("fp16_odd",), id="hadamard-80-quick"),
        pytest.param("bottleneck", 80, ("odd_decode",), id="bottleneck-80-quick"),
        pytest.param("rescale", 80, ("mixed",), id="rescale-80-quick"),
        pytest.param("lora", 80, tuple(LORA), id="lora-80", marks=pytest.mark.slow),
        pytest.param("lora", 90, tuple(LORA), id="lora-90", marks=pytest.mark.slow),
        pytest.param("nf4", 90, tuple(NF4), id="nf4-90", marks=pytest.mark.slow),
        pytest.param("kron", 80, tuple(KRON), id="kron-80", marks=pytest.mark.slow),
        pytest.param("kron", 90, tuple(KRON), id="kron-90", marks=pytest.mark.slow),
        pytest.param("bottleneck", 80, tuple(BOTTLENECK), id="bottleneck-80", marks=pytest.mark.slow),
        pytest.param("bottleneck", 90, tuple(BOTTLENECK), id="bottleneck-90", marks=pytest.mark.slow),
        pytest.param("sparse", 80, tuple(SPARSE), id="sparse-80", marks=pytest.mark.slow),
        pytest.param("sparse", 90, tuple(SPARSE), id="sparse-90", marks=pytest.mark.slow),
        pytest.param("hadamard", 80, tuple(HADAMARD), id="hadamard-80", marks=pytest.mark.slow),
        pytest.param("hadamard", 90, tuple(HADAMARD), id="hadamard-90", marks=pytest.mark.slow),
        pytest.param("rescale", 80, tuple(RESCALE), id="rescale-80", marks=pytest.mark.slow),
        pytest.param("rescale", 90, tuple(RESCALE), id="rescale-90", marks=pytest.mark.slow),
    ],
)
def test_compiles_for(family, capability, cases, tmp_path):
    pytest.importorskip("triton")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path)
    words = [sys.executable, __file__, str(capability), family, *cases]
    child = subprocess.run(words, env=env, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    compiled = [json.loads(line) for line in child.stdout.splitlines()]
    launches, _, products, loops, exact = FAMILIES[family]
    for case in (case + launch.__name__ for case in cases for launch in launches):
        assert {name for at, name, *_ in compiled if at == case} >= products | exact, case
    for case, name, ok, shared, found in compiled:
        where = f"{case} {name}: {shared} bytes of shared memory, {found}"
        assert ok and shared <= SMEM, where
        assert not {"tf32", "atomic"} & set(found), where  # fp32 stays fp32, runs stay bit-identical
        if name in products:
            assert ("mma" in found) == (family == "hadamard" or not case.startswith("fp32")), where
        if name in loops and "odd_decode" not in case:
            assert "pipelined" in found, where  # loads are pipelined, which needs them to be vectors
        if name in exact:
            assert not {"fma", "approximate"} & set(found), where  # the bits of the reference
        assert family != "nf4" or "contracts" not in found, where  # scales of the second level round twice


if __name__ == "__main__":
    compile_cases(int(sys.argv[1]), *sys.argv[2:])
