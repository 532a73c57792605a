"""Distances of two models' predictions, as terms of a training loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .batches import labels_of


def distillation(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 2.0, mask: Tensor | None = None
) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), the mean over the rows: 0-d, at least fp32.

    The factor T^2 keeps the size of the gradients at any temperature. Hinton et al. 2015, arXiv:1503.02531.
    student_logits, teacher_logits [..., classes]; only the student gets gradients.
    mask [...] bool: the rows that count; without any the term is 0.
    ValueError if the shapes differ or the temperature is not positive.
    """
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature = {temperature!r}; expected a positive number")
    student, teacher = _rows(student_logits, teacher_logits, mask)
    return temperature**2 * _kl(teacher.detach() / temperature, student / temperature)


def symmetric_kl(p_logits: Tensor, q_logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """1/2 [KL(sg q || p) + KL(sg p || q)] of their softmax, the mean over the rows: 0-d, at least fp32.

    sg: the distribution to the left gets no gradients, each is drawn towards the other as it stands. The consistency
    of AdaMix, Wang et al. 2022, arXiv:2205.12410.
    p_logits, q_logits [..., classes].   mask [...] bool: the rows that count; without any the term is 0.
    ValueError if the shapes differ.
    """
    p, q = _rows(p_logits, q_logits, mask)
    return (_kl(q.detach(), p) + _kl(p.detach(), q)) / 2


def counted(model: nn.Module, batch: Any, logits: Tensor) -> Tensor | None:
    """Which rows of the logits [..., classes] count: bool [...]; None for all.

    Those whose label is not -100, in a causal language model at the position before it; without a label each, those of
    the attention mask.
    """
    shape, ignored = logits.shape[:-1], -100
    labels = labels_of(batch)
    if isinstance(labels, Tensor) and labels.shape == shape and not labels.is_floating_point():
        count = labels != ignored
        encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        if count.dim() < 2 or encodes or not getattr(model, "can_generate", lambda: False)():
            return count
        return torch.cat((count[..., 1:], torch.zeros_like(count[..., :1])), -1)
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask != 0 if isinstance(mask, Tensor) and mask.shape == shape else None


def _rows(a: Tensor, b: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both as [rows that count, classes], fp32 or wider: a row that does not may hold anything, NaN too."""
    if a.shape != b.shape or not a.dim():
        raise ValueError(f"logits {tuple(a.shape)} and {tuple(b.shape)}; expected the same shape [..., classes]")
    if mask is not None and mask.shape != a.shape[:-1]:
        raise ValueError(f"mask {tuple(mask.shape)} for logits {tuple(a.shape)}; expected {tuple(a.shape[:-1])}")
    a, b = (t.flatten(0, -2) if t.dim() > 1 else t[None] for t in (a, b))
    if mask is not None:
        counting = mask.to(torch.bool).flatten()
        a, b = a[counting], b[counting]
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return a.to(wide), b.to(wide)


def _kl(target: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax(target) || softmax(logits)) [rows, classes], the mean over the rows; 0 log 0 = 0."""
    log_p, log_q = target.log_softmax(-1), logits.log_softmax(-1)
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0).sum() / max(1, len(p))
