"""What was compiled: build facts, the CPU levels, and the rule that CUDA sources stand without torch."""

import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import peft_kernels

ROOT = Path(__file__).resolve().parents[1]
LEVELS = ["baseline", "avx2", "avx512", "avx512_bf16", "amx"]
CUDA_SOURCES = sorted(ROOT.glob("csrc/**/*.cu"))

needs_binary = pytest.mark.skipif(
    not list(Path(peft_kernels.__file__).parent.glob("_C.*.so")), reason="installed without compiled kernels"
)


def python(code, **env):
    """Run code in a new process: the level is chosen once per process."""
    env = {name: value for name, value in os.environ.items() if name != "PEFT_KERNELS_CPU_ISA"} | env
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


@functools.cache
def highest_level():
    return LEVELS.index(python("from peft_kernels import _C; print(_C.cpu_isa())").stdout.strip())


def test_the_package_under_test_is_this_checkout():
    # A regular install on the same path shadows an editable one, and the tests would then test old code.
    assert Path(peft_kernels.__file__).resolve().is_relative_to(ROOT)


def test_every_kernel_folder_is_a_package():
    # A folder without __init__.py imports from a checkout and is missing from the wheel.
    assert {path.parent for path in ROOT.glob("csrc/**/*.py")} == {p.parent for p in ROOT.glob("csrc/**/__init__.py")}


@needs_binary
def test_build_info():
    from peft_kernels import _C
    from peft_kernels._version import __version__

    info = _C.build_info()
    assert info["version"] == __version__
    assert info["torch_target"] == "2.10"
    assert re.match(r"\d+\.\d+", info["torch_built_with"])
    assert re.match(r"\w+ \d+", info["compiler"])
    assert info["isas"] in (LEVELS, ["baseline"])
    assert info["cuda"] is None or (info["cuda"]["version"] and info["cuda"]["archs"])


@needs_binary
@pytest.mark.parametrize("level", LEVELS)
def test_every_level_of_this_machine_runs(level):
    if LEVELS.index(level) > highest_level():
        pytest.skip(f"this machine has no {level}")
    # One op in 16 bit with an odd width, so that the level's conversions and tails run.
    done = python(
        f"""
import torch, peft_kernels
from pathlib import Path
from peft_kernels import _C
assert _C.cpu_isa() == "{level}"
torch.ops.load_library(str(Path(peft_kernels.__file__).parent / "libpeft_kernels_ops.so"))
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    x, g, l = (torch.randn(s).to(dtype) for s in ((67, 53), (67, 53), (53,)))
    assert torch.equal(torch.ops._peft_kernels.rescale(x, l), x * l)
    dx, dl = torch.ops._peft_kernels.rescale_backward(g, x, l, True, True)
    assert torch.equal(dx, g * l)
    torch.testing.assert_close(dl.double(), (g.double() * x.double()).sum(0), atol=1e-2, rtol=1e-2)
""",
        PEFT_KERNELS_CPU_ISA=level,
    )
    assert done.returncode == 0, done.stderr


@needs_binary
def test_an_unusable_level_is_an_error_that_names_the_choices():
    ask = "from peft_kernels import _C; _C.cpu_isa()"
    choices = ", ".join(LEVELS[: highest_level() + 1])
    for level in ("sse9", *LEVELS[highest_level() + 1 :]):
        done = python(ask, PEFT_KERNELS_CPU_ISA=level)
        assert done.returncode != 0
        assert f"ValueError: PEFT_KERNELS_CPU_ISA={level}" in done.stderr
        assert choices in done.stderr


@needs_binary
def test_every_16_bit_value_survives_a_kernel():
    import torch

    torch.ops.load_library(str(Path(peft_kernels.__file__).parent / "libpeft_kernels_ops.so"))
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).reshape(256, 256)
        y = torch.ops._peft_kernels.rescale(x, torch.ones(256))
        assert torch.equal(x.isnan(), y.isnan())
        assert torch.equal(x[~x.isnan()].view(torch.int16), y[~y.isnan()].view(torch.int16))


@pytest.mark.parametrize("source", CUDA_SOURCES, ids=lambda path: path.stem)
def test_cuda_sources_stand_without_torch(source):
    """They include no torch header, directly or through ours: csrc alone on the include path is enough."""
    if not shutil.which("nvcc"):
        pytest.skip("no nvcc on this machine")
    done = nvcc("-M", source)
    assert done.returncode == 0, done.stderr
    headers = done.stdout.split()
    assert any("csrc/common/" in header for header in headers)
    assert not [header for header in headers if re.search(r"/(torch|ATen|c10)/", header)]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc on this machine")
@pytest.mark.parametrize("source", CUDA_SOURCES, ids=lambda path: path.stem)
def test_cuda_sources_compile(source, tmp_path):
    archs = [word for n in ("80", "90a") for word in ("-gencode", f"arch=compute_{n},code=sm_{n}")]
    done = nvcc(*archs, "-c", source, "-o", tmp_path / "out.o")
    assert done.returncode == 0, done.stderr


def nvcc(*words):
    return subprocess.run(["nvcc", "-std=c++17", "-I", ROOT / "csrc", *words], capture_output=True, text=True)


def test_without_the_binary_everything_runs_and_says_so_once():
    code = """
import warnings
import torch
import peft_kernels.kernels.common.library as library
library.NAME = "absent.so"
import peft_kernels as pk
model, x = torch.nn.Sequential(torch.nn.Linear(4, 4)), torch.randn(2, 4)
expected = model(x)
pk.attach(model, pk.LoRA(rank=2), ("0",))
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for _ in range(2):
        assert torch.allclose(model(x), expected)
        model(x).sum().backward()
assert len(seen) == 1, [str(w.message) for w in seen]
assert "pip install --no-build-isolation" in str(seen[0].message)
assert {r["backend"] for r in pk.explain(model)} == {"reference"}
assert "not built" in pk.explain(model)[0]["reasons"]["cpu"]
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@needs_binary
@pytest.mark.parametrize("level", LEVELS)
def test_every_instruction_set_gives_the_reference(level):
    """Each build of a kernel source, as far as this machine can run it, over the samples of every contract."""
    if LEVELS.index(level) > highest_level():
        pytest.skip(f"this CPU has no {level}")
    code = """
import torch
from torch.utils._pytree import tree_leaves
import peft_kernels as pk
for op in pk.ops.all_ops().values():
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
        for sample in op.samples(dtype, "cpu"):
            with pk.backend("cpu"):
                outs = op.run(*sample.args)
            plain = op.reference(*sample.args)
            for out, expected in zip(tree_leaves(outs), tree_leaves(plain), strict=True):
                scale = expected.abs().max().item() if expected.numel() else 0.0
                torch.testing.assert_close(out, expected, atol=tolerance * max(scale, 1.0), rtol=tolerance)
"""
    done = python(code, PEFT_KERNELS_CPU_ISA=level)
    assert done.returncode == 0, done.stderr
