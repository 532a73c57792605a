"""What references and costs of several ops need of a tensor."""

from __future__ import annotations

import math

from torch import Tensor


def as_rows(x: Tensor) -> Tensor:
    """x [..., n] as [M, n], also where nothing is in it."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def nbytes(*tensors: Tensor | None) -> int:
    """Of all together; None has none."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
