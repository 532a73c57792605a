"""What nvcc makes of NF4's CUDA kernels, read from the PTX: no GPU is needed, and none runs it."""

import re

import pytest
from nvcc import MARKS, ptx

pytestmark = MARKS


@pytest.mark.parametrize("source", ["nf4_cuda", "nf4_linear_cuda"])
@pytest.mark.parametrize("capability", ["80", "90"])
def test_ptx(capability, source, tmp_path):
    """Sums are deterministic, which an atomic would end, and scales of the second level round twice."""
    kernels = ptx(f"nf4/{source}", capability, tmp_path)
    assert len(kernels) >= 15
    for name, text in kernels.items():
        assert not re.search(r"\b(atom|red)\.", text), name
        products = re.search(r"nf4_(linear|dgrad)_kernel", name)
        # Tensor cores multiply all but fp32, whose operands lanes hand each other.
        fp32 = re.search(r"kernelILb[01]Ef", name)
        assert ("mma.sync" in text) == bool(products and not fp32), name
        if products or "dequantize" in name:
            assert "mul.rn.f32" in text and "add.rn.f32" in text, name
