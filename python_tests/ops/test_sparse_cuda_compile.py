"""What nvcc makes of the CUDA kernels of sparse training, read from the PTX: no GPU is needed, and none runs it."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc on this machine")]


@pytest.mark.parametrize(("source", "kernels"), [("sparse_cuda", 15), ("sparse_select_cuda", 10)])
@pytest.mark.parametrize("capability", ["80", "86", "89", "90", "90a", "100", "120"])
def test_ptx(capability, source, kernels, tmp_path):
    """Only whole numbers are counted by atomics, whose order then does not matter; tensor cores multiply 16 bits."""
    out = tmp_path / "sparse.ptx"
    command = ["nvcc", "-std=c++17", "-O3", f"-arch=compute_{capability}", "-I", CSRC, "-ptx", "-o", out]
    done = subprocess.run([*command, CSRC / f"sparse/{source}.cu"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr.strip(), done.stderr  # no warning either
    found = dict(re.findall(r"\.entry (\w+)\((.*?)\n\}", out.read_text(), re.S))
    assert len(found) == kernels
    for name, text in found.items():
        atomics = re.findall(r"\b(?:atom|red)\.\S*", text)
        assert bool(atomics) == ("topk_count" in name), name
        assert all(re.search(r"\.[us](32|64)$", a) for a in atomics), name
        assert "tf32" not in text, name
        assert "__local_depot" not in text, f"{name} has an array outside of registers"
        tile = re.search(r"sddmm_kernelILb([01])E(f|N)", name)
        assert ("mma.sync" in text) == ("ldmatrix" in text) == bool(tile and tile[2] == "N"), name
        assert ("cp.async.cg" in text) == bool(tile and tile[1] == "1"), name
