"""Serving: LoRA of many adapters written into the output of the base layer, or of several layers of one input.

With S slices y = [y_1 ... y_S] side by side, of widths slice_n, such as q, k, v or gate, up:

    y_s,i += scaling[l] (x_i A_l,s^T) Bt_l,s        l = ids[i]

The adapters of all slices have the ranks that r_indptr counts. bt_flat [R, sum slice_n] has the columns of the slices
side by side. a_flat [S R, K] has for each adapter its ranks of slice 1, then those of slice 2, and so on: rows
S r_indptr[l] + s r_l to S r_indptr[l] + (s + 1) r_l are A_l,s, r_l = r_indptr[l + 1] - r_indptr[l]. x is read once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ._autocast import exact
from ._op import Op, Sample, write
from .lora_bank import FACTORS, Bank
from .multi_lora import _add, _add_args, _add_reference, _cost, _layouts


def _reference(y, x, a, bt, r_indptr, scaling, ids, plan, r_max, slice_n):
    rank = torch.arange(len(bt), dtype=r_indptr.dtype, device=bt.device)
    owner = torch.searchsorted(r_indptr, rank, right=True) - 1
    first, own = r_indptr[owner] * (len(slice_n) - 1) + rank, r_indptr.diff()[owner]  # of slice 0
    parts = zip(y.split(list(slice_n), -1), bt.split(list(slice_n), 1), strict=True)
    rest = r_indptr, scaling, ids, plan, r_max, 0.0, None
    return torch.cat([_add_reference(p, x, a[first + s * own], b, *rest) for s, (p, b) in enumerate(parts)], -1)


def _samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    for name, tensors, (a, *rest) in _layouts(dtype, device):
        n = rest[0].shape[1]
        slice_n = [n // 2, n - n // 2 - n // 4, n // 4]
        a = torch.cat([a, a.flip(0) / 2, a.flip(1)])
        yield Sample(name, (tensors["y"], tensors["x"], a, *rest[:-2], slice_n))


_apply = Op(
    "lora_apply",
    f"(Tensor y, Tensor x, {FACTORS}, int[] slice_n) -> Tensor",
    family="lora",
    reference=_reference,
    samples=_samples,
    cost=lambda y, x, *bank: _cost(bank, 1, (y, y, x)),
)


def lora_apply_(
    y: Tensor,
    x: Tensor,
    a_flat: Bank,
    bt_flat: Bank,
    r_indptr: Tensor,
    scaling: Tensor,
    ids: Tensor,
    *,
    slice_n: Sequence[int] | None = None,
    plan: Tensor | None = None,
    r_max: int | None = None,
) -> None:
    """`multi_lora_add` written into y, for inference; arguments as there. RuntimeError if a gradient is asked for.

    slice_n: the widths of several outputs side by side in y [..., sum slice_n], each with factors of its own. With S
        of them, bt_flat is [R, sum slice_n] and a_flat [S * R, in]: S * r_l rows for each adapter, those of its first
        slice before those of its second; r_indptr and r_max count the ranks of one slice. As lists, a [S * r, in] and
        b [sum slice_n, r].
    """
    widths = list(slice_n or (y.shape[-1],))
    if min(widths) < 1 or sum(widths) != y.shape[-1]:
        raise ValueError(f"lora_apply_: slice_n is {widths}; expected widths that add up to the {y.shape[-1]} of y")
    rest = None, None, plan, r_max, len(widths)
    args = _add_args("lora_apply_", y, x, a_flat, bt_flat, r_indptr, scaling, ids, *rest)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (y, x, *args[:2])):
        raise RuntimeError("lora_apply_ has no gradient; call it under torch.no_grad(), or multi_lora_linear")
    with exact(y.device):  # or y is rounded, and with it the rows that have no adapter
        out = _add.call_(y, x, *args) if len(widths) == 1 else _apply.call_(y, x, *args[:-2], widths)
    write(y, out)
