"""Taps: a tuner sees the input or output of another module: the entry of its span, the residual, hidden states."""

from __future__ import annotations

import inspect
import threading
from typing import Any

from torch import nn


class _Local(threading.local):
    def __init__(self) -> None:  # in each thread; see rows.py
        self.inputs: dict[str, Any] | None = None


_local = _Local()


class _Noting:
    def __init__(self, key: str):
        self.key = key


class Tap(_Noting):
    """A forward pre-hook that notes the module's first input under a key until `forget`."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        note(self.key, args[0] if args else next(iter(kwargs.values())))


class ArgumentTap(_Noting):
    """A forward pre-hook that notes the module's argument `name`; None where it is not given."""

    def __init__(self, key: str, module: nn.Module, name: str):
        super().__init__(key)
        self.name, named = name, list(inspect.signature(module.forward).parameters)
        self.place = named.index(name) if name in named else None

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = args[self.place : self.place + 1] if self.place is not None else ()
        note(self.key, given[0] if given else kwargs.get(self.name))


class OutputTap(_Noting):
    """A forward hook that notes the module's output, of a tuple the first."""

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        note(self.key, output[0] if isinstance(output, tuple) else output)


def note(key: str, value: Any) -> None:
    """What `seen` returns from now on in this thread, until `forget`."""
    _local.inputs = {**(_local.inputs or {}), key: value}


def tap(module: nn.Module, key: str, output: bool = False, argument: str = "") -> None:
    """Installs a Tap, of the output an OutputTap, or an ArgumentTap; a second one with the same key is not needed."""
    hooks = module._forward_hooks if output else module._forward_pre_hooks
    if any(isinstance(hook, _Noting) and hook.key == key for hook in hooks.values()):
        return
    if output:
        module.register_forward_hook(OutputTap(key))
    else:
        hook = ArgumentTap(key, module, argument) if argument else Tap(key)
        module.register_forward_pre_hook(hook, with_kwargs=True)


def renote(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """The module runs on these arguments without its hooks, perhaps for a second time: its ArgumentTaps see them."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, ArgumentTap):
            hook(module, args, kwargs)


def untap(module: nn.Module, keys: set[str]) -> None:
    """Removes the taps with these keys."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for number, hook in list(hooks.items()):
            if isinstance(hook, _Noting) and hook.key in keys:
                del hooks[number]
                module._forward_pre_hooks_with_kwargs.pop(number, None)


def seen(key: str) -> Any:
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
