"""One file per method: a `Method` dataclass and its `Tuner`. Importing this package fills the registry."""

from ..engine.method import methods
from .bitfit import BitFit
from .dora import DoRA
from .fishmask import FishMask
from .full import FullTuning, Head
from .gated import Gated
from .ia3 import IA3
from .layertype import LayerType
from .lets import LeTS
from .lora import LoRA
from .ltsft import LTSFT
from .qlora import QLoRA
from .random import RandomMask
from .toplayers import TopLayers
from .union import ByLayer, Union

__all__ = [
    "IA3",
    "LTSFT",
    "BitFit",
    "ByLayer",
    "DoRA",
    "FishMask",
    "FullTuning",
    "Gated",
    "Head",
    "LayerType",
    "LeTS",
    "LoRA",
    "QLoRA",
    "RandomMask",
    "TopLayers",
    "Union",
    "methods",
]
