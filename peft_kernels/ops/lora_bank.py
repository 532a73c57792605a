"""What the ops of many adapters are called with: the bank of their factors, and which rows go to which adapter."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .lora import dropout_of

Bank = Tensor | Sequence[Tensor]
FACTORS = "Tensor a, Tensor bt, Tensor r_indptr, Tensor scaling, Tensor ids, Tensor? plan, int r_max"


def checked(op, x, n, a_flat, bt_flat, r_indptr, scaling, ids, p, rng, plan, r_max, slices=1) -> tuple:
    """The arguments behind x as the ops take them; n is the width of the output, of all `slices` together."""
    k, m = x.shape[-1], math.prod(x.shape[:-1])
    listed = not isinstance(a_flat, Tensor)
    a = torch.cat(list(a_flat)) if listed and len(a_flat) else x.new_empty(0, k) if listed else a_flat
    bt = torch.cat([b.T for b in bt_flat]) if listed and len(bt_flat) else x.new_empty(0, n) if listed else bt_flat
    if bt.shape[1:] != (n,) or a.shape != (slices * len(bt), k):
        s = f"{slices} * " if slices > 1 else ""
        raise ValueError(
            f"{op}: a_flat {tuple(a.shape)} and bt_flat {tuple(bt.shape)} do not fit; expected [{s}R, {k}] and "
            f"[R, {n}], or lists of a [{s}r, {k}] and b [{n}, r]"
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
    if plan is not None:
        block_m = plan.shape[1] - 1 if plan.dim() == 2 else 0
        if block_m < 1 or plan.dtype != torch.int32 or len(plan) != -(-m // block_m) + min(len(scaling), m):
            raise ValueError(
                f"{op}: plan is {plan.dtype} {tuple(plan.shape)}, no plan of {m} rows and {len(scaling)} adapters; "
                "make it by lora_plan of the same ids, one for each row"
            )
    if any(t.device != x.device for t in (a, bt, r_indptr, scaling, ids, *(() if plan is None else (plan,)))):
        raise ValueError(f"{op}: x is on {x.device}; move the bank, r_indptr, scaling, ids and plan there")
    widest = max((len(f) // slices for f in a_flat), default=0) if listed else 0
    r_max = (widest if listed else len(bt)) if r_max is None else r_max
    if r_max < widest or r_max < 0:
        raise ValueError(f"{op}: r_max is {r_max}; expected at least the rank of every adapter, {widest} here")
    p, rng = dropout_of(op, x, p or 0.0, rng)
    return a, bt, r_indptr, scaling, ids, plan, min(r_max, len(bt)), p, rng
