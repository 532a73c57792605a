"""What the packed linear layers share: where they come from, how their tensors move, are saved and loaded."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..engine.packed import Packed, Stored
from ..engine.site import Site

_Layer = TypeVar("_Layer", bound="QuantLinear")


class QuantLinear(Packed):
    """A frozen linear layer whose packed weight is the parameter `weight` and the buffers named in `scales`.

    A subclass writes `quantized`, `read`, `linear` and `lora_linear`, `_beside` and `_told`.
    """

    scales: ClassVar[tuple[str, ...]]

    # -- where a layer comes from -------------------------------------------------------------------------------------

    @classmethod
    def _of(cls: type[_Layer], linear: nn.Module, shape: Any, dtype: torch.dtype, **settings: Any) -> _Layer:
        """A layer for a weight [out, in] that is still to come, with the bias and mode of `linear`."""
        out = cls.__new__(cls)
        nn.Module.__init__(out)
        out.out_features, out.in_features = shape
        out.dtype = dtype
        for name, value in settings.items():
            setattr(out, name, value)
        out.register_parameter("weight", None)
        out.register_parameter("bias", linear.bias)  # type: ignore[arg-type]
        return out.train(linear.training)

    def _hold(self, stored: Stored) -> None:
        self.weight = nn.Parameter(stored["weight"], requires_grad=False)
        for name in self.scales:
            self.register_buffer(name, stored.get(name), persistent=False)  # state_dict has keys of its own

    def stored(self) -> dict[str, Tensor]:
        own = {"weight": self.weight, **{name: getattr(self, name) for name in self.scales}}
        return {name: t for name, t in own.items() if t is not None}

    # -- moving -------------------------------------------------------------------------------------------------------

    def _apply(self: _Layer, fn: Any, recurse: bool = True) -> _Layer:
        """Moves the packed tensors as bytes, so that no cast reaches them; the bias and `dtype` follow a cast."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        stored, parameters = self.stored(), self._parameters
        self._parameters, self._buffers = {"bias": parameters["bias"]}, {}
        super()._apply(fn, recurse)
        bias = self._parameters["bias"]
        self._parameters = {"weight": None, "bias": bias}
        self._hold({name: _moved(fn, t.detach()) for name, t in stored.items()})
        return self

    # -- state_dict ---------------------------------------------------------------------------------------------------

    def _beside(self) -> dict[str, Tensor]:
        """What a state_dict has beside weight and bias: key -> tensor."""
        raise NotImplementedError

    def _told(self, weight: Tensor, beside: dict[str, Tensor]) -> dict[str, Tensor]:
        """The `stored` tensors of a checkpoint, taken out of `beside`, and the layer's settings from it.

        ValueError for what is not of this format and shape.
        """
        raise NotImplementedError

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + key: t for key, t in self._beside().items()})

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
        told = (prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        for hook in self._load_state_dict_pre_hooks.values():
            hook(state_dict, *told)
        given = {k.removeprefix(prefix): t for k, t in state_dict.items() if k.startswith(prefix)}
        given = {k: t for k, t in given.items() if k.partition(".")[0] not in self._modules}
        weight, bias = given.pop("weight", None), given.pop("bias", None)
        for name, t in (("weight", weight), ("bias", bias)):
            if t is None and getattr(self, name) is not None:
                missing_keys.append(prefix + name)
        keep = local_metadata.get("assign_to_params_buffers", False)
        try:
            if weight is not None:
                self._load_weight(weight, given, keep)
            if bias is not None and self.bias is None:
                given["bias"] = bias
            elif bias is not None:
                self._load_bias(bias, keep)
        except ValueError as error:
            error_msgs.append(f"{prefix}weight: {error}")
        if strict:
            unexpected_keys += [prefix + key for key in given]

    def _load_weight(self, weight: Tensor, beside: dict[str, Tensor], keep: bool) -> None:
        """Takes a packed weight, or quantises a dense one; `keep` shares a packed one as it is."""
        shape, device = (self.out_features, self.in_features), self.weight.device
        packed = any(key.startswith(("weight.", "SCB")) for key in beside)
        if not packed and weight.is_floating_point() and weight.shape == shape:
            self._hold(self.quantized(weight.detach() if device.type == "meta" else weight.detach().to(device)))
            return
        stored = self._told(weight.detach(), beside)
        self._hold({name: t if keep else t.to(device, copy=True) for name, t in stored.items()})

    def _load_bias(self, bias: Tensor, keep: bool) -> None:
        if bias.shape != self.bias.shape:
            raise ValueError(f"bias is {tuple(bias.shape)}; expected {tuple(self.bias.shape)}")
        if keep:
            self.bias = nn.Parameter(bias, requires_grad=self.bias.requires_grad)
        else:
            with torch.no_grad():
                self.bias.copy_(bias)


def weight_of(linear: nn.Module) -> Tensor:
    """The dense weight [out, in] of a torch.nn.Linear or transformers' Conv1D; ValueError for another layer."""
    site = Site("", linear)
    if site.kind != "linear" or not site.plain or isinstance(linear, Packed):
        raise ValueError(f"from_linear got a {type(linear).__name__}; expected a torch.nn.Linear")
    return site.weight.detach()


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def _moved(fn: Any, t: Tensor) -> Tensor:
    """fn(t) with t as integers: what moves a tensor does so, what casts one does not."""
    return fn(t.view(_INTEGERS[t.element_size()])).view(t.dtype)
