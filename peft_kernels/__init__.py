"""Parameter-efficient fine-tuning methods on fused kernels."""

from . import ops
from ._version import __version__
from .engine.attach import active, attach, detach, disabled, rename, set_active
from .engine.combine import CombineReport, combine
from .engine.counts import Counts, counts
from .engine.fit import fit
from .engine.merge import MergeReport, merge, unmerge
from .engine.method import Method, Tuner
from .engine.recipe import at
from .engine.route import checkpoint_context, route
from .engine.store import load, save
from .explain import explain

# `methods` is the registry, shadowing the package of that name.
from .methods import (
    IA3,
    BitFit,
    ByLayer,
    DoRA,
    FullTuning,
    Gated,
    Head,
    LayerType,
    LoRA,
    TopLayers,
    Union,
    methods,
)
from .ops import BackendError, backend

__all__ = [
    "IA3",
    "BackendError",
    "BitFit",
    "ByLayer",
    "CombineReport",
    "Counts",
    "DoRA",
    "FullTuning",
    "Gated",
    "Head",
    "LayerType",
    "LoRA",
    "MergeReport",
    "Method",
    "TopLayers",
    "Tuner",
    "Union",
    "__version__",
    "active",
    "at",
    "attach",
    "backend",
    "checkpoint_context",
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
    "route",
    "save",
    "set_active",
    "unmerge",
]
