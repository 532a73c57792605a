"""What nvcc makes of LoRA's CUDA kernels, read from the PTX: no GPU is needed, and none runs it."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc on this machine")]


@pytest.mark.parametrize(("capability", "clusters"), [("80", False), ("90", True)])
def test_ptx(capability, clusters, tmp_path):
    """Plain sm_90 is enough for clusters; and sums are deterministic, which an atomic would end."""
    out = tmp_path / "lora.ptx"
    command = ["nvcc", "-std=c++17", "-O3", f"-arch=compute_{capability}", "-I", CSRC, "-ptx", "-o", out]
    done = subprocess.run([*command, CSRC / "lora/lora_cuda.cu"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr.strip(), done.stderr  # no warning either
    kernels = dict(re.findall(r"\.entry (\w+)\((.*?)\n\}", out.read_text(), re.S))
    assert len(kernels) > 40
    for name, text in kernels.items():
        assert not re.search(r"\b(atom|red)\.", text), name
        assert "tf32" not in text, name
        assert "__local_depot" not in text, f"{name} has an array outside of registers"
        # Tensor cores multiply all but fp32 by fp32, whose operands lanes hand each other.
        fp32 = re.search(r"kernelI(Lb[01]E)?ff|wgrad_kernelILb[01]Ef|lora_sum", name)
        assert ("mma.sync" in text) != bool(fp32), name
        assert ("barrier.cluster" in text) == (clusters and "lora_decode" in name), name
