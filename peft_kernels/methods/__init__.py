"""One file per method: a `Method` dataclass and its `Tuner`. Importing this package fills the registry."""

from ..engine.method import methods
from .bitfit import BitFit
from .full import FullTuning, Head
from .gated import Gated
from .ia3 import IA3
from .lora import LoRA
from .union import ByLayer, Union

__all__ = ["IA3", "BitFit", "ByLayer", "FullTuning", "Gated", "Head", "LoRA", "Union", "methods"]
