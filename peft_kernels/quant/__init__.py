"""Quantised base models: the packed linear layers, and quantize, which turns those of a model into them."""

from .int8 import Int8Linear
from .layer import weight_of
from .model import KINDS, Footprint, footprint, plan, quantize, quantized
from .nf4 import NF4Linear

__all__ = ["KINDS", "Footprint", "Int8Linear", "NF4Linear", "footprint", "plan", "quantize", "quantized", "weight_of"]
