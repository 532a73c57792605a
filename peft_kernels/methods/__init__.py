"""One file per method: a `Method` dataclass and its `Tuner`. Importing this package fills the registry."""

from ..engine.method import methods
from .bitfit import BitFit
from .full import FullTuning, Head
from .ia3 import IA3
from .lora import LoRA

__all__ = ["IA3", "BitFit", "FullTuning", "Head", "LoRA", "methods"]
