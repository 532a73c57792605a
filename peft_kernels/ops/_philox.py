"""Dropout whose mask is a function of (seed, offset, row, column) alone: the same on every backend, also in backward.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). Key = the seed's two 32-bit halves,
counter = (column // 8, row, offset low, offset high); the four output words are eight 16-bit numbers for eight
neighbouring columns, low half first. A value is kept iff its number is >= threshold(p).
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def threshold(p: float) -> int:
    """p in units of 1/65536; what is kept is scaled by 65536 / (65536 - threshold), so the mean is exact."""
    return round(p * 65536)


def keep_scale(p: float) -> float:
    """The factor of the kept values (0 when none is kept)."""
    dropped = threshold(p)
    return 65536 / (65536 - dropped) if dropped < 65536 else 0.0


def draw(device: torch.device | str) -> Tensor:
    """A fresh rng = int64[2] (seed, offset) from torch's generator of that device."""
    return torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=device)


def words(rng: Tensor, rows: int, groups: int, first: int = 0) -> list[Tensor]:
    """Philox4x32-10: four int64 tensors [rows, groups] holding 32-bit words, of the groups from `first`."""
    k0, k1 = rng[0] & _LOW, (rng[0] >> 32) & _LOW
    c0 = torch.arange(first, first + groups, device=rng.device).expand(rows, groups)
    c1 = torch.arange(rows, device=rng.device)[:, None].expand(rows, groups)
    c2 = (rng[1] & _LOW).expand(rows, groups)
    c3 = ((rng[1] >> 32) & _LOW).expand(rows, groups)
    for _ in range(10):
        # int64 products wrap around; their bits are those of the unsigned 64-bit product all the same.
        even, odd = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((odd >> 32) & _LOW) ^ c1 ^ k0, odd & _LOW, ((even >> 32) & _LOW) ^ c3 ^ k1, even & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return [c0, c1, c2, c3]


def keep_mask(rng: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """bool [rows, columns]: True where a value is kept."""
    w = torch.stack(words(rng, rows, (columns + 7) // 8), dim=-1)  # [rows, groups, 4]
    uniform = torch.stack((w & 0xFFFF, w >> 16), dim=-1).flatten(1)  # [rows, groups * 8]
    return uniform[:, :columns] >= threshold(p)


def dropout(x: Tensor, p: float, rng: Tensor | None) -> Tensor:
    """x [..., columns] with dropped values exactly 0 (also where x is not finite) and kept ones scaled."""
    if p == 0 or rng is None:
        return x
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    keep = keep_mask(rng, rows, x.shape[-1], p).view(x.shape)
    return torch.where(keep, x * keep_scale(p), torch.zeros((), dtype=x.dtype, device=x.device))
