"""Rows in front of a sequence: masks, positions and outputs of a model that sees `l` more than its caller."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CACHE = "past_key_values"


def seen_by(mask: Any, l: int, rows: int, causal: bool, width: int | None) -> Any:  # noqa: E741
    """An attention mask with l columns more in front, which everyone sees, and `rows` (0 or l) rows of their own.

    mask: None, [batch, keys], [batch, heads, queries, keys] (bool, or added to the scores), or a mapping to such.
    causal: the new rows see each other backwards alone, else all keys that any row sees.   width: of a static cache,
    which has no more columns.
    """
    if mask is None:
        return None
    if isinstance(mask, Mapping):
        return {key: seen_by(value, l, rows, causal, width) for key, value in mask.items()}
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"a prompt got the attention mask {shape}; expected [batch, keys] or four dimensions")
    if mask.dim() == 2:
        return F.pad(mask, (l, 0), value=1)
    added = mask.is_floating_point()
    yes, no = (0.0, torch.finfo(mask.dtype).min) if added else (1, 0)
    out = F.pad(mask, (l, 0), value=yes)
    if rows and mask.shape[2] > 1:
        if causal:
            own = torch.full((rows, out.shape[-1]), no, dtype=mask.dtype, device=mask.device)
            own[:, :l] = torch.where(own.new_ones(rows, l, dtype=torch.bool).tril(), own.new_full((), yes), own[:, :l])
            own = own.expand(*mask.shape[:2], *own.shape)
        else:
            own = out.amax(2, keepdim=True) if added else out.any(2, keepdim=True)
            own = own.expand(-1, -1, rows, -1)
        out = torch.cat([own, out], dim=2)
    return out if width is None else out[..., :width]


def numbered(mask: Tensor, rows: int) -> Tensor:
    """Positions [batch, rows] of the last rows under a mask [batch, keys]: from 0 at its first one."""
    lead = (mask != 0).to(torch.int64).cumsum(1).eq(0).sum(1, keepdim=True)
    return (torch.arange(mask.shape[1], device=mask.device) - lead).clamp(min=0)[:, -rows:]


def shortened(out: Any, l: int, rows: int, pooler: nn.Module | None) -> Any:  # noqa: E741
    """The output of a transformers model without its first `rows` (0 or l) rows, and l keys in its attentions."""
    changed: dict[str, Any] = {}
    if rows:
        changed["last_hidden_state"] = out.last_hidden_state[:, rows:]
        if pooler is not None and getattr(out, "pooler_output", None) is not None:
            changed["pooler_output"] = pooler(changed["last_hidden_state"])
        if getattr(out, "hidden_states", None) is not None:
            changed["hidden_states"] = tuple(h[:, rows:] for h in out.hidden_states)
    for name, keys in (("attentions", l), ("cross_attentions", 0)):
        if getattr(out, name, None) is not None:
            changed[name] = tuple(a if a is None else a[:, :, rows:, keys:] for a in getattr(out, name))
    return dataclasses.replace(cast(Any, out), **changed) if changed else out


def room(cache: Any, l: int, rows: int) -> int | None:  # noqa: E741
    """Makes a static cache that is still empty l longer; its length, or None of a cache that grows.

    RuntimeError if it has been made and is too short for l more.
    """
    lengths = []
    for layer in getattr(getattr(cache, "self_attention_cache", cache), "layers", ()):
        if hasattr(layer, "max_cache_len") and not layer.is_sliding:
            if not layer.is_initialized:
                layer.max_cache_len += l
            elif layer.max_cache_len < l + rows:
                raise RuntimeError(
                    f"a static cache of {layer.max_cache_len} is too short for {rows} tokens behind a prompt of {l}; "
                    f"make one of {l + rows} and what is to be generated"
                )
            lengths.append(layer.max_cache_len)
    return max(lengths, default=None)
