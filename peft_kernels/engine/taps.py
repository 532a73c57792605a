"""Taps: a tuner sees the input of another module, the entry of its span or the place of the residual."""

from __future__ import annotations

import threading
from typing import Any

from torch import Tensor, nn


class _Local(threading.local):
    inputs: dict[str, Tensor] | None = None  # class-level default: every thread has its own


_local = _Local()


class Tap:
    """A forward pre-hook that notes the module's first input under a key until `forget`."""

    def __init__(self, key: str):
        self.key = key

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        inputs = dict(_local.inputs or ())
        inputs[self.key] = args[0] if args else next(iter(kwargs.values()))
        _local.inputs = inputs


def tap(module: nn.Module, key: str) -> None:
    """Installs a Tap; a second one with the same key is not needed."""
    if not any(isinstance(hook, Tap) and hook.key == key for hook in module._forward_pre_hooks.values()):
        module.register_forward_pre_hook(Tap(key), with_kwargs=True)


def untap(module: nn.Module, keys: set[str]) -> None:
    """Removes the taps with these keys."""
    for number, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, Tap) and hook.key in keys:
            del module._forward_pre_hooks[number]
            module._forward_pre_hooks_with_kwargs.pop(number, None)


def seen(key: str) -> Tensor:
    """The noted input; RuntimeError if its module has not run in this call."""
    inputs = _local.inputs
    if inputs is None or key not in inputs:
        raise RuntimeError(f"the {key} was not computed in this call; call the model, not the module alone")
    return inputs[key]


def forget(keys: tuple[str, ...]) -> None:
    """Drops noted inputs, so that no activation outlives its call."""
    inputs = _local.inputs
    if inputs is not None:
        _local.inputs = {key: value for key, value in inputs.items() if key not in keys}
