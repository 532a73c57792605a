"""LoRA on one linear, on several of one input, and a batch whose rows have adapters of their own."""

from __future__ import annotations

import copy
import functools
import itertools
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..check import double
from ..engine.attach import attach
from ..engine.route import route
from ..engine.site import Adapters, adapters_of
from ..methods._peft_accelerate import accelerate
from ..methods.lora import LoRA
from ..ops import all_ops, backend, lora_add, lora_linear, lora_linear_slices
from ..ops._op import Cost
from . import rivals
from .case import LLAMA, SCALE, Case, Problem, Run, evaluate, lora_layer, of_reference, pooled, randn

CALL = {"tiny": (64, 64)}  # what a call itself costs
MINILM = {"minilm qkvo": (384, 384), "minilm up": (384, 1536), "minilm down": (1536, 384)}
SLICES = {"7b qkv": (4096, 3, 4096), "7b gate up": (4096, 2, 11008), "minilm qkv": (384, 3, 384)}  # in, how many, out
DECODE = (1, 16, 64, 256)


def lora_cases(device: str) -> Iterator[Case]:
    low = "bfloat16" if device == "cuda" else "float32"

    def case(shape, mode, rows, selection, r=16, p=0.0, dtype=low, op="lora_linear", build=_lora_linear):
        cold = shape in LLAMA and mode == "forward" and rows in DECODE
        return Case(op, shape, mode, dtype, rows, *sizes[shape], selection, build, r, p, cold=cold)

    sizes = {**LLAMA, **MINILM, **CALL}
    for shape in LLAMA:
        main = shape == "7b qkvo"
        for rows in DECODE:
            quick = main and rows in (1, 16)
            yield case(shape, "forward", rows, "quick" if quick else "default" if main or rows == 16 else "all")
        for rows in (2048, 8192):
            yield case(shape, "forward", rows, "default" if main and rows == 2048 else "all")
        for rows, p in itertools.product((512, 2048, 8192), (0.0, 0.05)):
            shown = "quick" if main else "default" if rows == 512 and p else "all"
            yield case(shape, "full", rows, "all" if rows == 8192 else shown, p=p)
    for mode in ("recorded", "backward"):
        yield case("7b qkvo", mode, 512, "default", p=0.05)
    for rank in (8, 64, 128):
        yield case("7b qkvo", "full", 512, "default", r=rank)
    for dtype, shape, p in itertools.product(("float32", "bfloat16"), MINILM, (0.0, 0.05)):
        shown = "quick" if dtype == "float32" and shape != "minilm down" else "default"
        yield case(shape, "full", 512, shown, r=8, p=p, dtype=dtype)
    if device == "cpu" and torch.cpu._is_avx512_bf16_supported():  # elsewhere torch's own bf16 product takes minutes
        for rows, p in itertools.product((512, 2048), (0.0, 0.05)):
            yield case("7b qkvo", "full", rows, "quick", p=p, dtype="bfloat16")
        for rows in (1, 16):
            yield case("7b qkvo", "forward", rows, "default", dtype="bfloat16")
    for mode, rows in (("forward", 16), ("full", 512)):
        yield case("7b qkvo", mode, rows, "default", op="lora_add", build=_lora_add)
    for mode in ("forward", "recorded", "full"):
        yield case("tiny", mode, 4, "quick", r=8, dtype="float32", op="lora_add", build=_lora_add)


def _lora_linear(case: Case, device: str, stack: ExitStack) -> Problem:
    ops = all_ops()
    x = randn(case.rows, case.n_in, like=case, device=device).requires_grad_()
    g = randn(case.rows, case.n_out, like=case, device=device)
    rng = torch.tensor([1, 2], device=device) if case.p else None
    layers = pooled(case, device, lambda: lora_layer(case, device))

    def ours(w, bias, a, b):
        return Run(lambda: lora_linear(x, w, bias, a, b, SCALE, p=case.p, rng=rng), (x, a, b))

    def plain(w, bias, a, b):
        return Run(lambda: rivals.lora(x, w, bias, a, b, SCALE, case.p), (x, a, b))

    flat = [(w, bias, *factors[0]) for w, bias, factors in layers]
    args = (x, *flat[0], SCALE, case.p, rng)
    return Problem(
        "frozen",
        [ours(*layer) for layer in flat],
        {
            "frozen": _frozen(x, layers),
            "plain torch": [plain(*layer) for layer in flat],
            **_peft(case, x, layers),
        },
        g,
        *of_reference(ops["lora_linear"], args, (0, 3, 4), g, case.mode),
        forward=[ops["lora_linear"].cost(*args)],
        backward=[ops["lora_linear_backward"].cost(g, x, *flat[0][:1], *flat[0][2:])],
        same=not case.p,
    )


