"""Bottleneck adapters, rescaling and (IA)^3 layers on named shapes, against plain torch, HF PEFT and adapter-hub."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..check import double
from ..engine.attach import attach
from ..engine.site import adapters_of
from ..methods.ia3 import IA3
from ..ops import all_ops, bottleneck, rescale
from ..ops._op import Cost
from . import rivals
from .case import LLAMA, Case, Problem, Run, evaluate, of_reference, randn

_PLAIN = "plain torch"
_ACTS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}


# -- bottleneck adapters ----------------------------------------------------------------------------------------------

_BOTTLENECKS = ((768, 64), (768, 16), (1024, 64), (4096, 64), (4096, 256))  # width, bottleneck
_QUICK = {(768, 64, 4096), (4096, 64, 2048)}


def bottleneck_cases(device: str) -> Iterator[Case]:
    """With a LayerNorm inside, as AdapterL has it, and without; the activation is an adapter's choice."""
    for (width, m), dtype in itertools.product(_BOTTLENECKS, ("float32", "bfloat16")):
        for rows, norm, act in itertools.product((1, 16, 512, 4096 if width < 4096 else 2048), (False, True), _ACTS):
            for mode in ("forward", "full") if rows > 16 else ("forward",):
                main = not norm and act == "relu"
                quick = main and (width, m, rows) in _QUICK
                default = main and dtype == "float32" or (width, m) == (768, 64) and rows == 4096
                shape = f"{width} to {m} {act}{' layernorm' * norm}"
                shown = "quick" if quick and mode == "full" else "default" if default or quick else "all"
                build = functools.partial(_bottleneck, m=m, norm=norm, act=act)
                yield Case("bottleneck", shape, mode, dtype, rows, width, width, shown, build)


def _bottleneck(case: Case, device: str, stack: ExitStack, m: int, norm: bool, act: str) -> Problem:
    ops, n, m = all_ops(), case.n_in, min(m, case.n_in)
    x, g = (randn(case.rows, n, like=case, device=device) for _ in range(2))
    wd = randn(m, n, like=case, device=device, scale=n**-0.5)
    wu = randn(n, m, like=case, device=device, scale=m**-0.5)
    bd, bu, ln_w, ln_b = (randn(size, like=case, device=device) for size in (m, n, n, n))
    leaves = [t.requires_grad_() for t in (x, *((ln_w, ln_b) if norm else ()), wd, bd, wu, bu)]
    ln = (ln_w, ln_b) if norm else None

    def eager() -> Tensor:
        h = F.layer_norm(x, (n,), *ln) if ln else x
        return x + F.linear(_ACTS[act](F.linear(h, wd, bd)), wu, bu)

    def hub() -> list[Run]:
        layer = rivals.hub_adapter(wd, bd, wu, bu, act, ln)
        return [Run(lambda: layer(x, x)[0], (x, *layer.parameters()))]

    def run(call: Callable[[], Tensor], *own: Tensor) -> list[Run]:
        return [Run(call, own or tuple(leaves))]

    norms = (ln_w, ln_b, 1e-5) if norm else None
    args = (x, *(norms or (None, None))[:2], wd, bd, wu, bu, None, list(_ACTS).index(act), 1.0)
    args = (*args, norms and norms[2], 0.0, None)
    places = (0, *((1, 2) if norm else ()), 3, 4, 5, 6)
    back = (g, *args[:8], None, None, *args[8:], True, tuple(i in places for i in range(8)))
    return Problem(
        _PLAIN,
        run(lambda: bottleneck(x, wd, bd, wu, bu, act=act, ln=norms)),
        {
            _PLAIN: run(eager),
            rivals.BARE: run(lambda: F.linear(F.linear(x, wd), wu), x, wd, wu),
            "adapter-hub": rivals.no_adapter_hub() or hub(),
        },
        g,
        *of_reference(ops["bottleneck"], args, places, g, case.mode),
        forward=[ops["bottleneck"].cost(*args)],
        backward=[ops["bottleneck_backward"].cost(*back)],
    )


# -- rescaling --------------------------------------------------------------------------------------------------------

_WIDTHS = {"7b qkvo": 4096, "minilm qkvo": 384}
# in, out and whether the input is rescaled: keys and values, hidden units
_LAYERS = {
    "7b qkvo, out": (*LLAMA["7b qkvo"], False),
    "7b qkvo, in": (*LLAMA["7b qkvo"], True),
    "bert qkvo, out": (768, 768, False),
    "bert up, out": (768, 3072, False),
    "bert down, in": (3072, 768, True),
}


