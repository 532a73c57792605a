"""A prefix in every attention layer of a small model, against a longer sequence and HF PEFT's key-value cache."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor

from ..engine.attach import attach, tuners
from ..methods.prefix import PrefixTuner, PrefixTuning
from ..ops._op import Cost
from . import rivals
from .case import Case, Problem, Run, evaluate, randn

_LENGTH, _LAYERS, _HEAD = 30, 2, 64
_PEFT = "HF PEFT's past_key_values"


def prefix_cases(device: str) -> Iterator[Case]:
    """Two layers of GPT-2 (causal) and of BERT (bidirectional), without embeddings and heads."""
    for dtype, causal, mode in itertools.product(("float32", "bfloat16"), (True, False), ("forward", "full")):
        shape = f"{'causal' if causal else 'bidirectional'} l={_LENGTH}"
        selection = "quick" if dtype == "float32" else "default"
        yield Case("prefix", shape, mode, dtype, 512, 768, 768, selection, functools.partial(_prefix, causal=causal))


def _prefix(case: Case, device: str, stack: ExitStack, causal: bool) -> Problem:
    n, d = case.rows, case.n_in
    model = rivals.transformer(d, max(d // _HEAD, 1), _LAYERS, n + _LENGTH, causal).to(device, case.torch_dtype)
    plain = copy.deepcopy(model)
    attach(model, PrefixTuning(_LENGTH, hidden=0, shift=True))  # as HF PEFT has it
    flat = [p for _, t in tuners(model, "default") if isinstance(t, PrefixTuner) for p in (t.k, t.v)]
    x, g = (randn(1, n, d, like=case, device=device) for _ in range(2))
    longer = randn(1, n + _LENGTH, d, like=case, device=device).requires_grad_()
    leaves = (x.requires_grad_(), *flat)

    def ours() -> Tensor:
        return model(inputs_embeds=x).last_hidden_state

    def cached(base: Any, x: Tensor, *flat: Tensor) -> Tensor:
        return base(inputs_embeds=x, past_key_values=rivals.cache_of(flat, x, base.config)).last_hidden_state

    def results(base: Any, dtype: torch.dtype) -> list[Tensor]:
        own = tuple(t.detach().to(torch.promote_types(dtype, t.dtype)).requires_grad_() for t in leaves)
        return evaluate(Run(lambda: cached(base, *own), own), g, case.mode)

    numbers = sum(p.numel() for p in cast(Any, plain).parameters() if p.dim() > 1)
    cost = Cost(2 * n * numbers + 4 * _LAYERS * n * (n + _LENGTH) * d // (1 + causal), numbers * x.element_size())
    return Problem(
        rivals.LONGER,
        [Run(ours, leaves)],
        {
            rivals.LONGER: [Run(lambda: plain(inputs_embeds=longer).last_hidden_state[:, _LENGTH:], (longer,))],
            _PEFT: [Run(lambda: cached(plain, *leaves), leaves)],
        },
        g,
        lambda: results(plain, case.torch_dtype),
        lambda: results(copy.deepcopy(plain).double(), torch.float64),
        forward=[cost],
        backward=[cost],
    )
