"""One file per method: a `Method` dataclass and its `Tuner`. Importing this package fills the registry."""

from ..engine.method import methods
from .bitfit import BitFit
from .compacter import Compacter, CompacterPP
from .diffpruning import DiffPruning
from .dora import DoRA
from .far import FAR
from .fishmask import FishMask
from .full import FullTuning, Head
from .gated import Gated
from .ia3 import IA3
from .krona import KronA, KronARes
from .layertype import LayerType
from .lets import LeTS
from .lokr import LoKr
from .lora import LoRA
from .lst import LST
from .ltsft import LTSFT
from .magnitude import MagnitudePruning
from .movement import MovementPruning
from .qlora import QLoRA
from .random import RandomMask
from .said import SAID
from .structured import StructuredPruning
from .svd import SVD
from .toplayers import TopLayers
from .union import ByLayer, Union

__all__ = [
    "FAR",
    "IA3",
    "LST",
    "LTSFT",
    "SAID",
    "SVD",
    "BitFit",
    "ByLayer",
    "Compacter",
    "CompacterPP",
    "DiffPruning",
    "DoRA",
    "FishMask",
    "FullTuning",
    "Gated",
    "Head",
    "KronA",
    "KronARes",
    "LayerType",
    "LeTS",
    "LoKr",
    "LoRA",
    "MagnitudePruning",
    "MovementPruning",
    "QLoRA",
    "RandomMask",
    "StructuredPruning",
    "TopLayers",
    "Union",
    "methods",
]
