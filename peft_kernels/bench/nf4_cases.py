"""Linears of 4-bit weights, with LoRA and without."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import all_ops, dequantize_nf4, nf4_linear, nf4_lora_linear, quantize_nf4
from . import rivals
from .case import LLAMA, SCALE, Case, Problem, Run, lora_layer, of_reference, pooled, randn

BLOCKSIZE = 64  # of 4-bit weights, the usual one


def nf4_cases(device: str) -> Iterator[Case]:
    fast = device == "cuda" or torch.cpu._is_avx512_bf16_supported()
    dtype = "bfloat16" if fast else "float32"  # elsewhere torch's own bf16 product takes minutes
    quick = (("forward", 1), ("forward", 512), ("backward", 512))
    for shape, mode, rows in itertools.product(LLAMA, ("forward", "backward"), (1, 16, 128, 512)):
        shown = "all" if shape != "7b up" else "quick" if (mode, rows) in quick else "default"
        yield Case("nf4_linear", shape, mode, dtype, rows, *LLAMA[shape], shown, _nf4_linear, cold=rows < 512)
    for p in (0.0, 0.05):
        yield Case("nf4_lora_linear", "7b up", "full", dtype, 512, *LLAMA["7b up"], "default", _nf4_lora, 16, p)


def _nf4_pool(case: Case, device: str) -> list[tuple[Tensor, Tensor]]:
    scale = case.n_in**-0.5
    shape = case.n_out, case.n_in
    made = replace(case, dtype="float32")
    return pooled(case, device, lambda: quantize_nf4(randn(*shape, like=made, device=device, scale=scale), BLOCKSIZE))


def _nf4_linear(case: Case, device: str, stack: ExitStack) -> Problem:
    """The dense yardstick has the same weights, unpacked."""
    ops, k, n = all_ops(), case.n_in, case.n_out
    x = randn(case.rows, k, like=case, device=device).requires_grad_()
    g = randn(case.rows, n, like=case, device=device)
    pool = _nf4_pool(case, device)

    def weight(packed, absmax):
        return dequantize_nf4(packed, absmax, (n, k), BLOCKSIZE, x.dtype)

    def ours(packed, absmax):
        return Run(lambda: nf4_linear(x, packed, absmax, n, BLOCKSIZE), (x,))

    def dequantized(packed, absmax):
        return Run(lambda: F.linear(x, weight(packed, absmax)), (x,))

    others = {} if case.mode == "backward" else {"dequantized": [dequantized(*weights) for weights in pool]}
    own = (None, None, None, 256)
    args = (x, *pool[0], n, BLOCKSIZE, None, *own)
    return Problem(
        "dense",
        [ours(*weights) for weights in pool],
        {
            "dense": [Run(functools.partial(F.linear, x, weight(*weights)), (x,)) for weights in pool],
            **others,  # backward alone it is dense: autograd has kept what was unpacked
            **_bitsandbytes(case, x, pool),
        },
        g,
        *of_reference(ops["nf4_linear"], args, (0,), g, case.mode),
        forward=[ops["nf4_linear"].cost(*args)],
        backward=[ops["nf4_linear_dgrad"].cost(g, *pool[0], k, BLOCKSIZE, *own)],
    )


def _nf4_lora(case: Case, device: str, stack: ExitStack) -> Problem:
    ops, k, n = all_ops(), case.n_in, case.n_out
    x = randn(case.rows, k, like=case, device=device).requires_grad_()
    g = randn(case.rows, n, like=case, device=device)
    rng = torch.tensor([1, 2], device=device) if case.p else None
    ((packed, absmax),) = pool = _nf4_pool(case, device)
    w, _, ((a, b),) = lora_layer(case, device)
    rest, own = (a, b, SCALE), (None, None, None, 256)

    def beside(linear):
        """LoRA in plain torch on the result of a linear layer."""
        return Run(lambda: linear() + rivals.delta(F.dropout(x, case.p), a, b, SCALE), (x, a, b))

    def dequantized():
        return F.linear(x, dequantize_nf4(packed, absmax, (n, k), BLOCKSIZE, x.dtype))

    others = {name: runs for name, runs in _bitsandbytes(case, x, pool).items() if name != BITSANDBYTES_EVAL}
    args = (x, packed, absmax, n, BLOCKSIZE, *rest, None, case.p, rng, *own)
    back = (g, x, packed, absmax, BLOCKSIZE, a, b, None, SCALE, case.p, rng, *own, (True, True, True))
    return Problem(
        "frozen",
        [Run(lambda: nf4_lora_linear(x, packed, absmax, n, BLOCKSIZE, *rest, p=case.p, rng=rng), (x, a, b))],
        {
            "frozen": [Run(functools.partial(F.linear, x, w), (x,))],
            "dequantized": [beside(dequantized)],
            **{name: own if isinstance(own, str) else [beside(own[0].call)] for name, own in others.items()},
        },
        g,
        *of_reference(ops["nf4_lora_linear"], args, (0, 5, 6), g, case.mode),
        forward=[ops["nf4_lora_linear"].cost(*args)],
        backward=[ops["nf4_lora_linear_backward"].cost(*back)],
        same=not case.p,
    )


BITSANDBYTES_EVAL = "bitsandbytes, eval"


def _bitsandbytes(case: Case, x: Tensor, pool: Sequence[tuple[Tensor, Tensor]]) -> dict[str, list[Run] | str]:
    """The layer as it trains and, forward alone, as it infers on a CPU, where that packs the weights anew."""
    out: dict[str, list[Run] | str] = {"bitsandbytes": "", BITSANDBYTES_EVAL: ""}
    if case.mode != "forward" or x.device.type != "cpu":
        del out[BITSANDBYTES_EVAL]
    for name in out:
        reason = rivals.missing("bitsandbytes") or rivals.not_for_bitsandbytes(case.n_out, case.n_in, BLOCKSIZE)
        if reason:
            out[name] = reason
            continue
        training = name == "bitsandbytes"
        made = rivals.bitsandbytes_layers(pool, (case.n_out, case.n_in), BLOCKSIZE, x.dtype, training)
        own = x if training else x.detach()
        for layer in () if training else made:
            layer(own[:1])  # packs
        out[name] = [Run(functools.partial(layer, own), (own,)) for layer in made]
    return out
