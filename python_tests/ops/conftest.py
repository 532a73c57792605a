"""Tests of GPU kernels on a GPU: what they make is made on the CPU, for the same numbers everywhere, and sent there."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

MADE_BY = (
    torch.arange,
    torch.empty,
    torch.eye,
    torch.full,
    torch.linspace,
    torch.ones,
    torch.rand,
    torch.randint,
    torch.randn,
    torch.randperm,
    torch.tensor,
    torch.zeros,
)


class OnGPU(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        return made.cuda() if func in MADE_BY and "device" not in (kwargs or {}) else made


@pytest.fixture(autouse=True)
def _on_gpu(request):
    if request.node.get_closest_marker("gpu") and torch.cuda.is_available():
        with OnGPU():
            yield
    else:
        yield
