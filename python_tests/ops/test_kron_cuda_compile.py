"""What nvcc makes of the CUDA kernels of Kronecker products, read from the PTX: no GPU is needed, and none runs it."""

import re

import pytest
from nvcc import CAPABILITIES, MARKS, ptx

pytestmark = MARKS


@pytest.mark.parametrize(("source", "kernels"), [("kron_cuda", 12), ("kron_factors_cuda", 11)])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_ptx(capability, source, kernels, tmp_path):
    """Tensor cores multiply 16 bits, x comes by asynchronous copies where it is aligned, and sums lie in registers."""
    found = ptx(f"kron/{source}", capability, tmp_path)
    assert len(found) == kernels
    for name, text in found.items():
        assert not re.search(r"\b(?:atom|red)\.", text), name
        product = re.search(r"kron_(?:linear|factors)_kernelILb([01])E", name)
        assert ("mma.sync" in text) == bool(product), name
        assert ("cp.async.cg" in text) == bool(product and product[1] == "1"), name
        assert ("ldmatrix" in text) == ("factors_kernel" in name), name
