"""Parameter-efficient fine-tuning methods on fused kernels."""

from . import hf, ops
from ._version import __version__
from .bank import AdapterBank
from .engine.attach import active, attach, detach, disabled, rename, set_active
from .engine.calibrate import calibrate
from .engine.combine import CombineReport, combine
from .engine.counts import Counts, counts
from .engine.distil import Distillation
from .engine.factor import nearest_kronecker, truncated_svd
from .engine.fit import fit
from .engine.life import eject, penalty
from .engine.merge import MergeReport, merge, unmerge
from .engine.method import Method, Phase, Stats, Tuner
from .engine.recipe import at
from .engine.route import checkpoint_context, route
from .engine.search import search
from .engine.store import load, save
from .engine.trunk import shared_trunk
from .explain import explain
from .mask import Mask

# `methods` is the registry, shadowing the package of that name.
from .methods import (
    FAR,
    IA3,
    IPT,
    LST,
    LTSFT,
    MAM,
    S4,
    SAID,
    SVD,
    AdaMix,
    AdapterDrop,
    AdapterL,
    BitFit,
    ByLayer,
    Compacter,
    CompacterPP,
    DiffPruning,
    DoRA,
    FishMask,
    FullTuning,
    Gated,
    Head,
    Houlsby,
    KronA,
    KronARes,
    LayerType,
    LeTS,
    LoKr,
    LoRA,
    MagnitudePruning,
    MovementPruning,
    ParallelAdapter,
    Pfeiffer,
    PrefixTuning,
    PromptTuning,
    PTuning,
    QLoRA,
    RandomMask,
    SparseAdapter,
    SPoT,
    StructuredPruning,
    TopLayers,
    Union,
    UniPELT,
    methods,
)
from .methods._phm import PHMLinear
from .methods._saved import similar_prompts
from .ops import BackendError, backend
from .quant import Footprint, Int8Linear, NF4Linear, footprint, quantize
from .recipes import recipe
from .shrink import shrink

__all__ = [
    "FAR",
    "IA3",
    "IPT",
    "LST",
    "LTSFT",
    "MAM",
    "S4",
    "SAID",
    "SVD",
    "AdapterBank",
    "AdaMix",
    "AdapterDrop",
    "AdapterL",
    "BackendError",
    "BitFit",
    "ByLayer",
    "CombineReport",
    "Compacter",
    "CompacterPP",
    "Counts",
    "DiffPruning",
    "Distillation",
    "DoRA",
    "Footprint",
    "FishMask",
    "FullTuning",
    "Gated",
    "Head",
    "Houlsby",
    "Int8Linear",
    "KronA",
    "KronARes",
    "LayerType",
    "LeTS",
    "LoKr",
    "LoRA",
    "Mask",
    "MagnitudePruning",
    "MergeReport",
    "Method",
    "MovementPruning",
    "NF4Linear",
    "PHMLinear",
    "ParallelAdapter",
    "Pfeiffer",
    "PrefixTuning",
    "Phase",
    "PTuning",
    "PromptTuning",
    "QLoRA",
    "RandomMask",
    "Stats",
    "SPoT",
    "SparseAdapter",
    "StructuredPruning",
    "TopLayers",
    "Tuner",
    "UniPELT",
    "Union",
    "__version__",
    "active",
    "at",
    "attach",
    "backend",
    "checkpoint_context",
    "combine",
    "calibrate",
    "counts",
    "detach",
    "disabled",
    "eject",
    "explain",
    "fit",
    "footprint",
    "hf",
    "load",
    "merge",
    "methods",
    "nearest_kronecker",
    "ops",
    "penalty",
    "quantize",
    "recipe",
    "rename",
    "route",
    "save",
    "search",
    "set_active",
    "shared_trunk",
    "shrink",
    "similar_prompts",
    "truncated_svd",
    "unmerge",
]
