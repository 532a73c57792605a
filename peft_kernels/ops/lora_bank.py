"""What the ops of many adapters are called with: the bank of their factors, and which rows go to which adapter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .lora import dropout_of

Bank = Tensor | Sequence[Tensor]


class Plan(NamedTuple):
    """The rows of a batch by adapter, in tiles of at most block_m rows; int64.

    perm [M]: the rows in the order of their adapters, those of none last.
    tile_adapter, tile_start, tile_len [T]: tile i is perm[start : start + len]; adapter -1, 0 and 0 where it is unused.
    """

    perm: Tensor
    tile_adapter: Tensor
    tile_start: Tensor
    tile_len: Tensor


def lora_plan(ids: Tensor, r_indptr: Tensor, block_m: int = 64) -> Plan:
    """Rows in tiles of one adapter each, as a GPU kernel takes them (none does yet): a stable sort, made on the device.

    ids int [M]   r_indptr int [L + 1]; sizes follow from shapes alone: T = ceil(M / block_m) + min(L, M). One plan
    serves all layers of a step. Adapters of rank 0 get no tiles.
    """
    m, adapters = len(ids), len(r_indptr) - 1
    numbers = torch.arange(adapters + 1, device=ids.device)
    ranks = torch.cat([r_indptr.diff(), r_indptr.new_zeros(1)])  # the last stands for no adapter
    key = torch.where((ids >= 0) & (ids < adapters), ids, adapters).long()
    key = torch.where(ranks[key] > 0, key, adapters)
    ordered, perm = key.sort(stable=True)
    start = torch.searchsorted(ordered, numbers)  # the first row of each adapter, of none the number of all others
    tiles = (start.diff() + block_m - 1) // block_m
    end = tiles.cumsum(0)
    tile = torch.arange(-(-m // block_m) + min(adapters, m), device=ids.device)
    owner = torch.searchsorted(end, tile, right=True)
    used = owner < adapters
    first = torch.cat([end - tiles, end.new_zeros(1)])[owner]
    tile_start = torch.where(used, start[owner] + (tile - first) * block_m, 0)
    stop = torch.cat([start[1:], start.new_zeros(1)])[owner]
    tile_len = torch.where(used, (stop - tile_start).clamp(max=block_m), 0)
    return Plan(perm, torch.where(used, owner, -1), tile_start, tile_len)


def checked(op, x, n, a_flat, bt_flat, r_indptr, scaling, ids, p, rng, plan) -> tuple:
    """The arguments behind x as the ops take them; n is the width of the output."""
    k, m = x.shape[-1], math.prod(x.shape[:-1])
    listed = not isinstance(a_flat, Tensor)
    a = torch.cat(list(a_flat)) if listed and len(a_flat) else x.new_empty(0, k) if listed else a_flat
    bt = torch.cat([b.T for b in bt_flat]) if listed and len(bt_flat) else x.new_empty(0, n) if listed else bt_flat
    if a.shape[1:] != (k,) or bt.shape != (len(a), n):
        raise ValueError(
            f"{op}: a_flat {tuple(a.shape)} and bt_flat {tuple(bt.shape)} do not fit; expected [R, {k}] and [R, {n}], "
            f"or lists of a [r, {k}] and b [{n}, r]"
        )
    if a.dtype != bt.dtype:
        raise ValueError(f"{op}: a_flat is {a.dtype} and bt_flat {bt.dtype}; give both the same dtype")
    whole = (torch.int32, torch.int64)
    if r_indptr.dtype not in whole or ids.dtype not in whole:
        raise ValueError(f"{op}: r_indptr is {r_indptr.dtype} and ids {ids.dtype}; expected int32 or int64")
    if scaling.dim() != 1 or r_indptr.shape != (len(scaling) + 1,) or (listed and len(a_flat) != len(scaling)):
        given = f", {len(a_flat)} adapters are listed" if listed else ""
        raise ValueError(
            f"{op}: scaling is {tuple(scaling.shape)}, r_indptr {tuple(r_indptr.shape)}{given}; "
            "expected [L], [L + 1] and L"
        )
    if x.dim() > 2 and ids.shape == x.shape[:1] != (m,):
        ids = ids.repeat_interleave(math.prod(x.shape[1:-1]), output_size=m)
    if ids.shape != (m,):
        raise ValueError(
            f"{op}: ids is {tuple(ids.shape)}; expected one for each of the {m} rows or of x's leading dim"
        )
    if plan is not None and plan[0].shape != ids.shape:
        raise ValueError(f"{op}: the plan is for {len(plan[0])} rows, x has {m}; make it by lora_plan of the same ids")
    if any(t.device != x.device for t in (a, bt, r_indptr, scaling, ids)):
        raise ValueError(f"{op}: x is on {x.device}; move the bank, r_indptr, scaling and ids there")
    p, rng = dropout_of(op, x, p or 0.0, rng)
    return a, bt, r_indptr, scaling, ids, p, rng
