"""Keys and values before those of attention, and the mask of both."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Prefix(NamedTuple):
    """Keys and values before an attention module's own: k, v [1 or rows, l, width], every row's l the same.

    mask [rows, l] bool: which of them a row has; None: all.   gate [rows, queries, 1]: a factor of both for each query.
    """

    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    gate: Tensor | None = None


def heads(flat: Tensor, like: Tensor) -> Tensor:
    """[1 or rows, l, width] -> [rows, heads, l, d] of keys or values."""
    rows, heads, _, d = like.shape
    if flat.shape[0] not in (1, rows):
        raise RuntimeError(f"a prefix of {flat.shape[0]} rows before keys of {rows}; route the whole batch alike")
    return flat.to(like.dtype).unflatten(-1, (heads, d)).transpose(1, 2).expand(rows, heads, flat.shape[1], d)


def extended(mask: Tensor | None, prefixes: tuple[Prefix, ...], query: Tensor, key: Tensor, name: str) -> Tensor | None:
    """The mask of keys that have the prefixes before them: bool, additive, or flash attention's of [rows, keys]."""
    if all(prefix.mask is None for prefix in prefixes):
        length = sum(prefix.k.shape[1] for prefix in prefixes)
        return (
            None if mask is None else F.pad(mask, (length, 0), value=1 if mask.dim() == 2 else mask.dtype == torch.bool)
        )
    rows = query.shape[0]
    front = torch.cat([_present(prefix, rows) for prefix in prefixes], dim=1)  # [rows, l]
    if "flash" in name:
        mask = front.new_ones(rows, key.shape[2]) if mask is None else mask
        return torch.cat([front.to(mask.dtype), mask], dim=1)
    if mask is None:
        mask = front.new_ones(1, 1, 1, key.shape[2])
    if mask.dtype == torch.bool and name == "eager":
        mask = _additive(mask, query.dtype)
    own = front[:, None, None] if mask.dtype == torch.bool else _additive(front[:, None, None], mask.dtype)
    _, heads, n, keys = mask.shape
    return torch.cat([own.expand(rows, heads, n, -1), mask.expand(rows, heads, n, keys)], dim=-1)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros((), dtype=dtype, device=mask.device).where(mask, torch.finfo(dtype).min)


def _present(prefix: Prefix, rows: int) -> Tensor:
    l = prefix.k.shape[1]
    return prefix.k.new_ones(rows, l, dtype=torch.bool) if prefix.mask is None else prefix.mask.expand(rows, l)


def apart(ts: list[Tensor], prefixes: tuple[Prefix, ...]) -> list[Tensor]:
    """Keys or values whose features are zeros but for a block of their own where a prefix has a gate.

    Beside a query q its copy g q finds that block: the logits are g q k, and the values come out beside the others'.
    """
    gates, made = [prefix.gate is not None for prefix in prefixes], []
    for i, t in enumerate(ts):
        place, d = sum(gates[: i + 1]) if i < len(gates) and gates[i] else 0, t.shape[-1]
        made.append(F.pad(t, (place * d, (sum(gates) - place) * d)))
    return made
