"""What nvcc makes of NF4's CUDA kernels, read from the PTX: no GPU is needed, and none runs it."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc on this machine")]


@pytest.mark.parametrize("source", ["nf4_cuda", "nf4_linear_cuda"])
@pytest.mark.parametrize("capability", ["80", "90"])
def test_ptx(capability, source, tmp_path):
    """Sums are deterministic, which an atomic would end, and scales of the second level round twice."""
    out = tmp_path / "nf4.ptx"
    command = ["nvcc", "-std=c++17", "-O3", f"-arch=compute_{capability}", "-I", CSRC, "-ptx", "-o", out]
    done = subprocess.run([*command, CSRC / f"nf4/{source}.cu"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr.strip(), done.stderr  # no warning either
    kernels = dict(re.findall(r"\.entry (\w+)\((.*?)\n\}", out.read_text(), re.S))
    assert len(kernels) >= 15
    for name, text in kernels.items():
        assert not re.search(r"\b(atom|red)\.", text), name
        assert "tf32" not in text, name
        assert "__local_depot" not in text, f"{name} has an array outside of registers"
        products = re.search(r"nf4_(linear|dgrad)_kernel", name)
        # Tensor cores multiply all but fp32, whose operands lanes hand each other.
        fp32 = re.search(r"kernelILb[01]Ef", name)
        assert ("mma.sync" in text) == bool(products and not fp32), name
        if products or "dequantize" in name:
            assert "mul.rn.f32" in text and "add.rn.f32" in text, name
