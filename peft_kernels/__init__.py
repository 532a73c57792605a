"""Parameter-efficient fine-tuning methods on fused kernels."""

from . import ops
from ._version import __version__
from .engine.attach import active, attach, detach, disabled, rename, set_active
from .engine.combine import CombineReport, combine
from .engine.counts import Counts, counts
from .engine.fit import fit
from .engine.merge import MergeReport, merge, unmerge
from .engine.method import Method, Tuner
from .engine.store import load, save
from .explain import explain
from .methods import IA3, BitFit, FullTuning, Head, LoRA, methods  # the registry, shadowing the package of that name
from .ops import BackendError, backend

__all__ = [
    "IA3",
    "BackendError",
    "BitFit",
    "CombineReport",
    "Counts",
    "FullTuning",
    "Head",
    "LoRA",
    "MergeReport",
    "Method",
    "Tuner",
    "__version__",
    "active",
    "attach",
    "backend",
    "combine",
    "counts",
    "detach",
    "disabled",
    "explain",
    "fit",
    "load",
    "merge",
    "methods",
    "ops",
    "rename",
    "save",
    "set_active",
    "unmerge",
]
