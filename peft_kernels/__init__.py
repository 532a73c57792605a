"""Parameter-efficient fine-tuning methods on fused kernels."""

from . import hf, ops
from ._version import __version__
from .engine.attach import active, attach, detach, disabled, rename, set_active
from .engine.calibrate import calibrate
from .engine.counts import Counts, counts
from .engine.fit import fit
from .engine.life import penalty
from .engine.merge import MergeReport, merge, unmerge
from .engine.method import Method, Phase, Stats, Tuner
from .engine.store import load, save
from .explain import explain
from .methods import IA3, BitFit, FullTuning, Head, LoRA, methods  # the registry, shadowing the package of that name
from .ops import BackendError, backend

__all__ = [
    "IA3",
    "BackendError",
    "BitFit",
    "Counts",
    "FullTuning",
    "Head",
    "LoRA",
    "MergeReport",
    "Method",
    "Phase",
    "Stats",
    "Tuner",
    "__version__",
    "active",
    "attach",
    "backend",
    "calibrate",
    "counts",
    "detach",
    "disabled",
    "explain",
    "fit",
    "hf",
    "load",
    "merge",
    "methods",
    "ops",
    "penalty",
    "rename",
    "save",
    "set_active",
    "unmerge",
]
