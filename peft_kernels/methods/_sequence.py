"""Rows in front of a sequence: masks, positions and outputs of a model that sees `l` more than its caller."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CACHE = "past_key_values"


def seen_by(mask: Any, l: int, rows: int, causal: bool, cache: Any) -> Any:
    """An attention mask with l columns more in front, which everyone sees, and `rows` (0 or l) rows of their own.

    mask: None, [batch, keys], [batch, heads, queries, keys] (bool, or added to the scores), or a mapping to such.
    causal: the new rows see each other backwards alone, else all keys that any row sees.   cache: a static one has no
    more columns, and its masks may stop at its length, which counts P already.
    """
    if mask is None:
        return None
    if isinstance(mask, Mapping):
        return {key: seen_by(value, l, rows, causal, cache) for key, value in mask.items()}
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"a prompt got the attention mask {shape}; expected [batch, keys] or four dimensions")
    if mask.dim() == 2:
        return F.pad(mask, (l, 0), value=1)[:, : static(cache)]
    added = mask.is_floating_point()
    no = torch.finfo(mask.dtype).min if added else 0
    out = F.pad(mask, (l, 0), value=0.0 if added else 1)
    if rows and mask.shape[2] > 1:
        own = (out.amax(2, keepdim=True) if added else out.any(2, keepdim=True)).expand(-1, -1, rows, -1)
        out = torch.cat([own, out], dim=2)
    width = static(cache)
    if width is not None:
        out = out[..., :width]
    if causal and (rows or width is not None):
        before = 0 if rows or cache is None else cache.get_seq_length()
        queries, keys = (torch.arange(n, device=mask.device) for n in out.shape[2:])
        out = out.masked_fill(keys > queries[:, None] + before, no)
    return out


def numbered(mask: Tensor, rows: int) -> Tensor:
    """Positions [batch, rows] of the last rows under a mask [batch, keys]: from 0 at its first one."""
    return (torch.arange(mask.shape[1], device=mask.device) - leading(mask)).clamp(min=0)[:, -rows:]


def moved(mask: Tensor, l: int, rows: int) -> Tensor:
    """Where P comes behind the padding on the left of a mask [batch, n], and the text: index [batch, l + n] into
    [P; x], whose inverse is `rest`."""
    at, j = leading(mask), torch.arange(l + rows, device=mask.device)
    return torch.where(j < at, j + l, torch.where(j < at + l, j - at, j))


def rest(mask: Tensor, l: int, rows: int) -> Tensor:
    """The places [batch, n] of the text in what `moved` made."""
    j = torch.arange(rows, device=mask.device)
    return torch.where(j < leading(mask), j, j + l)


def indented(mask: Any) -> bool:
    """Whether there may be zeros on the left of a mask [batch, n]."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return False
    return torch.compiler.is_compiling() or not bool(mask[:, 0].all())  # a graph serves every mask


def leading(mask: Tensor) -> Tensor:
    """How many zeros each row of a mask [batch, keys] begins with, [batch, 1]."""
    return (mask != 0).to(torch.int64).cumsum(1).eq(0).sum(1, keepdim=True)


def take(t: Tensor, places: slice | Tensor, dim: int) -> Tensor:
    """The places of `t` along `dim`: a slice, or an index [batch, n] for each row."""
    if isinstance(places, slice):
        return t[(slice(None),) * dim + (places,)]
    shape = [1] * t.dim()
    shape[0], shape[dim] = places.shape
    return t.gather(dim, places.view(shape).expand(*(-1 if i in (0, dim) else n for i, n in enumerate(t.shape))))


def shortened(out: Any, queries: slice | Tensor, keys: slice | Tensor, pooler: nn.Module | None) -> Any:
    """The output of a transformers model with these places alone: of all states, and of the keys in its attentions."""
    changed: dict[str, Any] = {"last_hidden_state": take(out.last_hidden_state, queries, 1)}
    if pooler is not None and getattr(out, "pooler_output", None) is not None:
        changed["pooler_output"] = pooler(changed["last_hidden_state"])
    if getattr(out, "hidden_states", None) is not None:
        changed["hidden_states"] = tuple(take(h, queries, 1) for h in out.hidden_states)
    for name, own in (("attentions", keys), ("cross_attentions", slice(None))):
        if getattr(out, name, None) is not None:
            weights = getattr(out, name)
            changed[name] = tuple(w if w is None else take(take(w, queries, 2), own, 3) for w in weights)
    return dataclasses.replace(cast(Any, out), **changed)


def filled(out: Any, rows: int) -> Any:
    """An output of `rows` rows, the first of which are zeros."""
    last = out[0] if isinstance(out, (tuple, Mapping)) else out
    last = F.pad(last, (0, 0, rows - last.shape[1], 0))
    if isinstance(out, Mapping):
        return dataclasses.replace(cast(Any, out), last_hidden_state=last)
    return (last, *out[1:]) if isinstance(out, tuple) else last


def remembered(mask: Tensor, more: int, lengths: Tensor | None) -> Tensor:
    """A mask [batch, n] for encoder states that have `more` rows in front.

    lengths [batch]: how many of these are a prompt's, None: all; they follow the padding on the left of the text.
    """
    if mask.dim() != 2:
        raise ValueError(f"a prompt got the encoder's attention mask {tuple(mask.shape)}; expected [batch, states]")
    if not more:
        return mask
    end, j = leading(mask) + more, torch.arange(mask.shape[1] + more, device=mask.device)
    own = (j < end) & (j >= end - (more if lengths is None else lengths[:, None]))
    return F.pad(mask, (more, 0)).masked_fill(own, 1)


def static(cache: Any) -> int | None:
    """The keys that a static cache has room for; None of one that grows."""
    layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", ())
    sizes = [layer.max_cache_len for layer in layers if hasattr(layer, "max_cache_len")]
    return max(sizes) if sizes else None


def make_room(cache: Any, l: int, n: int, window: int | None) -> None:
    """Makes a static cache that is empty still l longer.

    RuntimeError if it has been made and is too short for l more than n tokens, or has no more than a window.
    """
    for layer in getattr(getattr(cache, "self_attention_cache", cache), "layers", ()):
        size = getattr(layer, "max_cache_len", None)
        if size is None:
            continue
        if not layer.is_initialized:
            layer.max_cache_len = size = size + l
        if size < l + n or layer.is_sliding and window is not None and size > window:
            raise RuntimeError(
                f"a static cache of {size} has no room for {n} tokens and a prompt of {l}"
                f"{f' in a window of {window}' if layer.is_sliding else ''}; use a dynamic cache, or a longer one"
            )
