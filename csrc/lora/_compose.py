"""The LoRA ops made of two primitives, so that every backend writes only those.

add_(y, x, a, b, scale, p, rng) -> t        y += scale * t b^T in place, t = drop(x) a^T [M, r] fp32
backward_(dx, g, x, a, b, t, scale, p, rng, need_da, need_db) -> (da, db)        dx += drop'(dt a) in place unless None
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))


def why_not(*args) -> str:
    """The reason why kernels of these primitives cannot serve the arguments of a LoRA op, or ""."""
    for a in args:
        if type(a) is not float and isinstance(a, torch.Tensor) and a.dtype not in DTYPES and a.dtype != torch.int64:
            return f"no kernel for {a.dtype}"
    return ""


def compose(add_, backward_):
    """(lora_add, lora_add_, lora_add_backward, lora_linear, lora_linear_backward) over the primitives."""

    def lora_add(y, x, a, b, scale, p, rng):
        y = y.clone(memory_format=torch.contiguous_format)
        return y, add_(y, x.contiguous(), a.contiguous(), b.contiguous(), scale, p, rng)

    def lora_add_inplace(y, x, a, b, scale, p, rng):
        if not y.is_contiguous():
            return lora_add(y, x, a, b, scale, p, rng)
        return y, add_(y, x.contiguous(), a.contiguous(), b.contiguous(), scale, p, rng)

    def gradients(dx, g, x, a, b, t, scale, p, rng, needs):
        a, b, t = a.contiguous(), b.contiguous(), t.contiguous()
        da, db = backward_(dx, g.contiguous(), x.contiguous(), a, b, t, scale, p, rng, needs[1], needs[2])
        return tuple(
            out if need else u.new_empty(0) for need, out, u in zip(needs, (dx, da, db), (x, a, b), strict=True)
        )

    def lora_add_backward(g, x, a, b, t, scale, p, rng, needs):
        dx = torch.zeros_like(x, memory_format=torch.contiguous_format) if needs[0] else None
        return gradients(dx, g, x, a, b, t, scale, p, rng, needs)

    def lora_linear(x, w, bias, a, b, scale, p, rng):
        x = x.contiguous()
        y = F.linear(x, w, bias)
        if y._is_view():  # of a 2-d product nobody else holds; as a view it could not be written into by a later op
            y = torch.ops.aten._unsafe_view(y, y.shape)
        return y, add_(y, x, a.contiguous(), b.contiguous(), scale, p, rng)

    def lora_linear_backward(g, x, w, a, b, t, scale, p, rng, needs):
        g = g.contiguous()
        return gradients(g @ w if needs[0] else None, g, x, a, b, t, scale, p, rng, needs)

    return lora_add, lora_add_inplace, lora_add_backward, lora_linear, lora_linear_backward
