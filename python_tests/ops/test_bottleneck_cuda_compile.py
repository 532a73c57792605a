"""What nvcc makes of the bottleneck's CUDA kernels, read from the PTX: no GPU is needed, and none runs it."""

import re

import pytest
from nvcc import CAPABILITIES, MARKS, ptx

pytestmark = MARKS


@pytest.mark.parametrize(("source", "kernels"), [("bottleneck_cuda", 25), ("bottleneck_backward_cuda", 15)])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_ptx(capability, source, kernels, tmp_path):
    """Tensor cores multiply all but float32; clusters are in the kernel of one launch alone; nothing is atomic."""
    found = ptx(f"bottleneck/{source}", capability, tmp_path)
    assert len(found) == kernels
    clusters = int(capability.rstrip("a")) >= 90
    for name, text in found.items():
        assert not re.search(r"\b(?:atom|red)\.", text), name
        assert ("mma.sync" in text) != ("kernelIff" in name), name
        assert ("barrier.cluster" in text) == (clusters and "cluster_kernel" in name), name
        assert ("prefetch.global.L2" in text) == ("cluster_kernel" in name), name
