"""Serving: LoRA of many adapters written into the output of the base layer."""

from __future__ import annotations

import torch
from torch import Tensor

from .lora_bank import Bank
from .multi_lora import _add, _add_args


def lora_apply_(
    y: Tensor,
    x: Tensor,
    a_flat: Bank,
    bt_flat: Bank,
    r_indptr: Tensor,
    scaling: Tensor,
    ids: Tensor,
    *,
    plan: Tensor | None = None,
    r_max: int | None = None,
) -> None:
    """`multi_lora_add` written into y, for inference. RuntimeError if a gradient is asked for."""
    args = _add_args("lora_apply_", y, x, a_flat, bt_flat, r_indptr, scaling, ids, None, None, plan, r_max)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (y, x, *args[:2])):
        raise RuntimeError("lora_apply_ has no gradient; call it under torch.no_grad(), or multi_lora_linear")
    out = _add.call_(y, x, *args)
    if out is not y:
        y.copy_(out)
