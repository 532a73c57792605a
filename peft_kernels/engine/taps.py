"""Taps: a tuner sees the input or output of another module: the entry of its span, the residual, hidden states."""

from __future__ import annotations

import threading
from typing import Any

from torch import Tensor, nn


class _Local(threading.local):
    inputs: dict[str, Any] | None = None  # class-level default: every thread has its own


_local = _Local()


class _Noting:
    def __init__(self, key: str):
        self.key = key


class Tap(_Noting):
    """A forward pre-hook that notes the module's first input under a key until `forget`."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        note(self.key, args[0] if args else next(iter(kwargs.values())))


class OutputTap(_Noting):
    """A forward hook that notes the module's output, of a tuple the first."""

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        note(self.key, output[0] if isinstance(output, tuple) else output)


def note(key: str, value: Any) -> None:
    """What `seen` returns from now on in this thread, until `forget`."""
    _local.inputs = {**(_local.inputs or {}), key: value}


def tap(module: nn.Module, key: str, output: bool = False) -> None:
    """Installs a Tap, or of the output an OutputTap; a second one with the same key is not needed."""
    hooks = module._forward_hooks if output else module._forward_pre_hooks
    if any(isinstance(hook, _Noting) and hook.key == key for hook in hooks.values()):
        return
    if output:
        module.register_forward_hook(OutputTap(key))
    else:
        module.register_forward_pre_hook(Tap(key), with_kwargs=True)


def untap(module: nn.Module, keys: set[str]) -> None:
    """Removes the taps with these keys."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for number, hook in list(hooks.items()):
            if isinstance(hook, _Noting) and hook.key in keys:
                del hooks[number]
                module._forward_pre_hooks_with_kwargs.pop(number, None)


def seen(key: str) -> Tensor:
    """What was noted; RuntimeError if its module has not run in this call."""
    inputs = _local.inputs
    if inputs is None or key not in inputs:
        raise RuntimeError(f"the {key} was not computed in this call; call the model, not the module alone")
    return inputs[key]


def noted(key: str) -> Any:
    """What was noted in this thread, or None."""
    return None if _local.inputs is None else _local.inputs.get(key)


def forget(keys: tuple[str, ...]) -> None:
    """Drops what was noted, so that no activation outlives its call."""
    inputs = _local.inputs
    if inputs is not None:
        _local.inputs = {key: value for key, value in inputs.items() if key not in keys}
