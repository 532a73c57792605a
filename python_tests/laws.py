"""What the tests of single backends share."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import peft_kernels as pk
from peft_kernels.check import DTYPES, compare, double

OPS = pk.ops.all_ops()
LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")
GPU = torch.cuda.is_available()  # without one, the kernels for it run on the CPU: Triton's interpreted, CUDA's emulated


def marks(op, backend):
    """Of tests of an op's kernels: `gpu` where they run on one, what is made in the test then too (ops/conftest.py)."""
    there = GPU and backend in ("triton", "cuda")
    here = backend in ("reference", *(kernel.name for kernel in OPS[op]._load("cuda" if there else "cpu")))
    skipped = pytest.mark.skipif(not here, reason=f"no {backend} kernels of {op} run here")
    return [skipped, pytest.mark.gpu] if there else [skipped]


def backends(op, *names):
    """Parameters: these, or reference and every kernel's."""
    if not names:
        kernels = [kernel.name for device in ("cpu", "cuda") for kernel in OPS[op]._load(device)]
        names = dict.fromkeys(("reference", *kernels))
    return [pytest.param(name, marks=marks(op, name)) for name in names]


def native(family):
    """The module of the CUDA kernels that run here."""
    name = f"peft_kernels.kernels.{family}.{family}_native"
    if GPU:
        return importlib.import_module(name)
    return importlib.import_module("peft_kernels.kernels.common.library").emulated(name)


def at_level(level, code, *args):
    """What code prints in a process of its own, where the CPU kernels are those of an instruction set."""
    tests = Path(__file__).resolve().parent
    found = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    paths = os.pathsep.join(map(str, (tests, tests / "ops", tests.parent, *found)))
    environment = {**os.environ, "PEFT_KERNELS_CPU_ISA": level, "PYTHONPATH": paths}
    checked = f"from peft_kernels import _C\nassert _C.cpu_isa() == {level!r}\n{code}"
    done = subprocess.run([sys.executable, "-c", checked, *args], capture_output=True, text=True, env=environment)
    if "is not a level of this machine" in done.stderr:
        pytest.skip(f"this machine has no {level}")
    assert done.returncode == 0, done.stderr
    return done.stdout


def equal(a, b):
    """The same bits, but for those of NaN."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def as_good(op, *args, backend="cuda"):
    """The outputs of the kernels, which must be as good as those of plain torch, and the same at a second run."""
    with pk.backend(backend):
        outs, again = OPS[op].run(*args), OPS[op].run(*args)
    plain, truth = OPS[op].reference(*args), OPS[op].reference(*double(args))
    outs, again, plain, truth = ([o] if isinstance(o, torch.Tensor) else o for o in (outs, again, plain, truth))
    for i, (o, other, p, t) in enumerate(zip(outs, again, plain, truth, strict=True)):
        assert torch.equal(o, other), f"output {i} of {op} differs from run to run"
        _, wrong = compare(o, p.to(o.dtype), t)
        assert not wrong, f"output {i} of {op}: {wrong}"
    return outs


def same_nf4_bits(backend, n, k, blocksize, dtype, magnitude, bad, blocksize2):
    """Bytes, scales, scales of scales and every number read back are the reference's; bad: one number of w, or None."""
    w = (torch.randn(n, k, generator=torch.Generator().manual_seed(n * 201 + k)) * magnitude).to(dtype)
    if bad is not None and n:
        w[n // 2, k // 2] = bad
    results = []
    for name in ("reference", backend):
        with pk.backend(name):
            results.append(_nf4_bits(w, blocksize, blocksize2))
    assert all(map(equal, *results))


def _nf4_bits(w, blocksize, blocksize2):
    code = pk.ops.dynamic_map()
    packed, absmax = pk.ops.quantize_nf4(w, blocksize)
    q, absmax2, offset = pk.ops.quantize_absmax(absmax, None, blocksize2)
    expanded = pk.ops.dequantize_absmax(q, absmax2, code, offset, blocksize2)
    nested = {"absmax_q": q, "code2": code, "offset": offset, "blocksize2": blocksize2}
    read = [pk.ops.dequantize_nf4(packed, absmax, w.shape, blocksize, d) for d in DTYPES]
    read.append(pk.ops.dequantize_nf4(packed, absmax2, w.shape, blocksize, w.dtype, **nested))
    return packed, absmax, q, absmax2, offset, expanded, *read
