"""What the kernels are compared with: plain torch, mixed batches in three ways, HF PEFT, and bitsandbytes."""

from __future__ import annotations

import importlib
import importlib.util
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FROZEN = "frozen"  # the yardstick that has no adapter: nothing to check, and its work is another
BARE = "bare products"  # of a bottleneck, without activation and residual: likewise
LONGER = "longer sequence"  # a prompt's worth of tokens more, in place of a prefix: likewise
OTHERS = (FROZEN, BARE, LONGER)

Factors = Sequence[tuple[Tensor, Tensor]]  # (A [r, in], B [out, r]) of each adapter
Layer = tuple[Tensor, Tensor, Factors]  # W [out, in], bias [out]


def missing(package: str) -> str:
    """ "", or that a package is not installed."""
    return "" if importlib.util.find_spec(package) else f"{package} is not installed"


def tensors(nested: Any) -> Iterator[Tensor]:
    if isinstance(nested, Tensor):
        yield nested
    else:
        for item in nested:
            yield from tensors(item)


def linear(w: Tensor, bias: Tensor) -> nn.Linear:
    """A frozen layer on these very tensors."""
    layer = nn.Linear(w.shape[1], w.shape[0], device="meta")
    layer.weight, layer.bias = (nn.Parameter(t, requires_grad=False) for t in (w, bias))
    return layer


# -- plain torch ------------------------------------------------------------------------------------------------------


def delta(x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)) * scale


def lora(x: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor, scale: float, p: float) -> Tensor:
    """LoRA as anybody would write it."""
    return F.linear(x, w, bias) + delta(F.dropout(x, p) if p else x, a, b, scale)


# -- sparse deltas ----------------------------------------------------------------------------------------------------


def shira(x: Tensor, w: Tensor, bias: Tensor, vals: Tensor, places: Tensor) -> Tensor:
    """SHiRA as HF PEFT runs it: a copy of W for every call, to which a COO tensor is added. places [2, nnz]."""
    whole = w.clone()
    whole += torch.sparse_coo_tensor(places, vals.to(w.dtype), w.shape, check_invariants=False)
    return F.linear(x, whole, bias)


# -- Fastfood ---------------------------------------------------------------------------------------------------------


