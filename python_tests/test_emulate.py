"""CUDA kernels on the CPU: each primitive of the emulation does what the device does, and faults are seen."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import emulation
import pytest
import torch

import peft_kernels as pk
from peft_kernels.ops._op import recording

if not emulation.compiler():
    pytest.skip("no C++ compiler on this machine", allow_module_level=True)

FAULTS = {
    "early_return": r"thread \(\d+, 0, 0\) of block \(0, 0, 0\) waits in __syncthreads .*thread \(5, 0, 0\).* returned",
    "different": "comes to __sh?(yncwarp|fl_sync) while others wait in __sh?(yncwarp|fl_sync)",
    "half_a_warp": "waits in __shfl_sync .*, but thread .* waits in __syncthreads",
    "misaligned": r"device.cuh:\d+: a misaligned access",
    "overflow": r"emulated.cu:\d+: a signed sum overflows",
    "shift": r"emulated.cu:\d+: a shift by a negative number or by too many bits",
    "index": r"emulated.cu:\d+: an index beyond the array",
    "beyond": "a thread wrote at byte 128 of the 128 bytes of shared memory",
    "before": "a thread wrote at byte -4 of the 128 bytes of shared memory",
    "apart": "async_copy of 16 bytes that are not aligned to 16",
}


@pytest.fixture(scope="module")
def cuda():
    library = ctypes.CDLL(str(emulation.build([Path(__file__).with_name("emulated.cu")])))

    def call(name, *args):
        function = getattr(library, name)
        function.restype = ctypes.c_char_p
        given = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else ctypes.c_int(a) for a in args]
        if (error := function(*given)) is not None:
            raise RuntimeError(error.decode())

    call.library = library
    return call


@pytest.mark.parametrize(("name", "dtype"), [("round_bf16", torch.bfloat16), ("round_f16", torch.float16)])
def test_conversions_are_those_of_torch(cuda, name, dtype):
    """Every 16-bit value, the middles between neighbours, and random bits."""
    values = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).float()
    finite = values[values.isfinite()].sort().values
    bits = torch.randint(-(2**31), 2**31, (5000,), dtype=torch.int64).to(torch.int32).view(torch.float32)
    x = torch.cat([values, (finite[1:].double() + finite[:-1].double()).div(2).float(), bits])
    narrowed, widened = torch.empty(len(x), dtype=dtype), torch.empty(len(x))
    cuda(name, x, narrowed, widened, len(x))
    real = ~x.isnan()
    assert torch.equal(narrowed[real].view(torch.int16), x[real].to(dtype).view(torch.int16))
    assert torch.equal(widened[real], narrowed[real].float())
    assert narrowed[~real].isnan().all()
    assert widened[~real].isnan().all()


def test_shuffles(cuda):
    x, out = torch.randn(64), torch.empty(4, 64)
    cuda("shuffle", x, out)
    warps = x.view(2, 32)
    torch.testing.assert_close(out[0].view(2, 32), warps.sum(1, keepdim=True).expand(2, 32))
    assert torch.equal(out[1].view(2, 32), warps.amax(1, keepdim=True).expand(2, 32))
    assert torch.equal(out[2].view(2, 32), warps.flip(1))
    assert torch.equal(out[3], torch.arange(64.0))


@pytest.mark.parametrize("kind", [0, 1, 2], ids=["f32", "bf16", "f16"])
def test_mma_is_a_matrix_product(cuda, kind):
    """Small whole numbers, so that every sum is exact."""
    a, b, c = (torch.randint(-9, 10, size).float() for size in ((16, 16), (16, 8), (16, 8)))
    expected = c + a @ b
    cuda("mma", a, b, c, kind)
    assert torch.equal(c, expected)


def test_a_missing_barrier_shows(cuda):
    """Shared memory is NaN before a block, and in some block the reader comes before the writer."""
    x, y, unsafe = torch.randn(16, 128), torch.empty(16, 128), torch.zeros(16, 128)
    cuda("reverse", x, y, 16, True)
    assert torch.equal(y, x.flip(1))
    cuda("reverse", x, unsafe, 16, False)
    assert unsafe.isnan().any()


def test_copies_come_when_they_are_waited_for(cuda):
    x, y, late = torch.randn(4, 2, 128), torch.empty(4, 2, 128), torch.zeros(4, 2, 128)
    cuda("copies", x, y, 4, 3, False)
    assert torch.equal(y[:3], x[:3])
    assert not y[3].any()
    cuda("copies", x, late, 4, 3, True)
    assert torch.equal(late[:3, 0], x[:3, 0])
    assert late[:, 1].isnan().all()


def test_matrices_are_transposed_into_registers(cuda):
    matrices, out = torch.arange(256, dtype=torch.int16), torch.empty(4, 8, 4, 2, dtype=torch.int16)
    cuda("transposed", matrices, out)
    rows = matrices.view(4, 4, 2, 8)  # lane 4 g + q has of each matrix rows 2q and 2q + 1, column g
    assert torch.equal(out, rows.permute(0, 3, 1, 2))


def test_counters_of_a_block_and_of_all(cuda):
    x, total = torch.randint(0, 1000, (5, 128), dtype=torch.int32), torch.tensor([2**40, 0, 1])
    expected = total + torch.stack([x[:, i::3].sum() for i in range(3)])
    cuda("counted", x, total)
    assert torch.equal(total, expected)


@pytest.mark.parametrize("size", [1, 2, 8])
def test_clusters_read_each_other(cuda, size):
    x, y = torch.randint(0, 50, (3, size, 64)).float(), torch.empty(3, size, 64)
    cuda("cluster", x, y, 3, size, True, True)
    assert torch.equal(y, x.sum(1, keepdim=True) + 1000 * torch.arange(size)[:, None])
    for sync, last in ((False, True), (True, False)):  # read before it is written, and after its block has ended
        unsafe = torch.zeros_like(y)
        cuda("cluster", x, unsafe, 3, size, sync, last)
        assert unsafe.isnan().any() == (size > 1)


def test_clusters_can_be_absent(cuda, monkeypatch):
    assert cuda.library.clusters_here()
    monkeypatch.setenv("PEFT_KERNELS_EMULATED_CLUSTERS", "0")
    assert not cuda.library.clusters_here()


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_an_error_that_names_the_thread(cuda, name):
    x = torch.ones(64)
    cuda("fault", 0, x)
    with pytest.raises(RuntimeError, match=rf"^.*emulated.cu:\d+: .*{FAULTS[name]}"):
        cuda("fault", 1 + list(FAULTS).index(name), x)
    cuda("fault", 0, x)  # the next launch is a fresh one


@pytest.mark.parametrize(
    ("launch", "said"),
    [
        ((0, 32, 0), r"a grid of \(0, 1, 1\) blocks"),
        ((1, 1056, 0), r"a block of \(1056, 1, 1\)"),
        ((1, 32, 300000), "300000 bytes"),
    ],
)
def test_a_launch_that_no_device_takes(cuda, launch, said):
    with pytest.raises(RuntimeError, match=said):
        cuda("grid", *launch)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU")
def test_a_cuda_kernel_serves_cpu_tensors_when_asked_for_by_name():
    args = (torch.randn(5, 3), torch.randn(3))
    with pk.backend("cuda"), recording() as record:
        assert torch.equal(pk.ops.rescale(*args), args[0] * args[1])
    assert [row["backend"] for row in record] == ["cuda"]
    assert pk.ops.all_ops()["rescale"].explain(*args)["backend"] == "cpu"


@pytest.mark.slow
def test_no_access_outside_of_tensors():
    """Forward and backward of every CUDA kernel under AddressSanitizer, which ends the process at the first fault."""
    found = [
        subprocess.run(
            [*emulation.compiler(), f"-print-file-name={name}"], capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    if not all(map(os.path.isabs, found)):
        pytest.skip("the compiler has no AddressSanitizer")
    environment = {name: value for name, value in os.environ.items() if name != "PEFT_KERNELS_EMULATED"} | {
        "EMULATED_FLAGS": "-fsanitize=address --param asan-stack=0",
        "LD_PRELOAD": " ".join(found),
        "ASAN_OPTIONS": "detect_leaks=0:use_sigaltstack=0:quarantine_size_mb=16",
    }
    files = (
        Path(__file__).parent / name for name in ("test_ops.py", "ops/test_sparse_cuda.py", "ops/test_hadamard_cuda.py")
    )
    laws = [*files, "-k", "cuda-cpu and (test_error or test_gradient_is) or nowhere"]
    command = [sys.executable, "-m", "pytest", "-q", "-s", *laws]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
