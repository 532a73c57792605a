"""The random numbers of one call of an op."""

from __future__ import annotations

import torch
from torch import Tensor


def seeds(x: Tensor) -> Tensor:
    """rng for an op on x: drawn by torch's generator, so that seeds, checkpointing and compile all see the draw."""
    return torch.randint(-(2**62), 2**62, (2,), device=x.device)
