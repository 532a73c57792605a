"""Whether autocast is on, and work that it leaves alone."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def autocasting(device: torch.device) -> bool:
    """Whether autocast is on for a device's tensors; it does not know the meta device."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def exact(device: torch.device) -> AbstractContextManager:
    """Within the `with`, nothing on the device is rounded by autocast."""
    return torch.autocast(device.type, enabled=False) if autocasting(device) else nullcontext()
