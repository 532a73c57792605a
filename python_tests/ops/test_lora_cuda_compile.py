"""What nvcc makes of LoRA's CUDA kernels, read from the PTX: no GPU is needed, and none runs it."""

import re

import pytest
from nvcc import MARKS, ptx

pytestmark = MARKS


@pytest.mark.parametrize(("capability", "clusters"), [("80", False), ("90", True)])
def test_ptx(capability, clusters, tmp_path):
    """Plain sm_90 is enough for clusters; and sums are deterministic, which an atomic would end."""
    kernels = ptx("lora/lora_cuda", capability, tmp_path)
    assert len(kernels) > 40
    for name, text in kernels.items():
        assert not re.search(r"\b(atom|red)\.", text), name
        # Tensor cores multiply all but fp32 by fp32, whose operands lanes hand each other.
        fp32 = re.search(r"kernelI(Lb[01]E)?ff|wgrad_kernelILb[01]Ef|lora_sum", name)
        assert ("mma.sync" in text) != bool(fp32), name
        assert ("barrier.cluster" in text) == (clusters and "lora_decode" in name), name
