"""What is timed: the named shapes, and for each op its inputs, our call, the rivals, and the truth they are held to.

A new op appears by itself, on the first of its samples. Named shapes are a generator in FAMILIES.
"""

from __future__ import annotations

import copy
import functools
import itertools
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..check import double, outputs, with_leaves
from ..engine.attach import attach
from ..engine.route import route
from ..engine.site import adapters_of
from ..methods.lora import LoRA
from ..ops import (
    all_ops,
    backend,
    dequantize_nf4,
    lora_add,
    lora_linear,
    lora_linear_slices,
    nf4_linear,
    nf4_lora_linear,
    quantize_nf4,
    sddmm,
    sparse_linear,
)
from ..ops._op import Cost, Op, Sample
from . import rivals
from .measure import cache_bytes

# name: (in, out)
LLAMA = {
    "7b qkvo": (4096, 4096),
    "7b up": (4096, 11008),
    "7b down": (11008, 4096),
    "13b qkvo": (5120, 5120),
    "13b up": (5120, 13824),
    "13b down": (13824, 5120),
    "70b qo": (8192, 8192),
    "70b kv": (8192, 1024),
    "70b up": (8192, 28672),
    "70b down": (28672, 8192),
}
CALL = {"tiny": (64, 64)}  # what a call itself costs
MINILM = {"minilm qkvo": (384, 384), "minilm up": (384, 1536), "minilm down": (1536, 384)}
SLICES = {"7b qkv": (4096, 3, 4096), "7b gate up": (4096, 2, 11008), "minilm qkv": (384, 3, 384)}  # in, how many, out
DECODE = (1, 16, 64, 256)
MODES = ("forward", "recorded", "backward", "full")  # without gradients, with them, backward alone, both ways
SELECTIONS = ("quick", "default", "all")  # each holds those before it
SCALE = 2.0  # alpha / rank, as by default
BLOCKSIZE = 64  # of 4-bit weights, the usual one
# have no product of matrices
ELEMENTWISE = {"rescale", "topk_threshold", "sparse_adamw", "hard_concrete", "fwht", "fastfood"}


class Run(NamedTuple):
    """The same work on one piece of memory, and what is differentiated in it. Several results come as a list."""

    call: Callable[[], Any]
    leaves: tuple[Tensor, ...]


@dataclass
class Problem:
    """A case on a device. Each list of runs goes over a pool of weights, so that they come from memory.

    rivals: a list of runs, or why there is none.   over: which of them is the yardstick.
    plain, truth: the result (and gradients of `ours[0].leaves`) of plain torch, and in fp64.
    forward, backward: what the ops cost at the least.   same: every rival but a frozen yardstick gives our result.
    """

    over: str
    ours: list[Run]
    rivals: dict[str, list[Run] | str]
    g: Tensor | list[Tensor]
    plain: Callable[[], list[Tensor]]
    truth: Callable[[], list[Tensor]]
    forward: list[Cost]
    backward: list[Cost] = field(default_factory=list)
    same: bool = True


@dataclass(frozen=True)
class Case:
    """One line of the benchmark. rows x n_in is the input, n_out the width of the result."""

    op: str
    shape: str
    mode: str
    dtype: str
    rows: int
    n_in: int
    n_out: int
    selection: str
    build: Callable[[Case, str, ExitStack], Problem]  # the stack holds what must be on while the case is timed
    rank: int | tuple[int, ...] = 0  # of many adapters each its own, in turn
    p: float = 0.0
    popularity: str = ""  # which adapter serves which row
    cold: bool = False  # decoding reads each weight once per token: from a cache it would be measured too fast

    @property
    def name(self) -> str:
        words = [self.op, self.shape, self.mode, self.dtype, f"rows={self.rows}"]
        words += [f"r={'/'.join(map(str, self.ranks))}"] * bool(self.rank) + [f"p={self.p}"] * bool(self.p)
        return " ".join([*words, self.popularity]).rstrip()

    @property
    def ranks(self) -> tuple[int, ...]:
        return self.rank if isinstance(self.rank, tuple) else (self.rank,)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def work(self) -> Cost:
        """Roughly what one call of any rival costs, known without making the tensors."""
        ways = {"backward": 1, "full": 2}.get(self.mode, 1)
        weights = 0 if self.op in ELEMENTWISE else self.n_in * self.n_out
        held = weights + self.rows * (self.n_in + self.n_out)
        return Cost(2 * self.rows * weights * ways, held * self.torch_dtype.itemsize * ways)


