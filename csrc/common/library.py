"""The ops library of C++ launchers: loads it once and says why it cannot serve a device."""

from __future__ import annotations

import functools
import importlib.util
import os
from pathlib import Path
from types import ModuleType

import torch

NAME = "libpeft_kernels_ops.so"
_BUILD = "build it with a C++ compiler: pip install --no-build-isolation ."


@functools.cache
def _load() -> str:
    package = importlib.util.find_spec("peft_kernels")
    path = Path(package.submodule_search_locations[0]) / NAME
    if not path.exists():
        return f"{NAME} is not built; {_BUILD}"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        if "libtorch_cuda" in str(error) or "libcudart" in str(error):
            return (
                f"{NAME} was built for CUDA, torch {torch.__version__} has none; install the +cpu wheel or a CUDA torch"
            )
        return f"{NAME} does not load under torch {torch.__version__} ({error}); {_BUILD}"
    return ""


@functools.cache
def unavailable(device: str) -> str:
    """ "" if the library has launchers for `device` ("cpu" or "cuda"), else the reason."""
    reason = _load()
    if reason or device == "cpu":
        return reason
    from peft_kernels import _C

    if _C.build_info()["cuda"] is None:
        return "the binary was built for the CPU alone; build with PEFT_KERNELS_BUILD=cuda"
    return ""


@functools.cache
def emulated(name: str) -> ModuleType:
    """A second copy of the native module `name`, whose ops are the CUDA kernels run on the CPU.

    For tests: PEFT_KERNELS_EMULATED is the path of the library that csrc/emulate makes of them.
    """
    torch.ops.load_library(os.environ["PEFT_KERNELS_EMULATED"])
    spec = importlib.util.find_spec(name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module._ops = torch.ops._peft_kernels_emulated
    module.unavailable = lambda device: ""
    return module
