"""One file per method: a `Method` dataclass and its `Tuner`. Importing this package fills the registry."""

from ..engine.method import methods
from .adamix import AdaMix
from .adapterdrop import AdapterDrop
from .adapterl import AdapterL
from .bitfit import BitFit
from .compacter import Compacter, CompacterPP
from .diffpruning import DiffPruning
from .dora import DoRA
from .far import FAR
from .fishmask import FishMask
from .full import FullTuning, Head
from .gated import Gated
from .houlsby import Houlsby
from .ia3 import IA3
from .infix import InfixTuning
from .ipt import IPT
from .krona import KronA, KronARes
from .layertype import LayerType
from .lets import LeTS
from .lokr import LoKr
from .lora import LoRA
from .lst import LST
from .ltsft import LTSFT
from .magnitude import MagnitudePruning
from .mam import MAM
from .movement import MovementPruning
from .parallel import ParallelAdapter
from .pfeiffer import Pfeiffer
from .prefix import PrefixTuning
from .prompt import PromptTuning
from .ptuning import PTuning
from .qlora import QLoRA
from .random import RandomMask
from .s4 import S4
from .said import SAID
from .sparseadapter import SparseAdapter
from .spot import SPoT
from .structured import StructuredPruning
from .svd import SVD
from .toplayers import TopLayers
from .union import ByLayer, Union
from .unipelt import UniPELT
from .warp import WARP

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
    "WARP",
    "AdaMix",
    "AdapterDrop",
    "AdapterL",
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
    "Houlsby",
    "InfixTuning",
    "KronA",
    "KronARes",
    "LayerType",
    "LeTS",
    "LoKr",
    "LoRA",
    "MagnitudePruning",
    "MovementPruning",
    "ParallelAdapter",
    "Pfeiffer",
    "PTuning",
    "PrefixTuning",
    "PromptTuning",
    "QLoRA",
    "RandomMask",
    "SPoT",
    "SparseAdapter",
    "StructuredPruning",
    "TopLayers",
    "UniPELT",
    "Union",
    "methods",
]