def _lora_add(case: Case, device: str, stack: ExitStack) -> Problem:
    ops = all_ops()
    x = randn(case.rows, case.n_in, like=case, device=device).requires_grad_()
    y = randn(case.rows, case.n_out, like=case, device=device).requires_grad_()
    g = torch.randn_like(y)
    pool = pooled(case, device, lambda: lora_layer(case, device)[2][0])

    def plain(a, b):
        return Run(lambda: y + rivals.delta(x, a, b, SCALE), (y, x, a, b))

    args = (y, x, *pool[0], SCALE, 0.0, None)
    return Problem(
        "plain torch",
        [Run(functools.partial(lora_add, y, x, a, b, SCALE), (y, x, a, b)) for a, b in pool],
        {"plain torch": [plain(*factors) for factors in pool]},
        g,
        *of_reference(ops["lora_add"], args, (0, 1, 2, 3), g, case.mode),
        forward=[ops["lora_add"].cost(*args)],
        backward=[ops["lora_add_backward"].cost(g, x, *pool[0])],
    )


def _frozen(x: Tensor, layers: Sequence[tuple]) -> list[Run]:
    return [Run(functools.partial(F.linear, x, w, bias), (x,)) for w, bias, _ in layers]


def _peft(case: Case, x: Tensor, layers: Sequence[tuple], names: Sequence[int] | None = None) -> dict[str, Any]:
    """HF PEFT on the same weights: with fp32 adapters, its default, and beside a 16-bit W with adapters like W.

    names: the adapter of each row; None where there is one for all.
    """
    dtypes = {"HF PEFT": torch.float32}
    if case.torch_dtype != torch.float32:
        dtypes = {"HF PEFT, fp32 adapters": torch.float32, f"HF PEFT, {case.dtype} adapters": case.torch_dtype}
    if missing := rivals.missing("peft"):
        return {name: missing for name in dtypes}
    out = {}
    for name, dtype in dtypes.items():
        made = rivals.peft_layers(layers, SCALE, case.p, dtype)
        kept = {} if names is None else {"adapter_names": [f"a{i}" if i >= 0 else "__base__" for i in names]}
        out[name] = [Run(functools.partial(layer, x, **kept), (x, *rivals.trainable(layer))) for layer in made]
    return out


# -- layers of HF PEFT ------------------------------------------------------------------------------------------------


def accelerate_cases(device: str) -> Iterator[Case]:
    low = "bfloat16" if device == "cuda" else "float32"
    case = functools.partial(Case, "accelerate", build=_accelerate, rank=16)
    for mode, rows in (("forward", 16), ("full", 512), ("full", 2048)):
        shown = "quick" if rows == 512 else "default"
        yield case("7b qkvo", mode, low, rows, *LLAMA["7b qkvo"], shown)
    for mode, rows in (("forward", 4), ("full", 512)):
        yield case("minilm qkvo", mode, "float32", rows, *MINILM["minilm qkvo"], "default")


def _accelerate(case: Case, device: str, stack: ExitStack) -> Problem:
    """A layer of PEFT as it is, and after pk.hf.accelerate."""
    ops = all_ops()
    x = randn(case.rows, case.n_in, like=case, device=device).requires_grad_()
    g = randn(case.rows, case.n_out, like=case, device=device)
    layers = pooled(case, device, lambda: lora_layer(case, device))
    fused = rivals.peft_layers(layers, SCALE, case.p, torch.float32)
    for layer in fused:
        accelerate(layer)
    flat = [(w, bias, *factors[0]) for w, bias, factors in layers]
    args = (x, *flat[0], SCALE, case.p, None)
    return Problem(
        "frozen",
        [Run(functools.partial(layer, x), (x, *rivals.trainable(layer))) for layer in fused],
        {"frozen": _frozen(x, layers), **_peft(case, x, layers)},
        g,
        *of_reference(ops["lora_linear"], args, (0, 3, 4), g, case.mode),
        forward=[ops["lora_linear"].cost(*args)],
        backward=[ops["lora_linear_backward"].cost(g, x, *flat[0][:1], *flat[0][2:])],
    )


