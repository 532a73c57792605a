"""NF4Linear: a linear layer in 4 bits. Dettmers et al. 2023, arXiv:2305.14314."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..engine.packed import Stored
from ..ops.nf4 import LEVELS, checked, checked_blocksize
from .layer import QuantLinear, weight_of

_BLOCKSIZE2 = 256
_STATE = "weight.quant_state.bitsandbytes__nf4"
# Attribute -> key in a state dict, plain and with double quantisation.
_KEYS = {"absmax": "weight.absmax"}
_NESTED_KEYS = {"absmax_q": "weight.absmax", "absmax": "weight.nested_absmax", "code2": "weight.nested_quant_map"}
_LEVELS = "weight.quant_map"


class NF4Linear(QuantLinear):
    """A frozen linear layer whose weight is kept in NF4, 4 bits and a scale per block. arXiv:2305.14314.

    weight uint8 [ceil(out * in / 2), 1], or the same bytes as another dtype   absmax fp32 [blocks], and with double
    quantisation absmax_q uint8 [blocks], absmax fp32 [ceil(blocks / 256)], code2 fp32 [256], offset fp32 0-d
    bias [out] or None. Its call takes x [..., in] of any floating dtype and is differentiable in x.

    A new layer has torch.nn.Linear's initial weights, quantised; `from_linear` takes those of another layer.
    `.to(dtype)` casts the bias and the dtype in which the weight is read (`dtype`), never the packed weight. Its
    state_dict has the keys and the bytes of bitsandbytes' Linear4bit; a dense weight found there is quantised.
    """

    format = "nf4"
    scales = ("absmax", "absmax_q", "code2", "offset")
    blocksize: int
    double_quant: bool  # the scales are quantised too
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
        self.dtype, self.blocksize, self.double_quant = self.weight.dtype, blocksize, double_quant
        self._hold(self.quantized(self.weight))

    @classmethod
    def from_linear(cls, linear: nn.Module, *, blocksize: int = 64, double_quant: bool = True) -> NF4Linear:
        """The layer quantised: a torch.nn.Linear or transformers' Conv1D. The bias is shared, the weight is not.

        A Linear4bit of bitsandbytes gives its own packed tensors, which are shared and not copied; its block size and
        double quantisation hold. ValueError for another kind of layer.
        """
        state = getattr(getattr(linear, "weight", None), "quant_state", None)
        if state is not None:
            return cls._over(linear, state)
        weight = weight_of(linear)
        checked_blocksize("from_linear", blocksize)
        out = cls._of(linear, weight.shape, weight.dtype, blocksize=blocksize, double_quant=double_quant)
        out._hold(out.quantized(weight))
        return out

    @classmethod
    def _over(cls, linear: nn.Module, state: Any) -> NF4Linear:
        """On the tensors of a Linear4bit and its QuantState."""
        nested = state.state2 if state.nested else None
        if state.quant_type != "nf4" or (nested is not None and nested.blocksize != _BLOCKSIZE2):
            kind = f"{state.quant_type}{f' with nested blocks of {nested.blocksize}' if nested else ''}"
            raise ValueError(f"the layer holds {kind}; expected nf4, with nested blocks of {_BLOCKSIZE2}")
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                "bitsandbytes has repacked the layer for its CPU kernel; take it over before its first call"
            )
        _check_levels(state.code)
        settings = {"blocksize": state.blocksize, "double_quant": nested is not None}
        out = cls._of(linear, state.shape, state.dtype, **settings)
        stored = {"weight": linear.weight.data, "absmax": state.absmax}  # type: ignore[union-attr]
        if nested is not None:
            stored |= {"absmax": nested.absmax, "absmax_q": state.absmax, "code2": nested.code, "offset": state.offset}
        out._hold(stored)
        return out

    # -- the packed weight ------------------------------------------------------------------------------------------

    def quantized(self, weight: Tensor) -> dict[str, Tensor]:
        packed, absmax = ops.quantize_nf4(weight, self.blocksize)
        if not self.double_quant:
            return {"weight": packed, "absmax": absmax}
        code = getattr(self, "code2", None)  # its own, once it has one
        code = ops.dynamic_map(weight.device) if code is None else code
        q, absmax2, offset = ops.quantize_absmax(absmax, code, _BLOCKSIZE2)
        own = code.clone()  # safetensors refuses tensors that several layers share
        return {"weight": packed, "absmax": absmax2, "absmax_q": q, "code2": own, "offset": offset}

    def read(self, stored: Stored, dtype: torch.dtype) -> Tensor:
        packed, absmax, nested = _split(stored)
        shape = (self.out_features, self.in_features)
        return ops.dequantize_nf4(packed.detach(), absmax, shape, self.blocksize, dtype, **nested)

    def linear(self, x: Tensor, stored: Stored) -> Tensor:
        packed, absmax, nested = _split(stored)
        return ops.nf4_linear(x, packed, absmax, self.out_features, self.blocksize, bias=self.bias, **nested)

    def lora_linear(self, x: Tensor, a: Tensor, b: Tensor, scale: Any, *, p: float, rng: Tensor | None) -> Tensor:
        packed, absmax, nested = _split(self.stored())
        args = (packed, absmax, self.out_features, self.blocksize, a, b, scale)
        return ops.nf4_lora_linear(x, *args, bias=self.bias, p=p, rng=rng, **nested)

    def extra_repr(self) -> str:
        double = "double_quant" if self.double_quant else "single_quant"
        return f"{super().extra_repr()}, nf4, blocksize={self.blocksize}, {double}, dtype={self.dtype}"

    # -- state_dict -------------------------------------------------------------------------------------------------

    def _beside(self) -> dict[str, Tensor]:
        own, device = self.stored(), self.weight.device
        state: dict[str, Any] = {
            "quant_type": "nf4",
            "blocksize": self.blocksize,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": [self.out_features, self.in_features],
        }
        out = {_KEYS["absmax"]: own["absmax"], _LEVELS: torch.tensor(LEVELS, dtype=torch.float32, device=device)}
        if self.offset is not None:
            out |= {key: own[name] for name, key in _NESTED_KEYS.items()}
            out[_NESTED_KEYS["code2"]] = own["code2"].clone()  # safetensors takes no tensor that layers share
            offset = float("nan") if self.offset.is_meta else self.offset.item()
            state |= {"nested_blocksize": _BLOCKSIZE2, "nested_dtype": "float32", "nested_offset": offset}
        # What the tensors do not tell, as bitsandbytes writes it: JSON as uint8.
        return {**out, _STATE: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8, device=device)}

    def _told(self, weight: Tensor, beside: dict[str, Tensor]) -> dict[str, Tensor]:
        shape = (self.out_features, self.in_features)
        if _STATE not in beside:
            raise ValueError(f"{weight.dtype} {tuple(weight.shape)} without {_STATE}; expected nf4 or {shape}")
        told = _json(beside.pop(_STATE))
        if told.get("quant_type") != "nf4" or tuple(told.get("shape", ())) != shape:
            raise ValueError(f"{told.get('quant_type')} of shape {told.get('shape')}; expected nf4 of {list(shape)}")
        nested = "nested_offset" in told
        keys = _NESTED_KEYS if nested else _KEYS
        own = {name: beside.pop(key) for name, key in keys.items() if key in beside}
        _check_levels(beside.pop(_LEVELS, None))
        if len(own) < len(keys) or told.get("nested_blocksize", _BLOCKSIZE2) != _BLOCKSIZE2:
            raise ValueError(f"it lacks tensors or has nested blocks other than {_BLOCKSIZE2}; quantise it again")
        if nested:
            own["offset"] = torch.tensor(told["nested_offset"], dtype=torch.float32, device=weight.device)
        stored = {"weight": weight, **own}
        packed, absmax, second = _split(stored)
        checked("load", packed, absmax, shape[0] * shape[1], told["blocksize"], *second.values())
        self.blocksize, self.double_quant = told["blocksize"], nested
        self.dtype = getattr(torch, told["dtype"])
        return stored


def _split(stored: Stored) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """(packed, absmax, keywords of the second level) as the ops take them."""
    nested = {name: stored.get(name) for name in ("absmax_q", "code2", "offset")}
    return stored["weight"], stored["absmax"], {**nested, "blocksize2": _BLOCKSIZE2}


def _json(text: Tensor) -> dict[str, Any]:
    try:
        told = json.loads(bytes(text.tolist()))
    except ValueError as error:
        raise ValueError(f"{_STATE} is not JSON ({error})") from None
    return told if isinstance(told, dict) else {}


def _check_levels(levels: Tensor | None) -> None:
    if levels is not None and not torch.equal(levels.cpu(), torch.tensor(LEVELS)):
        raise ValueError("its 16 levels are not those of nf4; expected quant_type nf4")
