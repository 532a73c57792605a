"""The ops: fused, differentiable, each with a plain torch reference. `explain()` tells which backend serves a call."""

from ._op import BackendError, all_ops, backend
from .bottleneck import bottleneck, bottleneck_
from .fastfood import fastfood
from .fastfood_state import fastfood_norm, fastfood_state
from .fisher import fisher_accum_, fisher_linear_
from .hadamard import fwht
from .hard_concrete import hard_concrete
from .kron import kron_linear, kron_linear_
from .kron_weight import kron_add_, kron_sum_weight
from .lora import lora_add, lora_add_, lora_linear
from .lora_apply import lora_apply_
from .lora_slices import lora_linear_slices
from .multi_lora import lora_plan, multi_lora_add, multi_lora_linear
from .nf4 import dequantize_nf4, quantize_nf4
from .nf4_absmax import dequantize_absmax, dynamic_map, quantize_absmax
from .nf4_linear import nf4_linear, nf4_lora_linear
from .rescale import rescale, rescale_
from .sparse import sddmm, sddmm_add_, sparse_add, sparse_add_, sparse_linear
from .sparse_adamw import sparse_adamw_
from .sparse_inplace import sparse_scatter_, sparse_swap_
from .split import far_linear, row_scatter_
from .topk import topk_compact, topk_threshold

__all__ = [
    "BackendError",
    "all_ops",
    "backend",
    "bottleneck",
    "bottleneck_",
    "dequantize_absmax",
    "dequantize_nf4",
    "dynamic_map",
    "far_linear",
    "fastfood",
    "fastfood_norm",
    "fastfood_state",
    "fisher_accum_",
    "fisher_linear_",
    "fwht",
    "hard_concrete",
    "kron_add_",
    "kron_linear",
    "kron_linear_",
    "kron_sum_weight",
    "lora_add",
    "lora_add_",
    "lora_apply_",
    "lora_linear",
    "lora_linear_slices",
    "lora_plan",
    "multi_lora_add",
    "multi_lora_linear",
    "nf4_linear",
    "nf4_lora_linear",
    "quantize_absmax",
    "quantize_nf4",
    "rescale",
    "rescale_",
    "row_scatter_",
    "sddmm",
    "sddmm_add_",
    "sparse_add",
    "sparse_add_",
    "sparse_linear",
    "sparse_scatter_",
    "sparse_swap_",
    "sparse_adamw_",
    "topk_compact",
    "topk_threshold",
]
