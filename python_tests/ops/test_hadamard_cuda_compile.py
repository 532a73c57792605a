"""What nvcc makes of the CUDA kernels of the Hadamard ops, from the PTX and from ptxas; no GPU is needed."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc on this machine")]


def _nvcc(out, *options):
    command = ["nvcc", "-std=c++17", "-O3", "-I", CSRC, *options, "-o", out, CSRC / "hadamard/hadamard_cuda.cu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize("capability", ["80", "86", "89", "90", "90a", "100", "120"])
def test_ptx(capability, tmp_path):
    """Only whole numbers are counted by atomics, whose order then does not matter."""
    out = tmp_path / "hadamard.ptx"
    said = _nvcc(out, f"-arch=compute_{capability}", "-ptx")
    assert not said.strip(), said  # no warning either
    found = dict(re.findall(r"\.entry (\w+)\((.*?)\n\}", out.read_text(), re.S))
    assert len(found) == 48
    for name, text in found.items():
        atomics = re.findall(r"\b(?:atom|red)\.\S*", text)
        assert bool(atomics) == ("Binned" in name), name
        assert all(re.search(r"shared\S*\.u32$", a) for a in atomics), (name, atomics)
        assert "__local_depot" not in text, f"{name} has an array outside of registers"


@pytest.mark.parametrize("capability", ["80", "90"])
def test_registers(capability, tmp_path):
    """64 at most, so that 1024 threads are on an SM, and none in memory."""
    said = _nvcc(tmp_path / "hadamard.o", f"-arch=sm_{capability}", "-Xptxas", "-v", "-c")
    assert all(int(n) <= 64 for n in re.findall(r"Used (\d+) registers", said))
    spilled = re.findall(r"(\d+) bytes spill stores", said)
    assert len(spilled) == 48
    assert set(spilled) == {"0"}