def rescale_cases(device: str) -> Iterator[Case]:
    dtypes = ("float32", "bfloat16")
    for mode, dtype, shape, rows in itertools.product(("forward", "full"), dtypes, _WIDTHS, (16, 512, 2048)):
        main = shape == "7b qkvo" and rows == 2048 and mode == "full"
        shown = "quick" if main else "default" if (rows, mode) in ((16, "forward"), (512, "full")) else "all"
        yield Case("rescale", shape, mode, dtype, rows, _WIDTHS[shape], _WIDTHS[shape], shown, _rescale)
    for dtype, (rows, width) in itertools.product(dtypes, ((2048, 4096), (4096, 768))):
        yield Case("rescale_backward", f"{width} dl", "forward", dtype, rows, width, width, "default", _dl)
    fast = device == "cuda" or torch.cpu._is_avx512_bf16_supported()  # elsewhere torch's own bf16 product takes minutes
    for dtype, shape, mode in itertools.product(dtypes[: 1 + fast], _LAYERS, ("forward", "full")):
        n_in, n_out, on_input = _LAYERS[shape]
        build = functools.partial(_layer, on_input=on_input)
        quick = "quick" if (mode, dtype) == ("forward", "float32") and not on_input else "default"
        yield Case("ia3", shape, mode, dtype, 2048, n_in, n_out, quick, build)


def _rescale(case: Case, device: str, stack: ExitStack) -> Problem:
    ops = all_ops()
    x = randn(case.rows, case.n_in, like=case, device=device).requires_grad_()
    l = randn(case.n_in, like=case, device=device, dtype=torch.float32).requires_grad_()
    g = torch.randn_like(x)
    return Problem(
        _PLAIN,
        [Run(lambda: rescale(x, l), (x, l))],
        {_PLAIN: [Run(lambda: (x * l).to(x.dtype), (x, l))]},
        g,
        *of_reference(ops["rescale"], (x, l), (0, 1), g, case.mode),
        forward=[ops["rescale"].cost(x, l)],
        backward=[ops["rescale_backward"].cost(g, x, l, (True, True))],
    )


def _dl(case: Case, device: str, stack: ExitStack) -> Problem:
    """The gradient of l alone."""
    op = all_ops()["rescale_backward"]
    g, x = (randn(case.rows, case.n_in, like=case, device=device) for _ in range(2))
    l = randn(case.n_in, like=case, device=device)
    args = (g, x, l, (False, True))

    def dl(dtype: torch.dtype | None = None) -> list[Tensor]:
        return [op.reference(*(double(args) if dtype else args))[1]]

    return Problem(
        "product, then sum",
        [Run(lambda: op(*args)[1], ())],
        {"product, then sum": [Run(lambda: (g * x).sum(0), ())]},
        g,
        dl,
        functools.partial(dl, torch.float64),
        forward=[Cost(2 * x.numel(), 2 * x.numel() * x.element_size())],
    )


def _layer(case: Case, device: str, stack: ExitStack, on_input: bool) -> Problem:
    """A linear layer with (IA)^3 on it; without gradients over the bare layer, and so in training."""
    ops, (k, n) = all_ops(), (case.n_in, case.n_out)
    x = randn(case.rows, k, like=case, device=device).requires_grad_(case.mode != "forward")
    w, bias = randn(n, k, like=case, device=device, scale=k**-0.5), randn(n, like=case, device=device)
    g = randn(case.rows, n, like=case, device=device)
    l = (torch.rand(k if on_input else n, device=device) + 0.5).requires_grad_()
    model = nn.Sequential(rivals.linear(w, bias))
    attach(model, IA3(feedforward=("0",) if on_input else ()), "0")
    tuner: Any = adapters_of(model[0]).tuners["default"]  # type: ignore[union-attr]  # attached above
    tuner.l = nn.Parameter(l.detach())

    def plain(x: Tensor, w: Tensor, bias: Tensor, l: Tensor) -> Tensor:
        return F.linear((x * l).to(x.dtype), w, bias) if on_input else (F.linear(x, w, bias) * l).to(x.dtype)

    def results(dtype: torch.dtype | None = None) -> list[Tensor]:
        own = double((x, w, bias, l)) if dtype else (x, w, bias, l)
        leaves = tuple(own[i].detach().requires_grad_() for i in (0, 3))
        return evaluate(Run(lambda: plain(leaves[0], own[1], own[2], leaves[1]), leaves), g, case.mode)

    product = Cost(2 * case.rows * k * n, sum(t.numel() * t.element_size() for t in (x, w, g)))
    rescaled = x if on_input else g

    def peft() -> list[Run]:
        layer = rivals.ia3_layer(w, bias, l, on_input)
        return [Run(lambda: layer(x), (x, *rivals.trainable(layer)))]

    return Problem(
        "frozen",
        [Run(lambda: model(x), (x, tuner.l))],
        {
            "frozen": [Run(lambda: F.linear(x, w, bias), (x,))],
            _PLAIN: [Run(lambda: plain(x, w, bias, l), (x, l))],
            "HF PEFT": rivals.missing("peft") or peft(),
        },
        g,
        results,
        functools.partial(results, torch.float64),
        forward=[product, ops["rescale"].cost(rescaled, l)],
        backward=[product, ops["rescale_backward"].cost(rescaled, rescaled, l, (True, True))],
    )