# -- several linears of one input -------------------------------------------------------------------------------------


def slices_cases(device: str) -> Iterator[Case]:
    low = "bfloat16" if device == "cuda" else "float32"

    def case(shape, mode, rows, selection, dtype=low, p=0.0):
        n_in, count, n_out = SLICES[shape]
        r, cold = (8 if shape == "minilm qkv" else 16), mode == "forward"
        build = functools.partial(_slices, count=count)
        return Case(
            "lora_linear_slices", shape, mode, dtype, rows, n_in, count * n_out, selection, build, r, p, cold=cold
        )

    for dtype, p in itertools.product(("float32", "bfloat16"), (0.0, 0.05)):
        yield case("minilm qkv", "full", 512, "quick" if dtype == "float32" else "default", dtype, p)
    for shape in ("7b qkv", "7b gate up"):
        for rows in (1, 16):
            yield case(shape, "forward", rows, "default")
        for rows, p in itertools.product((128, 2048), (0.0, 0.05)):
            yield case(shape, "full", rows, "default" if rows == 128 else "all", p=p)


def _slices(case: Case, device: str, stack: ExitStack, count: int) -> Problem:
    """n_out is the width of all linears together."""
    ops, scales = all_ops(), [SCALE] * count
    widths = [case.n_out // count] * (count - 1)
    parts = [replace(case, n_out=n) for n in (*widths, case.n_out - sum(widths))]
    x = randn(case.rows, case.n_in, like=case, device=device).requires_grad_()
    gs = [randn(case.rows, part.n_out, like=case, device=device) for part in parts]
    rng = torch.tensor([1, 2], device=device) if case.p else None
    pool = pooled(case, device, lambda: [lora_layer(part, device) for part in parts])
    layers = list(itertools.chain.from_iterable(pool))
    flat = [(w, bias, *factors[0]) for w, bias, factors in layers]

    def ours(members):
        ws, biases, as_, bs = map(list, zip(*((w, bias, *factors[0]) for w, bias, factors in members), strict=True))
        call = functools.partial(lora_linear_slices, x, ws, biases, as_, bs, scales, p=case.p, rng=rng)
        return Run(call, (x, *as_, *bs)), (ws, biases, as_, bs)

    def each(w, bias, a, b):
        return Run(lambda: lora_linear(x, w, bias, a, b, SCALE, p=case.p, rng=rng), (x, a, b))

    def plain(w, bias, a, b):
        return Run(lambda: rivals.lora(x, w, bias, a, b, SCALE, case.p), (x, a, b))

    runs, lists = zip(*map(ours, pool), strict=True)
    ws, biases, as_, bs = lists[0]
    args = (x, scales, case.p, rng, *ws, *biases, *as_, *bs)
    t = x.new_empty(case.rows, sum(map(len, as_)))
    apart = {
        "frozen": _frozen(x, layers),
        "lora_linear each": [each(*layer) for layer in flat],
        "plain torch": [plain(*layer) for layer in flat],
        **_peft(case, x, layers),
    }
    leaves = (0, *range(4 + 2 * count, 4 + 4 * count))
    back = (x, t, scales, case.p, rng, (True, True, True), *gs, *ws, *as_, *bs)
    return Problem(
        "frozen",
        list(runs),
        {name: own if isinstance(own, str) else _together(own, count) for name, own in apart.items()},
        gs,
        *of_reference(ops["lora_linear_slices"], args, leaves, gs, case.mode),
        forward=[ops["lora_linear_slices"].cost(*args)],
        backward=[ops["lora_linear_slices_backward"].cost(*back)],
        same=not case.p,
    )


def _together(runs: list[Run], count: int) -> list[Run]:
    """Every `count` of the runs as one, with as many results."""

    def one(members: list[Run]) -> Run:
        leaves = dict.fromkeys(leaf for run in members for leaf in run.leaves)  # the x of all once
        return Run(lambda: [run.call() for run in members], tuple(leaves))

    return [one(runs[i : i + count]) for i in range(0, len(runs), count)]


# -- mixed batches ----------------------------------------------------------------------------------------------------


def route_cases(device: str) -> Iterator[Case]:
    low = "bfloat16" if device == "cuda" else "float32"
    for shape, rows, popularity in itertools.product(LLAMA, (8, 64), rivals.POPULARITY):
        main = shape == "7b qkvo"
        quick = main and rows == 64 and popularity in ("distinct", "uniform")
        shown = "quick" if quick else "default" if main else "all"
        sizes = LLAMA[shape]
        yield Case("route", shape, "forward", low, rows, *sizes, shown, _route, 16, popularity=popularity, cold=True)
    sizes = LLAMA["7b qkvo"]
    mixed: tuple[int, ...] = (8, 16, 32, 64)
    few: list[tuple[int | tuple[int, ...], str]] = [(16, "distinct"), (16, "8 adapters")]
    few += [(mixed, popularity) for popularity in ("distinct", "uniform", "uniform, a fifth base")]
    for rank, popularity in few:
        yield Case(
            "route", "7b qkvo", "forward", low, 32, *sizes, "default", _route, rank, popularity=popularity, cold=True
        )
    for rows in (2048, 8192):  # prefill, 8 and 16 adapters
        shown = "default" if rows == 2048 else "all"
        yield Case("route", "7b qkvo", "forward", low, rows, *sizes, shown, _route, 16, popularity="uniform")
    for popularity in rivals.POPULARITY:
        shown = "default" if popularity == "uniform" else "all"
        yield Case("route", "7b qkvo", "full", low, 512, *sizes, shown, _route, 16, popularity=popularity)


def _route(case: Case, device: str, stack: ExitStack) -> Problem:
    """rows are batch rows of one token in decoding, which is cold, of 32 tokens in prefill and training."""
    tokens = 1 if case.cold else 32
    numbers = rivals.POPULARITY[case.popularity](case.rows // tokens)
    random.Random(0).shuffle(numbers)
    count = max(numbers) + 1
    x = randn(len(numbers), tokens, case.n_in, like=case, device=device).requires_grad_()
    g = randn(len(numbers), tokens, case.n_out, like=case, device=device)
    layers = pooled(case, device, lambda: lora_layer(case, device, count))
    model, names = _routed(case, layers), [f"a{i}" if i >= 0 else None for i in numbers]
    stack.enter_context(route(model, names))

    def results(model: nn.ModuleList, x: Tensor) -> list[Tensor]:
        with backend("reference"), route(model, names):
            return evaluate(_routed_run(model[0], x, count), g, case.mode)

    def truth() -> list[Tensor]:
        return results(copy.deepcopy(model).double(), *double((x,)))

    m, k, n = case.rows, case.n_in, case.n_out
    ranks = [len(a) for a, _ in layers[0][2]]
    products = 2 * tokens * sum(ranks[i] for i in numbers if i >= 0) * (k + n)
    moved = sum(t.numel() * t.element_size() for t in (x, g, layers[0][0])) + 4 * sum(ranks) * (k + n)
    one_way = Cost(2 * m * k * n + products, moved)
    other_way = Cost(2 * m * k * n + 2 * products, moved + x.numel() * x.element_size())
    return Problem(
        "frozen",
        [_routed_run(layer, x, count) for layer in model],
        {
            "frozen": _frozen(x, layers),
            **{name: [Run(*run) for run in runs] for name, runs in rivals.mixed(x, layers, numbers, SCALE).items()},
            **_peft(case, x, layers, numbers),
        },
        g,
        lambda: results(model, x),
        truth,
        forward=[one_way],
        backward=[other_way],
    )


def _routed(case: Case, layers: Sequence[tuple]) -> nn.ModuleList:
    model = nn.ModuleList(rivals.linear(w, bias) for w, bias, _ in layers)
    for i, (a, _) in enumerate(layers[0][2]):
        attach(model, LoRA(rank=len(a), alpha=SCALE * len(a)), "*", name=f"a{i}")
    with torch.no_grad():
        for layer, (_, _, factors) in zip(model, layers, strict=True):
            for i, (a, b) in enumerate(factors):
                for own, value in zip(_factors(layer, i), (a, b), strict=True):
                    own.copy_(value)
    return model.train(case.mode != "forward")


def _factors(layer: nn.Module, adapter: int) -> tuple[Tensor, Tensor]:
    tuner: Any = cast(Adapters, adapters_of(layer)).tuners[f"a{adapter}"]  # attached in _routed
    return tuner.a, tuner.b


def _routed_run(layer: nn.Module, x: Tensor, count: int) -> Run:
    return Run(functools.partial(layer, x), (x, *(factor for i in range(count) for factor in _factors(layer, i))))
