"""Int8Linear: a linear layer in 8 bits, one scale per output row."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..engine.packed import Stored
from ..ops._autocast import autocasting
from .layer import QuantLinear, weight_of

_FORMAT = "weight_format"
_FEW = {torch.float32: 2, torch.bfloat16: 32}  # rows of x for which torch's int8 kernel beats a dense product
_BLOCK = 2**18  # numbers of a weight that are quantised at a time


class Int8Linear(QuantLinear):
    """A frozen linear layer whose weight is kept in int8 and a scale per row: w ~ weight * scb / 127.

    weight int8 [out, in]   scb fp32 [out], the largest magnitude of each row   bias [out] or None. Its call takes
    x [..., in] of any floating dtype, is differentiable in x and quantises no activations.

    A new layer has torch.nn.Linear's initial weights, quantised; `from_linear` takes those of another layer.
    `.to(dtype)` casts the bias and the dtype in which the weight is read (`dtype`). Its state_dict has the keys and
    the bytes of bitsandbytes' Linear8bitLt; a dense weight found there is quantised.
    """

    format = "int8"
    scales = ("scb",)
    scb: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        self.dtype = self.weight.dtype
        self._hold(self.quantized(self.weight))

    @classmethod
    def from_linear(cls, linear: nn.Module) -> Int8Linear:
        """The layer quantised: a torch.nn.Linear or transformers' Conv1D. The bias is shared, the weight is not.

        A quantised Linear8bitLt of bitsandbytes gives its own tensors, which are shared and not copied. ValueError for
        another kind of layer.
        """
        held, bias = linear._parameters.get("weight"), linear._parameters.get("bias")
        scb = getattr(held, "SCB", None)
        scb = getattr(getattr(linear, "state", None), "SCB", None) if scb is None else scb
        if held is not None and scb is not None and held.dtype == torch.int8:
            dtype = torch.float16 if bias is None else bias.dtype  # which the layer itself does not say
            out = cls._of(linear, held.shape, dtype)
            out._hold({"weight": held.data, "scb": scb})
            return out
        weight = weight_of(linear)
        out = cls._of(linear, weight.shape, weight.dtype)
        out._hold(out.quantized(weight))
        return out

    # -- the packed weight ------------------------------------------------------------------------------------------

    def quantized(self, weight: Tensor) -> dict[str, Tensor]:
        rows = max(_BLOCK // max(weight.shape[1], 1), 1)  # at a time: little is held beside the weight
        parts = [_quantized(part) for part in weight.detach().split(rows)]
        return {"weight": torch.cat([q for q, _ in parts]), "scb": torch.cat([scb for _, scb in parts])}

    def read(self, stored: Stored, dtype: torch.dtype) -> Tensor:
        return _read(stored["weight"], stored["scb"], dtype)

    def linear(self, x: Tensor, stored: Stored) -> Tensor:
        if autocasting(x.device) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        # A transform of torch.func knows no autograd.Function.
        if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
            return F.linear(x, self.read(stored, x.dtype), bias)
        y = _Int8.apply(x, stored["weight"], stored["scb"])
        return y if bias is None else y + bias

    def lora_linear(self, x: Tensor, a: Tensor, b: Tensor, scale: Any, *, p: float, rng: Tensor | None) -> Tensor:
        return ops.lora_add_(self.linear(x, self.stored()), x, a, b, scale, p=p, rng=rng)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, int8, dtype={self.dtype}"

    # -- state_dict -------------------------------------------------------------------------------------------------

    def _beside(self) -> dict[str, Tensor]:
        return {"SCB": self.scb, _FORMAT: torch.tensor(0, dtype=torch.uint8)}

    def _told(self, weight: Tensor, beside: dict[str, Tensor]) -> dict[str, Tensor]:
        shape, scb, layout = (self.out_features, self.in_features), beside.pop("SCB", None), beside.pop(_FORMAT, None)
        if scb is None or weight.dtype != torch.int8 or weight.shape != shape or scb.shape != shape[:1]:
            given = "none" if scb is None else f"{scb.dtype} {tuple(scb.shape)}"
            raise ValueError(f"{weight.dtype} {tuple(weight.shape)} with SCB {given}; expected int8 {shape} with [out]")
        if layout is not None and layout.item() != 0:
            raise ValueError(f"{_FORMAT} {layout.item()}; expected 0, rows: save it with a newer bitsandbytes")
        return {"weight": weight, "scb": scb.detach().float()}


class _Int8(torch.autograd.Function):
    """x [..., in] times an int8 weight and its row scales; kept for the backward: the packed weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scb: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scb)
        if x.dtype == torch.float16:  # in which sums of unscaled products overflow
            return F.linear(x, _read(weight, scb, x.dtype))
        rows = x.numel() // max(x.shape[-1], 1)
        few = x.device.type == "cpu" and 0 < rows <= _FEW.get(x.dtype, 0)
        if few and x.shape[-1] % 32 == 0:  # torch's kernel reads 32 at a time
            y = torch._weight_int8pack_mm(x.reshape(rows, -1), weight, torch.ones(len(weight), dtype=x.dtype))
        else:
            y = F.linear(x, weight.to(x.dtype))
        return _scaled(y, scb).view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        weight, scb = ctx.saved_tensors
        if g.dtype == torch.float16:
            return g @ _read(weight, scb, g.dtype), None, None
        return _scaled(g, scb) @ weight.to(g.dtype), None, None


def _scaled(y: Tensor, scb: Tensor) -> Tensor:
    wide = torch.promote_types(y.dtype, torch.float32)
    return (y.to(wide) * (scb.to(wide) / 127)).to(y.dtype)


def _read(weight: Tensor, scb: Tensor, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(dtype, torch.float32)
    return (weight.detach().to(wide) * (scb.to(wide) / 127)[:, None]).to(dtype)


def _quantized(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(int8, largest magnitudes) of some rows of a weight."""
    w = rows.float()
    scb = w.abs().amax(1) if w.shape[1] else w.new_zeros(len(w))
    scb = torch.where(scb.isfinite(), scb, torch.nan)  # a row that is not finite is NaN throughout
    q = (w * (127.0 / scb).clamp(max=torch.finfo(torch.float32).max)[:, None]).round()
    return q.nan_to_num(0.0).clamp(-127, 127).to(torch.int8), scb
