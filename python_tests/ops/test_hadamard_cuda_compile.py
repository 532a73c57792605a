"""What nvcc makes of the CUDA kernels of the Hadamard ops, from the PTX and from ptxas; no GPU is needed."""

import re

import pytest
from nvcc import CAPABILITIES, MARKS, nvcc, ptx

pytestmark = MARKS


every_source = pytest.mark.parametrize(("source", "kernels"), [("hadamard_cuda", 29), ("fastfood_cuda", 22)])


@every_source
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_ptx(capability, source, kernels, tmp_path):
    """Only whole numbers are counted by atomics, whose order then does not matter."""
    found = ptx(f"hadamard/{source}", capability, tmp_path)
    assert len(found) == kernels
    for name, text in found.items():
        atomics = re.findall(r"\b(?:atom|red)\.\S*", text)
        assert bool(atomics) == ("Binned" in name), name
        assert all(re.search(r"shared\S*\.u32$", a) for a in atomics), (name, atomics)


@every_source
@pytest.mark.parametrize("capability", ["80", "90"])
def test_registers(capability, source, kernels, tmp_path):
    """64 at most, so that 1024 threads are on an SM, and none in memory."""
    said = nvcc(f"hadamard/{source}", tmp_path / "hadamard.o", f"-arch=sm_{capability}", "-Xptxas", "-v", "-c")
    assert all(int(n) <= 64 for n in re.findall(r"Used (\d+) registers", said))
    spilled = re.findall(r"(\d+) bytes spill stores", said)
    assert len(spilled) == kernels
    assert set(spilled) == {"0"}
