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
        if func not in MADE_BY or "device" in (kwargs or {}):
            return made
        return made.detach().cuda().requires_grad_(made.requires_grad)  # still a leaf


@pytest.fixture(autouse=True)
def _on_gpu(request):
    if request.node.get_closest_marker("gpu"):
        with OnGPU():
            yield
    else:
        yield
