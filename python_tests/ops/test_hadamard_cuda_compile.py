"""What nvcc makes of the CUDA kernels of the Hadamard ops, from the PTX and from ptxas; no GPU is needed."""

import re

import pytest
from nvcc import CAPABILITIES, MARKS, nvcc, ptx

pytestmark = MARKS


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_ptx(capability, tmp_path):
    """Only whole numbers are counted by atomics, whose order then does not matter."""
    found = ptx("hadamard/hadamard_cuda", capability, tmp_path)
    assert len(found) == 48
    for name, text in found.items():
        atomics = re.findall(r"\b(?:atom|red)\.\S*", text)
        assert bool(atomics) == ("Binned" in name), name
        assert all(re.search(r"shared\S*\.u32$", a) for a in atomics), (name, atomics)


@pytest.mark.parametrize("capability", ["80", "90"])
def test_registers(capability, tmp_path):
    """64 at most, so that 1024 threads are on an SM, and none in memory."""
    said = nvcc("hadamard/hadamard_cuda", tmp_path / "hadamard.o", f"-arch=sm_{capability}", "-Xptxas", "-v", "-c")
    assert all(int(n) <= 64 for n in re.findall(r"Used (\d+) registers", said))
    spilled = re.findall(r"(\d+) bytes spill stores", said)
    assert len(spilled) == 48
    assert set(spilled) == {"0"}
