"""NF4's products on AMX tiles, which few machines have: the same source with emulated tiles, held to the law."""

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch
from emulation import CSRC, compiler

import peft_kernels as pk
from peft_kernels.check import compare
from peft_kernels.ops import nf4

LEVEL = [
    *("-mavx2", "-mfma", "-mf16c", "-mbmi2", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
    *("-mavx512bf16", "-mavx512vbmi"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if "avx512_bf16" not in flags or not compiler():
        pytest.skip("needs a CPU with avx512_bf16, for what is beside the tiles, and a compiler")
    out = tmp_path_factory.mktemp("tiles") / "tiles.so"
    sources = [CSRC / "nf4/nf4_linear_cpu.cpp", Path(__file__).parent / "tiles.cpp"]
    options = ["-std=c++17", "-O1", "-w", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off"]
    command = [*compiler(), *options, f"-I{CSRC}", "-DPK_ISA=amx", "-DPK_EMULATE", *LEVEL, *sources, "-o", out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(out))


def pointer(t):
    return ctypes.c_void_p(t.data_ptr())


# rows of x; N and K: whole tiles, some over, less than one; the second slab and chunk of sums; more rows than a chunk
SHAPES = [(16, 48, 256), (33, 50, 328), (70, 200, 96), (13, 17, 33), (40, 300, 64), (530, 64, 64), (129, 16, 544)]


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("r", [0, 5])
def test_products_on_tiles(library, m, n, k, r):
    made = torch.Generator().manual_seed(m + n + k)
    x, w, g = (torch.randn(s, generator=made) for s in ((m, k), (n, k), (m, n)))
    x, g = x.bfloat16(), g.bfloat16()
    u, forward, back = (torch.randn(s, generator=made) for s in ((m, r), (n, r), (r, k)))
    packed, absmax = pk.ops.quantize_nf4(w, 64)
    y, dx = torch.empty(m, n, dtype=torch.bfloat16), torch.empty(m, k, dtype=torch.bfloat16)
    sizes = [ctypes.c_int64(size) for size in (m, n, k)]
    weights = (pointer(packed), ctypes.c_int64(6), pointer(absmax))
    library.linear(*sizes, pointer(x), *weights, pointer(u), pointer(forward), ctypes.c_int64(r), pointer(y))
    library.dgrad(*sizes, pointer(g), *weights, pointer(u), pointer(back), ctypes.c_int64(r), pointer(dx))

    def expected(dtype):
        dense = nf4.weight(packed, absmax, (n, k), 64, torch.bfloat16, None, None, None, 256).to(dtype)
        terms = u.to(dtype)
        return x.to(dtype) @ dense.T + 0.5 * terms @ forward.to(dtype).T, g.to(dtype) @ dense + terms @ back.to(dtype)

    plain, truth = expected(torch.bfloat16), expected(torch.float64)
    for what, out, *wanted in zip(("y", "dx"), (y, dx), plain, truth, strict=True):
        _, wrong = compare(out, *wanted)
        assert not wrong, f"{what}: {wrong}"
