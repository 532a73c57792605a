"""What nvcc makes of a CUDA kernel, read from the PTX: no GPU is needed, and none runs it."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"
CAPABILITIES = ("80", "86", "89", "90", "90a", "100", "120")
MARKS = [pytest.mark.slow, pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc on this machine")]


def nvcc(source, out, *options):
    """Compiles csrc/<source>.cu into the file `out` and returns what was said on the way."""
    command = ["nvcc", "-std=c++17", "-O3", "-I", CSRC, *options, "-o", out, CSRC / f"{source}.cu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


def ptx(source, capability, folder):
    """Kernel -> its PTX. There was no warning, no product is rounded to TF32, and no array is outside of registers."""
    out = folder / "kernels.ptx"
    said = nvcc(source, out, f"-arch=compute_{capability}", "-ptx")
    assert not said.strip(), said
    found = dict(re.findall(r"\.entry (\w+)\((.*?)\n\}", out.read_text(), re.S))
    for name, text in found.items():
        assert "tf32" not in text, name
        assert "__local_depot" not in text, f"{name} has an array outside of registers"
    return found