class _Butterflies(torch.autograd.Function):
    """The unnormalised Walsh-Hadamard transform of the last dimension; H is symmetric, so backward is the same."""

    @staticmethod
    def forward(ctx, x):
        y, half = x, 1
        while half < x.shape[-1]:
            a, b = y.view(-1, x.shape[-1] // (2 * half), 2, half).unbind(2)
            y = torch.stack((a + b, a - b), 2)
            half *= 2
        return y.view(x.shape)

    @staticmethod
    def backward(ctx, g):
        return butterflies(g)


def butterflies(x: Tensor) -> Tensor:
    """A pass over memory for every level, as Intrinsic SAID's published code has it."""
    return _Butterflies.apply(x)


def fastfood(theta: Tensor, signs: Tensor, permutation: Tensor, gaussians: Tensor, norm: float, base: Tensor) -> Tensor:
    """base + P(theta) as Intrinsic SAID's published code computes it, with two transforms of n.

    signs, permutation [n] int64   gaussians [n] fp32
    """
    n, numel = len(permutation), base.numel()
    mixed = butterflies(F.pad(theta, (0, n - len(theta))) * signs)
    out = butterflies(mixed[permutation] * gaussians)[:numel]
    return base + (out / norm).view(base.shape).to(base.dtype)


# -- mixed batches ----------------------------------------------------------------------------------------------------


def _skewed(rows: int) -> list[int]:
    """Each adapter has half as many rows again as the one before."""
    out: list[int] = []
    length = 1.0
    while len(out) < rows:
        out += [out[-1] + 1 if out else 0] * math.ceil(length)
        length *= 1.5
    return out[:rows]


def _uniform(rows: int) -> list[int]:
    return [i % math.ceil(math.sqrt(rows)) for i in range(rows)]


# The adapter of each row of a batch, the first four as in Punica's benchmark. Chen et al. 2023, arXiv:2310.18547.
POPULARITY: dict[str, Callable[[int], list[int]]] = {
    "distinct": lambda rows: list(range(rows)),
    "uniform": _uniform,
    "skewed": _skewed,
    "identical": lambda rows: [0] * rows,
    "uniform, a fifth base": lambda rows: [-1 if row % 5 == 4 else i for row, i in enumerate(_uniform(rows))],
    "8 adapters": lambda rows: [row % 8 for row in range(rows)],
}


def mixed(x: Tensor, layers: Sequence[Layer], numbers: list[int], scale: float) -> dict[str, list[tuple]]:
    """name -> (call, leaves) per layer, for x [rows, tokens, in] whose row i has the adapter numbers[i], -1 for none.

    What follows from the numbers alone is made here, before the clock runs; one step has many layers. Both bmm pad the
    factors to the highest rank, and serve rows of no adapter with one of zeros.
    """
    count, base = max(numbers) + 1, min(numbers) < 0
    ids = torch.tensor([i if i >= 0 else count for i in numbers], device=x.device)
    groups = [(ids == i).nonzero().flatten() for i in range(count + base)]
    longest = max(map(len, groups))
    slots = torch.empty_like(ids)  # where a row lies when each adapter has room for the longest group
    for i, rows in enumerate(groups):
        slots[rows] = i * longest + torch.arange(len(rows), device=x.device)

    def loop(w, bias, *factors):
        y = F.linear(x, w, bias)
        for rows, a, b in zip(groups, factors[::2], factors[1::2], strict=False):
            y = y.index_add(0, rows, delta(x[rows], a, b, scale))
        return y

    def gathered(w, bias, a, b):
        t = torch.bmm(x, a[ids].to(x.dtype).mT)
        return F.linear(x, w, bias) + torch.bmm(t, b[ids].to(x.dtype).mT) * scale

    def padded(w, bias, a, b):
        room = x.new_zeros(len(groups) * longest, *x.shape[1:]).index_copy(0, slots, x)
        t = torch.bmm(room.view(len(groups), -1, x.shape[-1]), a.to(x.dtype).mT)
        added = torch.bmm(t, b.to(x.dtype).mT).view(len(room), x.shape[1], -1)
        return F.linear(x, w, bias) + added[slots] * scale

    def padded_to(rank: int, dim: int, factors: list[Tensor]) -> Tensor:
        zeros = [torch.zeros_like(factors[0])] * base
        widths = [(0, 0, 0, rank - f.shape[0]) if dim == 0 else (0, rank - f.shape[1]) for f in (*factors, *zeros)]
        wide = [F.pad(f.detach(), width) for f, width in zip((*factors, *zeros), widths, strict=True)]
        return torch.stack(wide).requires_grad_()

    def runs(call, layers):
        return [(lambda layer=layer: call(*layer), (x, *layer[2:])) for layer in layers]

    apart = [(w, bias, *(f for pair in factors for f in pair)) for w, bias, factors in layers]
    rank = max(a.shape[0] for a, _ in layers[0][2])
    stacked = [
        (w, bias, *(padded_to(rank, dim, [pair[dim] for pair in factors]) for dim in range(2)))
        for w, bias, factors in layers
    ]
    return {
        "loop over adapters": runs(loop, apart),
        "gathered bmm": runs(gathered, stacked),
        "padded bmm": runs(padded, stacked),
    }


# -- HF PEFT ----------------------------------------------------------------------------------------------------------


def peft_layers(layers: Sequence[Layer], scale: float, p: float, dtype: torch.dtype) -> list[nn.Module]:
    """HF PEFT's LoRA layers on the same weights and values, adapters named "a0", "a1", ... and held in `dtype`."""
    from peft import LoraConfig, inject_adapter_in_model

    model = nn.ModuleDict({f"site{i}": linear(w, bias) for i, (w, bias, _) in enumerate(layers)})
    for number, (a, _) in enumerate(layers[0][2]):
        rank = a.shape[0]
        config = LoraConfig(r=rank, lora_alpha=round(scale * rank), lora_dropout=p, target_modules=list(model))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of several adapters, which are meant
            inject_adapter_in_model(config, model, adapter_name=f"a{number}")
    made: list[Any] = list(model.train().values())
    for layer, (_, _, factors) in zip(made, layers, strict=True):
        for number, (a, b) in enumerate(factors):
            layer.lora_A[f"a{number}"].weight = nn.Parameter(a.detach().to(dtype))
            layer.lora_B[f"a{number}"].weight = nn.Parameter(b.detach().to(dtype))
    return made


def not_for_lokr(p: int, r: int) -> str:
    """ "", or why HF PEFT does not cut a layer of width p r into factors p x p and r x r."""
    return "" if p <= r else "HF PEFT makes the first factor the smaller one"


def lokr_delta(w1: Tensor, w2: Tensor) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
    """(what HF PEFT's LoKr layer adds to the output of its linear, its two factors), without the linear itself."""
    from peft import LoKrConfig, inject_adapter_in_model

    n = len(w1) * len(w2)
    model = nn.ModuleDict({"site": nn.Linear(n, n, bias=False, device=w1.device, dtype=w1.dtype)})
    config = LoKrConfig(r=n, alpha=n, decompose_factor=len(w1), target_modules=["site"])
    inject_adapter_in_model(config, model)
    layer: Any = model["site"]
    layer.lokr_w1["default"], layer.lokr_w2["default"] = (nn.Parameter(w.detach().clone()) for w in (w1, w2))
    return lambda x: layer._get_delta_activations("default", x), trainable(layer)


def trainable(module: nn.Module) -> list[Tensor]:
    return [p for p in module.parameters() if p.requires_grad]


def ia3_layer(w: Tensor, bias: Tensor, l: Tensor, on_input: bool) -> nn.Module:
    """HF PEFT's (IA)^3 on this frozen linear, with these numbers."""
    from peft import IA3Config, inject_adapter_in_model

    model = nn.ModuleDict({"site": linear(w, bias)})
    inject_adapter_in_model(IA3Config(target_modules=["site"], feedforward_modules=["site"] if on_input else []), model)
    layer: Any = model["site"]
    layer.ia3_l["default"] = nn.Parameter(l.detach().view(1, -1) if on_input else l.detach().view(-1, 1))
    return layer


# -- prefixes ---------------------------------------------------------------------------------------------------------


def transformer(width: int, heads: int, layers: int, positions: int, causal: bool) -> nn.Module:
    """A frozen GPT-2 or BERT of transformers that takes embeddings, with random weights."""
    import transformers

    sizes: dict[str, Any] = {"num_hidden_layers": layers, "num_attention_heads": heads, "vocab_size": 8}
    sizes |= {"bos_token_id": None, "eos_token_id": None, "attn_implementation": "sdpa"}
    if causal:
        config: Any = transformers.GPT2Config(n_embd=width, n_positions=positions, use_cache=False, **sizes)
        model: Any = transformers.GPT2Model(config)
    else:
        rest: dict[str, Any] = {"intermediate_size": 4 * width, "max_position_embeddings": positions}
        config = transformers.BertConfig(hidden_size=width, **rest, **sizes)
        model = transformers.BertModel(config, add_pooling_layer=False)
    return model.eval().requires_grad_(False)


def cache_of(flat: Sequence[Tensor], x: Tensor, config: Any) -> Any:
    """What HF PEFT hands a model for keys and values [l, width] of each layer in turn, beside an input x [rows, ..]."""
    from transformers import DynamicCache

    heads = [p.to(x.dtype).expand(len(x), *p.shape).unflatten(-1, (config.num_attention_heads, -1)) for p in flat]
    return DynamicCache([tuple(p.transpose(1, 2) for p in pair) for pair in zip(heads[::2], heads[1::2], strict=True)])


# -- adapter-hub ------------------------------------------------------------------------------------------------------


def no_adapter_hub() -> str:
    """ "", or why its layers are not here: it may be too old for another package."""
    if not (reason := missing("adapters")):
        try:
            importlib.import_module("adapters.methods.modeling")
        except ImportError as error:
            reason = f"adapters: {' '.join(str(error).split())}"
    return reason


def hub_adapter(
    wd: Tensor, bd: Tensor, wu: Tensor, bu: Tensor, act: str, ln: tuple[Tensor, Tensor] | None
) -> nn.Module:
    """Its bottleneck layer on these very weights; it is called with x and the residual, and returns a tuple."""
    from adapters import SeqBnConfig
    from adapters.methods.modeling import Adapter

    config = SeqBnConfig(non_linearity=act, ln_before=ln is not None)
    layer = Adapter("x", wd.shape[1], len(wd), config).to(wd)
    (*norm, down, _), up = layer.adapter_down, layer.adapter_up
    down.weight, down.bias, up.weight, up.bias = (nn.Parameter(t.detach()) for t in (wd, bd, wu, bu))
    for own in norm:
        own.weight, own.bias = (nn.Parameter(t.detach()) for t in ln or ())
    return layer


# -- bitsandbytes -----------------------------------------------------------------------------------------------------


def not_for_bitsandbytes(n: int, k: int, blocksize: int) -> str:
    """ "", or why its kernels do not serve, or serve wrongly, weights [n, k]."""
    return "" if n % 32 == 0 and k % blocksize == 0 else f"bitsandbytes wants out in 32s and in in {blocksize}s"


def bitsandbytes_layers(
    pool: Sequence[tuple[Tensor, Tensor]], shape: tuple[int, int], blocksize: int, dtype: torch.dtype, training: bool
) -> list[nn.Module]:
    """Its 4-bit layers on (a copy of) the same packed weights; those that infer change them at the first call."""
    import bitsandbytes as bnb

    code = bnb.functional.get_4bit_type("nf4", device=pool[0][0].device)
    made = []
    for packed, absmax in pool:
        layer = bnb.nn.Linear4bit(shape[1], shape[0], bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
        state = bnb.functional.QuantState(absmax.clone(), torch.Size(shape), code, blocksize, "nf4", dtype)
        kept = {"quant_state": state, "blocksize": blocksize, "compress_statistics": False, "quant_type": "nf4"}
        layer.weight = bnb.nn.Params4bit(packed.clone(), **kept, module=layer, bnb_quantized=True)
        made.append(layer.train(training))
    return made
