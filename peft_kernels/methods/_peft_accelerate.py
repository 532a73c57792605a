"""accelerate: the layers of a Hugging Face PEFT model on our kernels, where they are."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from ._peft_fused import Fused
from ._peft_fused_lokr import FusedLoKr
from ._peft_fused_lora import FusedLoRA

KINDS: dict[str, type[Fused]] = {"lora": FusedLoRA, "lokr": FusedLoKr}  # module of peft.tuners -> of its Linear


class Report:
    """What `accelerate` did.

    fused: paths of the layers that run on the kernels.   fallback: path -> why a layer runs as PEFT has it.
    """

    def __init__(self, model: nn.Module, fused: list[str], fallback: dict[str, str]):
        self.fused, self.fallback, self._model = fused, fallback, model

    def undo(self) -> None:
        """Gives every layer of the model PEFT's forward back."""
        for module in self._model.modules():
            if isinstance(vars(module).get("forward"), Fused):
                del module.forward

    def __str__(self) -> str:
        reasons: dict[str, list[str]] = {}
        for path, reason in self.fallback.items():
            reasons.setdefault(reason, []).append(path)
        lines = [f"{len(self.fused)} layers of PEFT fused, {len(self.fallback)} as they were"]
        lines += [f"  {len(paths)} ({paths[0]}{', ...' * (len(paths) > 1)}): {why}" for why, paths in reasons.items()]
        return "\n".join(lines)


def accelerate(peft_model: nn.Module) -> Report:
    """Runs the LoRA and LoKr layers of a Hugging Face PEFT model on fused kernels, in place, and returns the report.

    peft_model: a PeftModel, or a model with adapters that PEFT injected.

    Classes, parameters, names and files stay PEFT's, and so does all that it does with them: adapters may be added,
    switched, disabled, merged and saved as before. Each call looks whether the kernels compute what the layer is asked:
    LoRA (rsLoRA too) on a linear, packed by `pk.quantize` or not, or on a Conv1D, of several active adapters and in
    mixed batches (adapter_names) as well; LoKr on a linear, without dropout. All else, as DoRA, runs as before. Outputs
    and gradients agree to the rounding of the dtype; dropout has the same probability and other random numbers. Layers
    that are made later need another call. Tested with PEFT 0.21.
    ValueError if the model has no layer of PEFT; ImportError without the package.
    """
    try:
        base: Any = importlib.import_module("peft.tuners.tuners_utils").BaseTunerLayer
    except ModuleNotFoundError as error:
        raise ImportError(f"{error.name} is not installed; pip install peft") from None
    kinds: dict[Any, type[Fused]] = {
        importlib.import_module(f"peft.tuners.{name}.layer").Linear: kind for name, kind in KINDS.items()
    }
    fused: list[str] = []
    fallback: dict[str, str] = {}
    for path, module in peft_model.named_modules():
        if not isinstance(module, base):
            continue
        own, kind = vars(module).get("forward"), kinds.get(type(module))
        if kind is None:
            fallback[path] = f"{type(module).__module__}.{type(module).__name__} has no fused form"
        elif own is not None and not isinstance(own, Fused):
            fallback[path] = "it has an instance forward (a hook of accelerate?); remove that first"
        else:
            module.forward = forward = kind(module) if own is None else own
            if reason := forward.unfit():
                fallback[path] = reason
            else:
                fused.append(path)
    if not fused and not fallback:
        raise ValueError(f"{type(peft_model).__name__} has no layer of PEFT; expected what get_peft_model returned")
    return Report(peft_model, fused, fallback)