def evaluate(run: Run, g: Tensor | list[Tensor], mode: str) -> list[Tensor]:
    """The result, and unless the mode is forward the gradients of the leaves for the cotangent g."""
    if mode == "forward":
        with torch.no_grad():
            return outputs(run.call())[:1]
    out = outputs(run.call())[0]
    return [out.detach(), *torch.autograd.grad(out, run.leaves, outputs(g)[0].to(out.dtype))]


def timed(run: Run, g: Tensor | list[Tensor], mode: str) -> Callable[[], object]:
    """What is timed of a run."""
    if mode == "forward":
        return torch.no_grad()(run.call)
    if mode == "recorded":
        return run.call
    if mode == "full":
        return lambda: torch.autograd.grad(run.call(), run.leaves, g)
    out = run.call()
    return lambda: torch.autograd.grad(out, run.leaves, g, retain_graph=True)


def _pool(case: Case, device: str, make: Callable[[], Any]) -> list[Any]:
    """Results of `make`, nested tensors: so many that together they fill the last-level cache four times."""
    first = make()
    held = sum(t.numel() * t.element_size() for t in rivals.tensors(first))
    count = min(256, -(-4 * cache_bytes(device) // held)) if case.cold else 1
    return [first, *(make() for _ in range(count - 1))]


def _randn(*shape: int, like: Case, device: str, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
    return torch.randn(shape, device=device).mul_(scale).to(dtype or like.torch_dtype)


def _layer(case: Case, device: str, adapters: int = 1) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """W, bias and (A, B) of each adapter; these are fp32 beside a 16-bit W, as they are trained."""
    k, n = case.n_in, case.n_out
    factors = [
        (
            _randn(r, k, like=case, device=device, scale=k**-0.5, dtype=torch.float32),
            _randn(n, r, like=case, device=device, scale=0.1, dtype=torch.float32),
        )
        for r in itertools.islice(itertools.cycle(case.ranks), adapters)
    ]
    return (
        _randn(n, k, like=case, device=device, scale=k**-0.5),
        _randn(n, like=case, device=device),
        [(a.requires_grad_(), b.requires_grad_()) for a, b in factors],
    )


def _of_reference(
    op: Op, args: tuple, leaves: tuple[int, ...], g: Tensor | list[Tensor], mode: str
) -> tuple[Callable[[], list[Tensor]], Callable[[], list[Tensor]]]:
    """(plain, truth) of a Problem whose call is one op on these arguments."""

    def results(dtype: torch.dtype | None = None) -> list[Tensor]:
        own, made = with_leaves(Sample("", args, leaves), dtype)
        return evaluate(Run(lambda: outputs(op.reference(*own))[0], tuple(made)), g, mode)

    return results, lambda: results(torch.float64)


# -- every op on a sample ---------------------------------------------------------------------------------------------


def _sample_cases(device: str) -> Iterator[Case]:
    for op in all_ops().values():
        sample = next(iter(op.samples(torch.float32, "cpu")))
        first = next(a for a in sample.args if isinstance(a, Tensor) and a.dim())
        width = first.shape[-1]
        for mode in ("forward", "recorded", "full") if op.gradient else ("forward",):
            shape = f"sample {sample.id}"
            yield Case(op.name, shape, mode, "float32", first.numel() // width, width, 0, "default", _sample)


def _sample(case: Case, device: str, stack: ExitStack) -> Problem:
    op = all_ops()[case.op]
    sample = next(iter(op.samples(case.torch_dtype, device)))
    args, leaves = with_leaves(sample)
    g = torch.randn(outputs(op.reference(*args))[0].shape, device=device)  # of integers too, which have no gradient
    return Problem(
        "reference",  # not plain torch: nobody would write it so
        [Run(lambda: outputs(op(*args))[0], tuple(leaves))],
        {"reference": [Run(lambda: outputs(op.reference(*args))[0], tuple(leaves))]},
        g,
        *_of_reference(op, sample.args, sample.differentiable, g, case.mode),
        forward=[op.cost(*args)],
    )


# -- LoRA -------------------------------------------------------------------------------------------------------------


def _lora_cases(device: str) -> Iterator[Case]:
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
    x = _randn(case.rows, case.n_in, like=case, device=device).requires_grad_()
    g = _randn(case.rows, case.n_out, like=case, device=device)
    rng = torch.tensor([1, 2], device=device) if case.p else None
    layers = _pool(case, device, lambda: _layer(case, device))

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
        *_of_reference(ops["lora_linear"], args, (0, 3, 4), g, case.mode),
        forward=[ops["lora_linear"].cost(*args)],
        backward=[ops["lora_linear_backward"].cost(g, x, *flat[0][:1], *flat[0][2:])],
        same=not case.p,
    )


def _lora_add(case: Case, device: str, stack: ExitStack) -> Problem:
    ops = all_ops()
    x = _randn(case.rows, case.n_in, like=case, device=device).requires_grad_()
    y = _randn(case.rows, case.n_out, like=case, device=device).requires_grad_()
    g = torch.randn_like(y)
    pool = _pool(case, device, lambda: _layer(case, device)[2][0])

    def plain(a, b):
        return Run(lambda: y + rivals.delta(x, a, b, SCALE), (y, x, a, b))

    args = (y, x, *pool[0], SCALE, 0.0, None)
    return Problem(
        "plain torch",
        [Run(functools.partial(lora_add, y, x, a, b, SCALE), (y, x, a, b)) for a, b in pool],
        {"plain torch": [plain(*factors) for factors in pool]},
        g,
        *_of_reference(ops["lora_add"], args, (0, 1, 2, 3), g, case.mode),
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


# -- several linears of one input -------------------------------------------------------------------------------------


def _slices_cases(device: str) -> Iterator[Case]:
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
    x = _randn(case.rows, case.n_in, like=case, device=device).requires_grad_()
    gs = [_randn(case.rows, part.n_out, like=case, device=device) for part in parts]
    rng = torch.tensor([1, 2], device=device) if case.p else None
    pool = _pool(case, device, lambda: [_layer(part, device) for part in parts])
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
        *_of_reference(ops["lora_linear_slices"], args, leaves, gs, case.mode),
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


def _route_cases(device: str) -> Iterator[Case]:
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
    x = _randn(len(numbers), tokens, case.n_in, like=case, device=device).requires_grad_()
    g = _randn(len(numbers), tokens, case.n_out, like=case, device=device)
    layers = _pool(case, device, lambda: _layer(case, device, count))
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
    tuner: Any = adapters_of(layer).tuners[f"a{adapter}"]  # type: ignore[union-attr]  # attached in _routed
    return tuner.a, tuner.b


def _routed_run(layer: nn.Module, x: Tensor, count: int) -> Run:
    return Run(functools.partial(layer, x), (x, *(factor for i in range(count) for factor in _factors(layer, i))))


# -- 4-bit weights ----------------------------------------------------------------------------------------------------


def _nf4_cases(device: str) -> Iterator[Case]:
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
    return _pool(case, device, lambda: quantize_nf4(_randn(*shape, like=made, device=device, scale=scale), BLOCKSIZE))


def _nf4_linear(case: Case, device: str, stack: ExitStack) -> Problem:
    """The dense yardstick has the same weights, unpacked."""
    ops, k, n = all_ops(), case.n_in, case.n_out
    x = _randn(case.rows, k, like=case, device=device).requires_grad_()
    g = _randn(case.rows, n, like=case, device=device)
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
        *_of_reference(ops["nf4_linear"], args, (0,), g, case.mode),
        forward=[ops["nf4_linear"].cost(*args)],
        backward=[ops["nf4_linear_dgrad"].cost(g, *pool[0], k, BLOCKSIZE, *own)],
    )


def _nf4_lora(case: Case, device: str, stack: ExitStack) -> Problem:
    ops, k, n = all_ops(), case.n_in, case.n_out
    x = _randn(case.rows, k, like=case, device=device).requires_grad_()
    g = _randn(case.rows, n, like=case, device=device)
    rng = torch.tensor([1, 2], device=device) if case.p else None
    ((packed, absmax),) = pool = _nf4_pool(case, device)
    w, _, ((a, b),) = _layer(case, device)
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
        *_of_reference(ops["nf4_lora_linear"], args, (0, 5, 6), g, case.mode),
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


# -- sparse deltas ----------------------------------------------------------------------------------------------------

DENSITIES = (0.0005, 0.005, 0.01, 0.05, 0.2)


def _sparse_cases(device: str) -> Iterator[Case]:
    bf16 = device == "cuda" or torch.cpu._is_avx512_bf16_supported()  # elsewhere torch's own bf16 product takes minutes
    sizes = LLAMA["7b qkvo"]

    def case(op, build, mode, dtype, rows, density, selection, cold=False):
        own = functools.partial(build, density=density)
        return Case(op, f"7b qkvo {density:.4g}", mode, dtype, rows, *sizes, selection, own, cold=cold)

    for dtype, rows, density in itertools.product(("float32", "bfloat16"), (512, 2048), DENSITIES):
        if dtype == "float32" or bf16:
            shown = "quick" if density == 0.01 else "default"
            yield case("sddmm", _sddmm, "forward", dtype, rows, density, shown)
    for dtype in ("float32", "bfloat16")[: 1 + bf16]:
        for density, rows in itertools.product((0.005, 0.01, 0.05), (512, 2048)):
            shown = "quick" if (density, rows) == (0.01, 512) else "default" if density == 0.01 else "all"
            yield case("sparse_linear", _sparse_linear, "full", dtype, rows, density, shown)
        for rows in (1, 16):
            yield case("sparse_linear", _sparse_linear, "forward", dtype, rows, 0.01, "default", cold=True)


def _mask(case: Case, device: str, density: float) -> tuple[Tensor, Tensor, Tensor]:
    """(crow, col, row) of a random mask."""
    m, n = case.n_out, case.n_in
    flat = torch.randperm(m * n, device=device)[: max(1, round(m * n * density))].sort().values
    row, col = flat // n, flat % n
    crow = F.pad(torch.bincount(row, minlength=m).cumsum(0), (1, 0))
    return crow.int(), col.int(), row


def _sddmm(case: Case, device: str, stack: ExitStack, density: float) -> Problem:
    op = all_ops()["sddmm"]
    dy, x = (_randn(case.rows, width, like=case, device=device) for width in (case.n_out, case.n_in))
    crow, col, row = _mask(case, device, density)
    return Problem(
        "dense dW + gather",
        [Run(lambda: sddmm(dy, x, crow, col), ())],
        {
            "dense dW + gather": [Run(lambda: (dy.T @ x)[row, col], ())],
            "torch sampled_addmm": _sampled_addmm(dy, x, crow, col),
        },
        _randn(len(col), like=case, device=device),
        *_of_reference(op, (dy, x, crow, col), (), torch.empty(0), case.mode),
        forward=[op.cost(dy, x, crow, col)],
    )


def _sampled_addmm(dy: Tensor, x: Tensor, crow: Tensor, col: Tensor) -> list[Run] | str:
    if dy.dtype != torch.float32:
        return f"it has no kernel for {dy.dtype}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "beta state"
        mask = torch.sparse_csr_tensor(crow, col, x.new_zeros(len(col)), (dy.shape[1], x.shape[1]))
    return [Run(lambda: torch.sparse.sampled_addmm(mask, dy.T, x, beta=0.0).values(), ())]


def _sparse_linear(case: Case, device: str, stack: ExitStack, density: float) -> Problem:
    ops = all_ops()
    x = _randn(case.rows, case.n_in, like=case, device=device).requires_grad_()
    g = _randn(case.rows, case.n_out, like=case, device=device)
    crow, col, row = _mask(case, device, density)
    vals = _randn(len(col), like=case, device=device, scale=case.n_in**-0.5, dtype=torch.float32).requires_grad_()
    pool, places = _pool(case, device, lambda: _layer(case, device)[:2]), torch.stack([row, col.long()])

    def ours(w, bias):
        return Run(lambda: sparse_linear(x, w, vals, crow, col, bias=bias), (x, vals))

    def shira(w, bias):
        return Run(lambda: rivals.shira(x, w, bias, vals, places), (x, vals))

    w, bias = pool[0]
    args = (x, w, vals, crow, col, bias)
    return Problem(
        "frozen",
        [ours(*layer) for layer in pool],
        {
            "frozen": [Run(functools.partial(F.linear, x, *layer), (x,)) for layer in pool],
            "clone + COO": [shira(*layer) for layer in pool],
        },
        g,
        *_of_reference(ops["sparse_linear"], args, (0, 2), g, case.mode),
        forward=[ops["sparse_linear"].cost(*args)],
        backward=[ops["sparse_linear_dx"].cost(g, w, vals, crow, col, case.n_in), ops["sddmm"].cost(g, x, crow, col)],
    )


FAMILIES = (_sample_cases, _lora_cases, _slices_cases, _route_cases, _nf4_cases, _sparse_cases)


def cases(device: str) -> list[Case]:
    """Every case of a device, in the order in which they run."""
    from .bottleneck_cases import bottleneck_cases, rescale_cases  # which are made of the parts above
    from .hadamard_cases import hadamard_cases
    from .kron_cases import kron_cases
    from .prefix_cases import prefix_cases
    from .select_cases import select_cases
    from .split_cases import split_cases

    others = (rescale_cases, select_cases, split_cases, kron_cases, hadamard_cases, bottleneck_cases, prefix_cases)
    return [case for family in (*FAMILIES, *others) for case in family(device)]


def roofline(costs: Sequence[Cost], flops: float, byterate: float) -> float:
    """The least seconds that kernels of these costs take, one after the other."""
    return sum(max(cost.flops / flops, cost.bytes / byterate) for cost in costs)
