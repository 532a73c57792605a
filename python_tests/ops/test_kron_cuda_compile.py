"""What nvcc makes of the CUDA kernels of Kronecker products, read from the PTX: no GPU is needed, and none runs it."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc on this machine")]


@pytest.mark.parametrize(("source", "kernels"), [("kron_cuda", 12), ("kron_factors_cuda", 11)])
@pytest.mark.parametrize("capability", ["80", "86", "89", "90", "90a", "100", "120"])
def test_ptx(capability, source, kernels, tmp_path):
    """Tensor cores multiply 16 bits, x comes by asynchronous copies where it is aligned, and sums lie in registers."""
    out = tmp_path / "kron.ptx"
    command = ["nvcc", "-std=c++17", "-O3", f"-arch=compute_{capability}", "-I", CSRC, "-ptx", "-o", out]
    done = subprocess.run([*command, CSRC / f"kron/{source}.cu"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr.strip(), done.stderr  # no warning either
    found = dict(re.findall(r"\.entry (\w+)\((.*?)\n\}", out.read_text(), re.S))
    assert len(found) == kernels
    for name, text in found.items():
        assert not re.search(r"\b(?:atom|red)\.", text), name
        assert "tf32" not in text, name
        assert "__local_depot" not in text, f"{name} has an array outside of registers"
        product = re.search(r"kron_(?:linear|factors)_kernelILb([01])E", name)
        assert ("mma.sync" in text) == bool(product), name
        assert ("cp.async.cg" in text) == bool(product and product[1] == "1"), name
        assert ("ldmatrix" in text) == ("factors_kernel" in name), name
