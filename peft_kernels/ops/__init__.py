"""The ops: fused, differentiable, each with a plain torch reference. `explain()` tells which backend serves a call."""

from ._op import BackendError, all_ops, backend
from .lora import lora_add, lora_add_, lora_linear
from .rescale import rescale

__all__ = ["BackendError", "all_ops", "backend", "lora_add", "lora_add_", "lora_linear", "rescale"]
