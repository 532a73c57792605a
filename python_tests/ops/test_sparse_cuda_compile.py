"""What nvcc makes of the CUDA kernels of sparse training, read from the PTX: no GPU is needed, and none runs it."""

import re

import pytest
from nvcc import CAPABILITIES, MARKS, ptx

pytestmark = MARKS


@pytest.mark.parametrize(("source", "kernels"), [("sparse_cuda", 15), ("sparse_select_cuda", 10)])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_ptx(capability, source, kernels, tmp_path):
    """Only whole numbers are counted by atomics, whose order then does not matter; tensor cores multiply 16 bits."""
    found = ptx(f"sparse/{source}", capability, tmp_path)
    assert len(found) == kernels
    for name, text in found.items():
        atomics = re.findall(r"\b(?:atom|red)\.\S*", text)
        assert bool(atomics) == ("topk_count" in name), name
        assert all(re.search(r"\.[us](32|64)$", a) for a in atomics), name
        tile = re.search(r"sddmm_kernelILb([01])E(f|N)", name)
        assert ("mma.sync" in text) == ("ldmatrix" in text) == bool(tile and tile[2] == "N"), name
        assert ("cp.async.cg" in text) == bool(tile and tile[1] == "1"), name
