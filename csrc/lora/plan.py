"""Which rows a kernel of many adapters takes together: the plan of a batch, made on the device."""

from __future__ import annotations

import torch
from torch import Tensor


def plan(ids: Tensor, r_indptr: Tensor, block_m: int) -> Tensor:
    """Rows in tiles of one adapter each, int32 [T, 1 + block_m]; T = ceil(M / block_m) + min(L, M).

    ids int [M]   r_indptr int [L + 1]. Column 0 is the adapter of the tile, L where it is unused, and rises; the others
    are its rows, rising from tile to tile of an adapter too, -1 where there are none.
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
    owner = torch.searchsorted(end, tile, right=True)  # [T], L where all adapters have ended
    first = torch.cat([end - tiles, end.new_zeros(1)])[owner]
    stop = torch.cat([start[1:], start.new_zeros(1)])[owner]  # 0 for no adapter: none of its rows is in a tile
    place = (start[owner] + (tile - first) * block_m)[:, None] + torch.arange(block_m, device=ids.device)
    rows = torch.where(place < stop[:, None], perm[place.clamp(max=m - 1)], -1)
    return torch.cat([owner[:, None], rows], 1).int()
