"""NF4Linear, and quantize, which turns the linear layers of a model into it. Dettmers et al. 2023, arXiv:2305.14314."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .engine.attach import is_attached
from .engine.method import words
from .engine.packed import Packed
from .engine.roles import picked
from .engine.site import Site, adapters_of, base_modules, base_numbers, base_parameters
from .ops.nf4 import LEVELS, checked, checked_blocksize

_BLOCKSIZE2 = 256
_STATE = "quant_state.bitsandbytes__nf4"
# Key in a state dict behind "weight." -> attribute, plain and with double quantisation.
_KEYS = {"absmax": "absmax"}
_NESTED_KEYS = {"absmax": "absmax_q", "nested_absmax": "absmax", "nested_quant_map": "code2"}


class NF4Linear(Packed):
    """A frozen linear layer whose weight is kept in NF4, 4 bits and a scale per block. arXiv:2305.14314.

    weight uint8 [ceil(out * in / 2), 1], or the same bytes as another dtype   absmax fp32 [blocks], and with double
    quantisation absmax_q uint8 [blocks], absmax fp32 [ceil(blocks / 256)], code2 fp32 [256], offset fp32 0-d
    bias [out] or None. Its call takes x [..., in] of any floating dtype and is differentiable in x.

    A new layer has torch.nn.Linear's initial weights, quantised; `from_linear` takes those of another layer.
    `.to(dtype)` casts the bias and the dtype in which the weight is read (`dtype`), never the packed weight. Its
    state_dict has the keys and the bytes of bitsandbytes' Linear4bit; a dense weight found there is quantised.
    """

    format = "nf4"
    absmax: Tensor
    absmax_q: Tensor | None
    code2: Tensor | None
    offset: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        blocksize: int = 64,
        double_quant: bool = True,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        self._become(self.weight.detach(), blocksize, double_quant)

    @classmethod
    def from_linear(cls, linear: nn.Module, *, blocksize: int = 64, double_quant: bool = True) -> NF4Linear:
        """The layer quantised: a torch.nn.Linear or transformers' Conv1D. The bias is shared, the weight is not.

        A Linear4bit of bitsandbytes gives its own packed tensors, which are shared and not copied; its block size and
        double quantisation hold. ValueError for another kind of layer and for weights on the meta device.
        """
        out = cls.__new__(cls)
        nn.Module.__init__(out)
        state = getattr(getattr(linear, "weight", None), "quant_state", None)
        site = Site("", linear)
        if state is None and (site.kind != "linear" or not site.plain or isinstance(linear, Packed)):
            raise ValueError(f"from_linear got a {type(linear).__name__}; expected a torch.nn.Linear or Linear4bit")
        out.register_parameter("weight", None)
        out.register_parameter("bias", linear.bias)  # type: ignore[arg-type]
        if state is not None:
            out._take(linear.weight.data, state)  # type: ignore[union-attr]
        else:
            out._become(site.weight.detach(), blocksize, double_quant)
        return out.train(linear.training)

    # -- the packed weight ------------------------------------------------------------------------------------------

    def _become(self, weight: Tensor, blocksize: int, double_quant: bool) -> None:
        if weight.is_meta:
            raise ValueError("a weight on the meta device has no values to quantise; load them first")
        self.out_features, self.in_features = weight.shape
        self.dtype, self.blocksize = weight.dtype, blocksize
        self._hold(*self._quantised(weight, double_quant))

    def _take(self, packed: Tensor, state: Any) -> None:
        """The tensors of a bitsandbytes QuantState."""
        nested = state.state2 if state.nested else None
        if state.quant_type != "nf4" or (nested is not None and nested.blocksize != _BLOCKSIZE2):
            kind = f"{state.quant_type}{f' with nested blocks of {nested.blocksize}' if nested else ''}"
            raise ValueError(f"the layer holds {kind}; expected nf4, with nested blocks of {_BLOCKSIZE2}")
        self.out_features, self.in_features = state.shape
        self.dtype, self.blocksize = state.dtype, state.blocksize
        own = (state.absmax,) if nested is None else (nested.absmax, state.absmax, nested.code, state.offset)
        _check_levels(state.code)
        self._hold(packed, *own)

    def _quantised(self, weight: Tensor, double_quant: bool) -> tuple[Tensor, ...]:
        """(packed, absmax), with double quantisation (packed, absmax2, absmax_q, code2, offset)."""
        packed, absmax = ops.quantize_nf4(weight, self.blocksize)
        if not double_quant:
            return packed, absmax
        code = ops.dynamic_map(weight.device)
        q, absmax2, offset = ops.quantize_absmax(absmax, code, _BLOCKSIZE2)
        return packed, absmax2, q, code, offset

    def _hold(
        self,
        packed: Tensor,
        absmax: Tensor,
        absmax_q: Tensor | None = None,
        code2: Tensor | None = None,
        offset: Tensor | None = None,
    ) -> None:
        self.weight = nn.Parameter(packed, requires_grad=False)
        for name, t in (("absmax", absmax), ("absmax_q", absmax_q), ("code2", code2), ("offset", offset)):
            self.register_buffer(name, t, persistent=False)  # state_dict has keys of its own

    @property
    def double_quant(self) -> bool:
        """Whether the scales are quantised too."""
        return self.absmax_q is not None

    @property
    def _nested(self) -> dict[str, Any]:
        return {"absmax_q": self.absmax_q, "code2": self.code2, "offset": self.offset, "blocksize2": _BLOCKSIZE2}

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        shape = (self.out_features, self.in_features)
        dtype = dtype or self.dtype
        return ops.dequantize_nf4(self.weight.detach(), self.absmax, shape, self.blocksize, dtype, **self._nested)

    def stored(self) -> dict[str, Tensor]:
        own = {"weight": self.weight, **self._buffers}
        return {name: t for name, t in own.items() if t is not None}

    def pack_(self, weight: Tensor) -> None:
        values = self._quantised(weight, self.double_quant)
        with torch.no_grad():
            for own, value in zip(self.stored().values(), values, strict=True):
                own.copy_(value.view(own.dtype).view(own.shape))

    def rounded(self, weight: Tensor) -> Tensor:
        packed, absmax, *nested = self._quantised(weight.detach(), self.double_quant)
        named = dict(zip(("absmax_q", "code2", "offset"), nested, strict=False))
        return ops.dequantize_nf4(packed, absmax, weight.shape, self.blocksize, weight.dtype, **named)

    # -- calls ------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        packed = (self.weight, self.absmax, self.out_features, self.blocksize)
        return ops.nf4_linear(x, *packed, bias=self.bias, **self._nested)

    def lora_linear(self, x: Tensor, a: Tensor, b: Tensor, scale: Any, *, p: float, rng: Tensor | None) -> Tensor:
        packed = (self.weight, self.absmax, self.out_features, self.blocksize)
        return ops.nf4_lora_linear(x, *packed, a, b, scale, bias=self.bias, p=p, rng=rng, **self._nested)

    def extra_repr(self) -> str:
        double = "double_quant" if self.double_quant else "single_quant"
        return f"{super().extra_repr()}, nf4, blocksize={self.blocksize}, {double}, dtype={self.dtype}"

    # -- moving, saving, loading ------------------------------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> NF4Linear:
        """Moves the packed tensors as bytes, so that no cast reaches them; the bias and `dtype` follow a cast."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        weight, bias, buffers = self.weight, self._parameters["bias"], dict(self._buffers)
        self._parameters, self._buffers = {"bias": bias}, {}
        super()._apply(fn, recurse)
        self._parameters = {"weight": weight, "bias": self._parameters["bias"]}
        self._parameters["weight"] = nn.Parameter(_moved(fn, weight.data), requires_grad=False)
        for name, t in buffers.items():
            self._buffers[name] = None if t is None else _moved(fn, t)
        return self

    def _state(self) -> Tensor:
        """What the tensors do not tell, as bitsandbytes writes it: JSON as uint8."""
        told: dict[str, Any] = {
            "quant_type": "nf4",
            "blocksize": self.blocksize,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": [self.out_features, self.in_features],
        }
        if self.offset is not None:
            told |= {"nested_blocksize": _BLOCKSIZE2, "nested_dtype": "float32", "nested_offset": self.offset.item()}
        return torch.tensor(list(json.dumps(told).encode()), dtype=torch.uint8, device=self.weight.device)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key, name in (_NESTED_KEYS if self.double_quant else _KEYS).items():
            destination[f"{prefix}weight.{key}"] = getattr(self, name)
        destination[f"{prefix}weight.quant_map"] = torch.tensor(LEVELS, device=self.weight.device)
        destination[f"{prefix}weight.{_STATE}"] = self._state()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        given = {k.removeprefix(prefix): t for k, t in state_dict.items() if k.startswith(prefix)}
        weight, bias = given.pop("weight", None), given.pop("bias", None)
        packed = {k.removeprefix("weight."): given.pop(k) for k in list(given) if k.startswith("weight.")}
        for name, t in (("weight", weight), ("bias", bias)):
            if t is None and getattr(self, name) is not None:
                missing_keys.append(prefix + name)
        keep = local_metadata.get("assign_to_params_buffers", False)
        try:
            if weight is not None:
                given |= self._load_weight(weight, packed, keep)
            if bias is not None and self.bias is None:
                given["bias"] = bias
            elif bias is not None:
                _load_bias(self, bias, keep)
        except ValueError as error:
            error_msgs.append(f"{prefix}weight: {error}")
        if strict:
            unexpected_keys += [prefix + key for key in given]

    def _load_weight(self, weight: Tensor, packed: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
        """Takes a packed or a dense weight; returns the tensors that are none of it."""
        shape, device = (self.out_features, self.in_features), self.weight.device
        if not packed and weight.is_floating_point() and weight.shape == shape:
            self._hold(*self._quantised(weight.detach().to(device), self.double_quant))
            return {}
        if _STATE not in packed:
            raise ValueError(f"{weight.dtype} {tuple(weight.shape)} without {_STATE}; expected nf4 or {shape}")
        told = json.loads(bytes(packed.pop(_STATE).tolist()))
        nested = "nested_offset" in told
        own = {name: packed.pop(key, None) for key, name in (_NESTED_KEYS if nested else _KEYS).items()}
        if nested:
            own["offset"] = torch.tensor(told["nested_offset"], dtype=torch.float32)
        _check_levels(packed.pop("quant_map", None))
        if told["quant_type"] != "nf4" or tuple(told["shape"]) != shape:
            raise ValueError(f"{told['quant_type']} of shape {tuple(told['shape'])}; expected nf4 of {shape}")
        if None in own.values() or told.get("nested_blocksize", _BLOCKSIZE2) != _BLOCKSIZE2:
            raise ValueError(
                f"it lacks tensors or has nested blocks other than {_BLOCKSIZE2}; quantise the model again"
            )
        ready = {name: t.to(device, copy=not keep) for name, t in {"packed": weight, **own}.items()}
        scales = (ready.get("absmax_q"), ready.get("code2"), ready.get("offset"))
        checked("load", ready["packed"], ready["absmax"], shape[0] * shape[1], told["blocksize"], *scales, _BLOCKSIZE2)
        self.blocksize, self.dtype = told["blocksize"], getattr(torch, told["dtype"])
        self._hold(**ready)
        return {f"weight.{key}": t for key, t in packed.items()}


def _load_bias(module: nn.Linear, bias: Tensor, keep: bool) -> None:
    if bias.shape != module.bias.shape:
        raise ValueError(f"bias is {tuple(bias.shape)}; expected {tuple(module.bias.shape)}")
    if keep:
        module.bias = nn.Parameter(bias, requires_grad=module.bias.requires_grad)
    else:
        with torch.no_grad():
            module.bias.copy_(bias)


def _check_levels(levels: Tensor | None) -> None:
    if levels is not None and not torch.equal(levels.cpu(), torch.tensor(LEVELS)):
        raise ValueError("its 16 levels are not those of nf4; expected quant_type nf4")


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def _moved(fn: Any, t: Tensor) -> Tensor:
    """fn(t) with t as integers: what moves a tensor does so, what casts one does not."""
    return fn(t.view(_INTEGERS[t.element_size()])).view(t.dtype)


# -- whole models -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Footprint:
    """What the numbers of a base model take.

    packed: kind -> number of packed layers.   dense: paths of the linear layers that are not packed.
    bytes: of all parameters and of the scales.   dense_bytes: the same if no layer were packed.
    """

    packed: dict[str, int]
    dense: tuple[str, ...]
    bytes: int
    dense_bytes: int

    def __str__(self) -> str:
        layers = ", ".join(f"{n} layers {kind}" for kind, n in self.packed.items()) or "no packed layer"
        kept = f", {len(self.dense)} linear layers dense ({self.dense[0]}, ...)" if self.dense else ""
        share = 100 * self.bytes / max(self.dense_bytes, 1)
        return f"{layers}{kept}: {self.bytes:,} bytes, {share:.1f} % of {self.dense_bytes:,} dense"


def footprint(model: nn.Module) -> Footprint:
    """Counts the packed layers of a base model and its bytes, adapters left out."""
    kinds: dict[str, int] = {}
    dense, size, whole = [], 0, 0
    for path, module in base_modules(model):
        if isinstance(module, Packed):
            kinds[module.format] = kinds.get(module.format, 0) + 1
            size += sum(t.numel() * t.element_size() for n, t in module.stored().items() if n != "weight")
        elif Site(path, module).kind == "linear":
            dense.append(path)
    for (_, p), (_, full) in zip(base_parameters(model), base_numbers(model), strict=True):
        size += p.numel() * p.element_size()
        whole += full.numel() * full.element_size()
    return Footprint(kinds, tuple(dense), size, whole)


_FORMATS: dict[str, type[Packed]] = {"nf4": NF4Linear}


def quantize(
    model: nn.Module,
    kind: str = "nf4",
    *,
    double_quant: bool = True,
    blocksize: int = 64,
    skip: Iterable[str] = ("head", "embed"),
    progress: bool = True,
) -> nn.Module:
    """Quantises the linear layers of the model in place, one after the other, and returns the model.

    kind: "nf4".   double_quant: quantise the scales too, 0.37 bits less per weight.   blocksize: weights that share a
        scale, 32, 64, ... 4096.
    skip: roles, or globs over module paths, of what stays dense with all that is in it.
    Transformers' Conv1D becomes an NF4Linear too. Left dense besides: a weight that two modules share (a head tied to
    the embedding), what transformers keeps in fp32 (T5's wo), parametrized layers, and what
    torch.nn.MultiheadAttention and TransformerEncoderLayer read without a call. Layers that are quantised already stay
    as they are. The dense weight of a layer is let go before the next layer's turn; hooks and module objects stay.
    ValueError where nothing is left to quantise, for an unknown kind or block size, weights on the meta device, and a
    model with adapters: quantise first, then attach. Dettmers et al. 2023, arXiv:2305.14314.
    """
    from tqdm.auto import tqdm

    if not isinstance(model, nn.Module):
        raise ValueError(f"quantize got a {type(model).__name__}; expected a torch.nn.Module")
    if kind not in _FORMATS:
        raise ValueError(f"kind={kind!r}; expected one of {', '.join(_FORMATS)}")
    if is_attached(model) or any(adapters_of(m) is not None for _, m in base_modules(model)):
        raise ValueError("the model has an adapter, made for its dense weights; quantise first, then attach")
    checked_blocksize("quantize", blocksize)
    chosen = _quantizable(model, words(skip))
    if not chosen:
        raise ValueError(f"nothing to quantise in {type(model).__name__}: {footprint(model)}")
    for path, module in chosen:
        if module.weight.is_meta:
            raise ValueError(f"{path}.weight is on the meta device; load the model's values before quantising")
    settings = {"double_quant": double_quant, "blocksize": blocksize}
    for _, module in tqdm(chosen, desc=kind, unit="layer", delay=3, disable=not progress, dynamic_ncols=True):
        _turn(module, _FORMATS[kind].from_linear(module, **settings))
    return model


def _turn(module: nn.Module, new: Packed) -> None:
    """Gives a module the tensors and the class of `new`; its identity, hooks and mode stay."""
    own = ("_parameters", "_buffers", "_non_persistent_buffers_set")
    vars(module).update({k: v for k, v in vars(new).items() if k in own or not hasattr(nn.Module(), k)})
    module.__class__ = type(new)


def _quantizable(model: nn.Module, skip: tuple[str, ...]) -> list[tuple[str, nn.Module]]:
    """(path, module) of the linear layers that `quantize` takes."""
    modules = dict(base_modules(model))
    left = picked(model, skip)
    owners: dict[int, int] = {}
    for module in modules.values():
        for p in module._parameters.values():
            owners[id(p)] = owners.get(id(p), 0) + 1
    wide = getattr(model, "_keep_in_fp32_modules", None) or ()
    unseen = tuple(p for p, m in modules.items() if isinstance(m, (nn.MultiheadAttention, nn.TransformerEncoderLayer)))
    chosen = []
    for path, module in modules.items():
        site = Site(path, module)
        taken = site.kind == "linear" and site.plain and not isinstance(module, Packed)
        if not taken or path in left or any(name in wide for name in path.split(".")):
            continue
        if any(not top or path.startswith(f"{top}.") for top in unseen):
            continue
        weight = module._parameters.get("weight")
        if weight is not None and owners[id(weight)] == 1 and weight.is_floating_point():
            chosen.append((path, module))
    return chosen
